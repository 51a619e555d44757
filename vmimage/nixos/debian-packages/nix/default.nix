# Takes the place of pkgs/stdenv/default.nix in the test tree: the stages of a package set whose programs are Debian's.
# A TEST SET: what is built from it is never published and is not NixOS.
{
  lib,
  localSystem,
  crossSystem,
  config,
  overlays,
  crossOverlays,
}@args:
let
  nixpkgs = ../..;
  # Written by fetch-packages, which also put the folders into the store. By their hash they are found there, or in a cache
  # when something needs them; nothing can make them.
  debs = lib.mapAttrs (
    name:
    {
      hash,
      version,
      libraries,
    }:
    derivation {
      inherit name;
      inherit (localSystem) system;
      builder = "/bin/sh";
      args = [
        "-c"
        "echo 'neither the store nor a cache has the unpacked Debian package ${name}' >&2; exit 1"
      ];
      outputHashMode = "recursive";
      outputHashAlgo = "sha256";
      outputHash = hash;
    }
    // {
      inherit version libraries;
    }
  ) (lib.importJSON ./packages.json);

  generic = import (nixpkgs + "/pkgs/stdenv/generic") { defaultConfig = config; };
  # Its tools are those of the machine it runs on, in /usr: no bootstrap tools, no cache.
  stdenv =
    {
      cc,
      shell,
      path,
    }:
    generic {
      name = "stdenv-debian";
      buildPlatform = localSystem;
      hostPlatform = localSystem;
      targetPlatform = localSystem;
      preHook = ''
        export NIX_ENFORCE_PURITY= NIX_ENFORCE_NO_NATIVE=1
        export LANG=C.UTF-8 PATH=$PATH:/usr/sbin
      '';
      initialPath = path;
      inherit cc shell;
      fetchurlBoot = _: {
        name = "unfetchable";
        outPath = "/unfetchable";
      };
    };
  bare = stdenv {
    cc = null;
    shell = "/bin/bash";
    path = [ "/usr" ];
  };
  wrap = import ./wrap.nix {
    inherit lib debs;
    stdenv = bare;
  };
  # Debian's gcc, for the few C programs that NixOS compiles.
  cc =
    bare.mkDerivation {
      name = "cc-debian";
      buildCommand = ''
        mkdir -p $out/nix-support $out/bin
        echo 'export CC=gcc CXX=g++ AR=ar AS=as LD=ld NM=nm RANLIB=ranlib STRIP=strip OBJCOPY=objcopy READELF=readelf' >$out/nix-support/setup-hook
      '';
    }
    // {
      libc = wrap.libs;
      cc = wrap.libs;
      bintools = wrap.libs // {
        dynamicLinker = wrap.interpreter;
        isGNU = true;
      };
      isGNU = true;
      isClang = false;
      targetPrefix = "";
      nativeTools = true;
      nativeLibc = true;
      nativePrefix = "/usr";
      langC = true;
    };
in
if
  localSystem.system != "x86_64-linux" || crossSystem != localSystem || crossOverlays != [ ]
then
  import ../stdenv/of-nixpkgs.nix args
else
  [
    (_: {
      __raw = true;
      stdenv = bare;
    })
    (_: {
      inherit config;
      overlays = [ (import ./overlay.nix { inherit wrap; }) ] ++ overlays;
      stdenv = stdenv {
        inherit cc;
        shell = "${wrap.bash}/bin/bash";
        path = [
          wrap.bash
          wrap.perl
          wrap.coreutils
          "/usr"
        ];
      };
    })
  ]
