# What a configuration's own errors look like: the modules of a real nixpkgs.
{ nixpkgs, configuration }:
let
  system = import (nixpkgs + "/nixos/lib/eval-config.nix") {
    system = "x86_64-linux";
    modules = [
      (/. + configuration)
      # What a reduced tree may lack.
      {
        nixpkgs.overlays = [
          (
            _: prev:
            let
              stub = prev.hello // {
                compiler.bootstrapAvailable = false;
              };
            in
            {
              shellcheck = stub;
              shellcheck-minimal = stub;
              haskellPackages.ShellCheck = stub;
            }
          )
        ];
      }
    ];
  };
in
[
  system.config.networking.hostName
  system.config.services.openssh.ports
  (map toString system.config.environment.systemPackages)
  (if builtins.all (a: a.assertion) system.config.assertions then null else system.config.system.build.toplevel.drvPath)
]
