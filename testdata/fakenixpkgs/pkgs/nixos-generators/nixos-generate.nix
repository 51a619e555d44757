# The interface of nixos-generators' file of this name.
{
  nixpkgs ? <nixpkgs>,
  configuration ? <nixos-config>,
  system ? builtins.currentSystem,
  formatConfig,
}:
import "${toString nixpkgs}/nixos/lib/eval-config.nix" {
  inherit system;
  modules = [
    (
      { lib, ... }:
      {
        options.formatAttr = lib.mkOption { type = lib.types.str; };
        options.fileExtension = lib.mkOption {
          type = lib.types.str;
          default = "";
        };
      }
    )
    formatConfig
    configuration
  ];
}
