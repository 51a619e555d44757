# What jobs find beside Nix.
{ lib, pkgs, ... }:
{
  environment.systemPackages =
    with pkgs;
    [
      inotify-tools # the sidecar waits for pipe_out by it
      git
      jq
      curl
      gnutar
      gzip
      xz
      zstd
      cpio
      squashfsTools
      xorriso
      mtools
      dosfstools
    ]
    # For releases without system.build.images. One day it will be gone from nixpkgs.
    ++ lib.optional (pkgs ? nixos-generators) pkgs.nixos-generators
    # For jobs that make an ISO by hand.
    ++ lib.optional stdenv.hostPlatform.isx86 syslinux;
  environment.pathsToLink = lib.optional pkgs.stdenv.hostPlatform.isx86 "/share/syslinux";
}
