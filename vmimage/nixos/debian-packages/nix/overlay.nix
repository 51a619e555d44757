# Attributes of nixpkgs → Debian's packages. What nixpkgs can still make by itself (writeText, buildEnv, makeWrapper,
# closureInfo, NixOS's own scripts) stays its own.
{ wrap }:
final: prev:
let
  inherit (prev) lib;
  parts = map (file: import file { inherit lib wrap final prev; }) [
    ./packages/base.nix
    ./packages/systemd.nix
    ./packages/boot.nix
    ./packages/nix.nix
    ./packages/build-tools.nix
    ./packages/stand-ins.nix
  ];
in
lib.foldl' (a: b: a // b) { } parts
