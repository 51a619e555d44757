args: import ../../../nixos/lib/eval-config.nix (args // { old = true; })
