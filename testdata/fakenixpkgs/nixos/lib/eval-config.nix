{
  system ? builtins.currentSystem,
  modules,
  old ? false,
}:
let
  lib = import ../../lib;
  modulesPath = toString ../modules;
  withPkgs =
    eval:
    eval
    // {
      inherit lib;
      inherit (eval.config._module.args) pkgs;
      extendModules = more: withPkgs (eval.extendModules more);
    };
in
withPkgs (
  lib.evalModules {
    modules =
      [ ../modules/base.nix ]
      ++ lib.optional (!old) ../modules/image/images.nix
      ++ [
        (
          { config, ... }:
          {
            _file = toString ./eval-config.nix;
            nixpkgs.system = lib.mkDefault system;
            _module.args.pkgs = import ../../pkgs {
              system = if config.nixpkgs.hostPlatform != null then config.nixpkgs.hostPlatform else config.nixpkgs.system;
              inherit old;
            };
          }
        )
      ]
      ++ modules;
    specialArgs = { inherit modulesPath; };
  }
)
