# A NixOS configuration as it stands on an installed machine: with disks, boot
# loader and swap of its own. Drop the folder into jobs/ as it is. The image
# in output/machine/latest/ runs the same system from the ISO, to be tried
# before it is installed: what only the installed machine has, in disks.nix, is
# replaced by what an ISO needs, and the log says which settings those were.
{ pkgs, ... }:

{
  imports = [ ./disks.nix ];

  networking.hostName = "machine";
  time.timeZone = "Europe/Berlin";
  system.stateVersion = "24.05";
  documentation.enable = false;

  services.openssh = {
    enable = true;
    settings.PasswordAuthentication = false;
  };

  # No password: put your own key here.
  users.users.alice = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    openssh.authorizedKeys.keys = [ ];
  };

  environment.systemPackages = [ pkgs.htop ];

  # The serial port shows what the screen shows, but no prompt.
  boot.kernelParams = [ "console=ttyS0,115200" "console=tty0" ];
  systemd.services."serial-getty@ttyS0".enable = false;

  systemd.services.ready = {
    description = "Says that the system is up";
    wantedBy = [ "multi-user.target" ];
    serviceConfig.Type = "oneshot";
    script = ''
      for console in /dev/tty1 /dev/ttyS0; do
        { echo; echo "OSBUILDER-EXAMPLE-READY"; } 2>/dev/null >"$console" || true
      done
    '';
  };
}
