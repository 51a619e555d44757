# What nixos-generate -c CONFIGURATION -f FORMAT -I nixpkgs=NIXPKGS evaluates.
{
  nixpkgs,
  system,
  generators,
  configuration,
  format,
}:
let
  made = import (generators + "/nixos-generate.nix") {
    inherit nixpkgs system;
    configuration = /. + configuration;
    formatConfig = /. + "${generators}/formats/${format}.nix";
  };
in
made.config.system.build.${made.config.formatAttr}.drvPath
