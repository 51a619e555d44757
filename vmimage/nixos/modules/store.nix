# The data disk becomes /nix. See ../store/store.
{
  config,
  lib,
  pkgs,
  ...
}:
{
  systemd.services.osbuilder-store = {
    description = "Nix store on the data disk";
    wantedBy = [ "sysinit.target" ];
    wants = [ "register-nix-paths.service" ];
    unitConfig.DefaultDependencies = false;
    after = [
      "local-fs.target"
      # Newer NixOS loads the image's database there, older ones before systemd.
      "register-nix-paths.service"
      # What systemd makes of the mounts below: at power-off it comes after us.
      "data.mount"
      "nix.mount"
      "nix-store.mount"
      "nexus_bootstrap.mount"
      "tmp.mount"
      "var-tmp.mount"
    ];
    # Before every ordinary unit, so that at power-off the disk goes after them.
    before = [
      "systemd-tmpfiles-setup.service"
      "sysinit.target"
      "nix-daemon.socket"
      "nix-daemon.service"
      "shutdown.target"
    ];
    conflicts = [ "shutdown.target" ];
    restartIfChanged = false;
    path = with pkgs; [
      config.nix.package
      config.systemd.package
      coreutils
      diffutils
      e2fsprogs
      findutils
      gawk
      gnugrep
      gnused
      procps
      squashfsTools
      util-linux
    ];
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      ExecStart = "${pkgs.bash}/bin/bash ${../store/store} start";
      ExecStop = "${pkgs.bash}/bin/bash ${../store/store} stop";
      # A check of a large damaged disk takes its time.
      TimeoutStartSec = "infinity";
      TimeoutStopSec = 60;
      StandardOutput = "tty";
      StandardError = "inherit";
    };
  };
  services.fstrim.enable = lib.mkDefault false; # mounted with discard
}
