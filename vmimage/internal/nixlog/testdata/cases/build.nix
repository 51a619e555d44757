# Derivations without nixpkgs: the builder is the container's own shell.
let
  sh =
    name: script: more:
    derivation (
      {
        inherit name;
        system = builtins.currentSystem;
        builder = "/bin/sh";
        PATH = "/bin:/usr/bin";
        args = [
          "-c"
          script
        ];
      }
      // more
    );
in
rec {
  fail = sh "broken-1.0" ''
    echo compiling main.c
    echo "main.c:3: error: expected ';'" >&2
    exit 2
  '' { };
  dependency = sh "middle-1.0" "cat $fail > $out" { inherit fail; };
  dependents = sh "top-1.0" "cat $middle > $out" { middle = dependency; };
  killed = sh "shot-1.0" "echo before; kill -9 $$" { };
  segfault = sh "crash-1.0" "echo before; kill -11 $$" { };
  foreign = sh "arm-1.0" "echo > $out" { system = "aarch64-linux"; };
  feature = sh "vm-1.0" "echo > $out" { requiredSystemFeatures = [ "kvm" ]; };
  hash = sh "source-1.0.tar.gz" "echo surprise > $out" {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000";
  };
  slow = sh "slow-1.0" "echo working; sleep 60" { };
  empty = sh "empty-1.0" "echo made nothing" { };
  fetch = derivation {
    name = "fetched-1.0.tar.gz";
    system = "builtin";
    builder = "builtin:fetchurl";
    url = "https://example.invalid/fetched-1.0.tar.gz";
    urls = [ "https://example.invalid/fetched-1.0.tar.gz" ];
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000";
    unpack = false;
    executable = false;
  };
  curl = sh "page.html" ''
    echo "curl: (6) Could not resolve host: example.invalid" >&2
    echo "error: cannot download page.html from any mirror" >&2
    exit 1
  '' {
    outputHashMode = "flat";
    outputHashAlgo = "sha256";
    outputHash = "0000000000000000000000000000000000000000000000000000";
  };
  forkless = sh "forkless-1.0" ''
    echo "/bin/sh: fork: Cannot allocate memory" >&2
    exit 1
  '' { };
  hungry = sh "hungry-1.0" ''
    echo eating
    exec perl -e 'my @a; push @a, "x" x 10_000_000 while 1'
  '' { };
  disk = sh "large-1.0" ''
    echo filling
    dd if=/dev/zero of=$out bs=1M count=100
  '' { };
  parallel = sh "all-1.0" "cat $one $two $three > $out" {
    one = sh "one-1.0" ''
      printf '@nix { "action": "setPhase", "phase": "buildPhase" }\n' >&2
      for i in 1 2 3; do echo "one says $i"; sleep 0.3; done
      printf '\033[1;31mred\033[0m and 10%%\r20%%\r100%%\n'
      printf 'tab\there, bell\007, bytes \377\376\n'
      echo one > $out
    '' { };
    two = sh "two-1.0" "for i in 1 2 3; do echo two says $i; sleep 0.3; done; echo two > $out" { };
    three = sh "three-1.0" "echo 'no newline at the end' > $out; printf 'last words'" { };
  };
  after = sh "after-1.0" "echo > $out" { };
  # Made in advance and served by a cache in a folder.
  cached = sh "cached-1.0" "mkdir $out; for i in 1 2 3 4; do head -c 200000 /dev/urandom > $out/$i; done" { };
  fromCache = sh "wants-cached-1.0" "cat $cached/1 > $out" { inherit cached; };
  world =
    let
      stage = n: sh "bootstrap-stage${toString n}-gcc-1.0" "echo > $out" { below = if n == 0 then fetch else stage (n - 1); };
    in
    sh "nixos.iso" "echo > $out" { stdenv = stage 4; };
}
