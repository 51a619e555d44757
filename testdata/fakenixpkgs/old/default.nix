# A nixpkgs from before image.modules.
{ system ? builtins.currentSystem, ... }:
import ../pkgs {
  inherit system;
  old = true;
}
