# import <nixpkgs> { }: the packages.
{ system ? builtins.currentSystem, ... }:
import ./pkgs { inherit system; }
