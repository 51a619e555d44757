# One Ethernet card, with an address by DHCP.
{ config, pkgs, ... }:
{
  networking = {
    hostName = "builder";
    useNetworkd = true;
    useDHCP = false;
    # 22 is opened by the module of sshd. qemux/qemu may forward every port, and a job could listen on one.
    firewall = {
      enable = true;
      logRefusedConnections = false;
    };
  };
  systemd.network = {
    networks."10-ethernet" = {
      matchConfig.Type = "ether";
      networkConfig = {
        DHCP = "ipv4";
        # Behind QEMU's IPv4 network a router seen by IPv6 leads nowhere.
        IPv6AcceptRA = false;
        LLMNR = false;
        MulticastDNS = false;
      };
      # The machine's id is new at every boot; its address should not be.
      dhcpV4Config.ClientIdentifier = "mac";
    };
    wait-online.anyInterface = true;
  };

  systemd.services.osbuilder-address = {
    description = "Say the VM's address";
    wantedBy = [ "multi-user.target" ];
    wants = [ "network-online.target" ];
    after = [ "network-online.target" ];
    path = [
      pkgs.iproute2
      pkgs.gawk
      config.systemd.package
    ];
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      StandardOutput = "tty";
    };
    script = builtins.readFile ../scripts/address.sh;
  };
}
