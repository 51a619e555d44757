# The smallest NixOS configuration that shows that it works: an image that
# boots, says so on the screen and on the first serial port, and waits.
#
# Drop this file into jobs/. The ISO appears in output/minimal/latest/. Try it:
#   qemu-system-x86_64 -m 2048 -cdrom *.iso -nographic
# or write it to a USB stick.
#
# Nobody can log in: no account has a password. To be let in over SSH, add
#   services.openssh.enable = true;
#   users.users.root.openssh.authorizedKeys.keys = [ "ssh-ed25519 …" ];
{ ... }:

{
  networking.hostName = "minimal";

  # The release whose defaults for stored data are kept. An image that runs from
  # memory has none, but NixOS asks.
  system.stateVersion = "24.05";

  # The serial port shows what the screen shows, but no prompt.
  boot.kernelParams = [ "console=ttyS0,115200" "console=tty0" ];
  systemd.services."serial-getty@ttyS0".enable = false;

  # The manual takes a while to build, and a small image has no use for it.
  documentation.enable = false;

  systemd.services.ready = {
    description = "Says that the system is up";
    wantedBy = [ "multi-user.target" ];
    serviceConfig.Type = "oneshot";
    # Each console by its own name, whichever of them /dev/console is; one that
    # this machine lacks is passed over.
    script = ''
      for console in /dev/tty1 /dev/ttyS0; do
        { echo; echo "OSBUILDER-EXAMPLE-READY"; } 2>/dev/null >"$console" || true
      done
    '';
  };
}
