# What a configuration's own errors look like: the modules of a real nixpkgs.
{ nixpkgs, configuration }:
let
  system = import (nixpkgs + "/nixos/lib/eval-config.nix") {
    system = "x86_64-linux";
    modules = [ (/. + configuration) ];
  };
in
[
  system.config.networking.hostName
  system.config.services.openssh.ports
  (map toString system.config.environment.systemPackages)
  (builtins.seq (
    let
      failed = builtins.filter (x: !x.assertion) system.config.assertions;
    in
    if failed == [ ] then null else system.config.system.build.toplevel.drvPath
  ) null)
]
