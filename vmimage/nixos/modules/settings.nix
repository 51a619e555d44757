# What the VM is told at boot, by QEMU's fw_cfg: the host key, the keys that may log in, how many jobs run at once, and
# perhaps the site's own nix.conf. Nothing of it is kept.
{ config, pkgs, ... }:
{
  boot.kernelModules = [ "qemu_fw_cfg" ];
  # Made at boot: it holds a digest of the system that it is part of.
  environment.etc."osbuilder-image".source = "/run/osbuilder/image";

  systemd.services.osbuilder-config = {
    description = "Take keys and settings from fw_cfg";
    wantedBy = [ "multi-user.target" ];
    before = [
      "nix-daemon.socket"
      "nix-daemon.service"
    ];
    unitConfig.DefaultDependencies = false;
    path = [
      pkgs.coreutils
      pkgs.kmod
      pkgs.util-linux
      config.nix.package
      config.programs.ssh.package
    ];
    environment.RELEASE = config.system.nixos.release;
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      StandardOutput = "tty";
    };
    script = builtins.readFile ../scripts/import-config.sh;
  };
}
