{ value = import ./not-there.nix; }
