# Stands in for NixOS: whatever the modules say, the "ISO" is a few bytes that name the sources that it was made from. It
# boots nowhere. The build waits for as long as /fixture/wait is there.
{ system, modules, ... }:
let
  sources = builtins.path {
    path = dirOf (builtins.head modules);
    name = "sources";
  };
in
{
  pkgs.stdenv.hostPlatform = { inherit system; };
  config.system.build.isoImage = derivation {
    name = "fixture.iso";
    inherit system;
    PATH = "/usr/bin:/bin";
    builder = "/bin/sh";
    args = [
      "-ec"
      ''
        echo "FIXTURE is being built"
        # As a builder that is root may: archives hold the names of owners, and what is copied may deny writing.
        mkdir t && echo x >t/x && chown 1000:100 t/x && chmod 555 t && echo y >t/y && chmod 755 t
        [ ! -e /fixture/wait ] || echo "FIXTURE waits"
        while [ -e /fixture/wait ]; do sleep 0.1; done
        mkdir -p $out/iso $out/nix-support
        { head -c 32769 /dev/zero; printf 'CD001 FIXTURE '; cat ${sources}/configuration.nix; head -c 3000000 /dev/zero; } >$out/iso/fixture.iso
        echo "file iso $out/iso/fixture.iso" >$out/nix-support/hydra-build-products
      ''
    ];
  };
}
