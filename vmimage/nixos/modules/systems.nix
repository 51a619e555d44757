# What the VM builds for: itself, and Arm by emulation once that has proved to work at this boot.
{ lib, pkgs, ... }:
let
  inherit (pkgs.stdenv.hostPlatform) isx86_64 system;
  foreign = lib.optional isx86_64 "aarch64-linux";
in
{
  boot.binfmt.emulatedSystems = foreign;

  systemd.services.osbuilder-systems = {
    description = "Try the emulation of foreign systems";
    wantedBy = [ "multi-user.target" ];
    wants = lib.optional (foreign != [ ]) "systemd-binfmt.service";
    after = lib.optional (foreign != [ ]) "systemd-binfmt.service";
    path = [ pkgs.coreutils ];
    environment = {
      NATIVE = system;
      FOREIGN = toString foreign;
    };
    serviceConfig = {
      Type = "oneshot";
      RemainAfterExit = true;
      StandardOutput = "tty";
    };
    script = builtins.readFile ../scripts/systems.sh;
  };
}
