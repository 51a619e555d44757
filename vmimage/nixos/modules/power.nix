# The power button switches the VM off: logind does so by default. It never sleeps, and its clock is right.
{ lib, ... }:
{
  services.timesyncd.enable = true;
  systemd.targets = lib.genAttrs [ "sleep" "suspend" "hibernate" "hybrid-sleep" ] (_: {
    enable = false;
  });
}
