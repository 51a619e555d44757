# An ISO image of the builder VM's own kernel and busybox.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption types;
in
{
  options = {
    image.baseName = mkOption {
      type = types.str;
      default = "fixture-${config.networking.hostName}${lib.optionalString (config.isoImage.edition != "") "-${config.isoImage.edition}"}";
    };
    image.filePath = mkOption {
      type = types.str;
      default = "iso/${config.image.baseName}.iso";
    };
    isoImage = {
      volumeID = mkOption {
        type = types.str;
        default = "FIXTURE";
      };
      makeEfiBootable = mkOption {
        type = types.bool;
        default = false;
      };
      makeUsbBootable = mkOption {
        type = types.bool;
        default = false;
      };
      edition = mkOption {
        type = types.str;
        default = "";
      };
    };
  };
  config = {
    boot.loader.grub.enable = lib.mkImageMediaOverride false;
    lib.isoFileSystems = {
      "/" = lib.mkImageMediaOverride { fsType = "tmpfs"; };
      "/iso" = lib.mkImageMediaOverride {
        device = "/dev/disk/by-label/${config.isoImage.volumeID}";
        fsType = "iso9660";
        neededForBoot = true;
      };
    };
    fileSystems = config.lib.isoFileSystems;
    system.build.image = config.system.build.isoImage;
    system.build.isoImage =
      derivation {
        name = "fixture.iso";
        inherit (pkgs) system;
        builder = "/bin/bash";
        args = [ ./make-iso.sh ];
        PATH = "/usr/sbin:/usr/bin:/sbin:/bin";
        __noChroot = true;
        toplevel = config.system.build.toplevel;
        inherit (config.isoImage) volumeID;
        inherit (config.image) baseName;
        usb = if config.isoImage.makeUsbBootable then "1" else "";
        timeout = toString config.boot.loader.timeout;
      }
      // {
        passthru = { inherit (config.image) filePath; };
      };
  };
}
