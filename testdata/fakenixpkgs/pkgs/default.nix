# Packages, made by the builder VM's own shell: small ones, and some to fail with.
{ system, old ? false }:
let
  sh =
    name: script: more:
    derivation (
      {
        inherit name system;
        builder = "/bin/sh";
        # Ended by the shell itself: it would put the last program in its own place, and Nix kills a builder that has closed
        # its output and is not gone yet.
        args = [
          "-ec"
          (script + "\nexit 0\n")
        ];
        PATH = "/usr/bin:/bin";
        # The tools are Debian's, so the build must see them.
        __noChroot = true;
      }
      // more
    );
  wrong = "0000000000000000000000000000000000000000000000000000";
  fixed = {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = wrong;
  };
  program = name: sh "${name}-1.0" ''mkdir -p $out/bin; printf '#!/bin/sh\necho ${name}\n' >$out/bin/${name}; chmod 755 $out/bin/${name}'' { };
in
rec {
  inherit sh system;
  stdenv.hostPlatform.system = system;

  hello = program "hello";
  htop = program "htop";

  broken = sh "broken-1.0" ''
    echo compiling main.c
    echo "main.c:3: error: expected ';'" >&2
    exit 2
  '' { };
  crashing = sh "crashing-1.0" "echo before; kill -9 $$" { };
  wrong-hash = sh "source-1.0.tar.gz" "echo surprise >$out" fixed;
  unreachable = derivation (
    fixed
    // {
      name = "fetched-1.0.tar.gz";
      system = "builtin";
      builder = "builtin:fetchurl";
      url = "https://example.invalid/fetched-1.0.tar.gz";
      urls = [ "https://example.invalid/fetched-1.0.tar.gz" ];
      unpack = false;
      executable = false;
    }
  );
  needs-kvm = sh "needs-kvm-1.0" "echo >$out" { requiredSystemFeatures = [ "kvm" ]; };
  slow = sh "slow-1.0" "for i in $(seq 600); do echo slow $i; sleep 1; done; echo >$out" { };
  large = sh "large-1.0" "dd if=/dev/zero of=$out bs=1M" { };

  # The shape of a nixpkgs for which there is no cache.
  fake-world =
    let
      stage =
        n:
        sh "bootstrap-stage${toString n}-gcc-1.0" "echo >$out" (
          if n == 0 then { } else { below = stage (n - 1); }
        );
    in
    sh "world-1.0" "echo >$out" { stdenv = stage 150; };
}
// (
  if old then
    {
      nixos-generators = sh "nixos-generators-0.0-fixture" ''
        mkdir -p $out/share
        cp -r ${./nixos-generators} $out/share/nixos-generator
      '' { };
    }
  else
    { }
)
