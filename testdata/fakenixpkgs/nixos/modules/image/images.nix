{ lib, ... }:
{
  options.image.modules = lib.mkOption {
    type = lib.types.attrsOf lib.types.deferredModule;
    default = { };
  };
  config.image.modules = {
    iso = ../installer/cd-dvd/iso-image.nix;
    iso-installer = ../installer/cd-dvd/installation-cd-base.nix;
  };
}
