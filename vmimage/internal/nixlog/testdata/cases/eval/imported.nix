{ value = import ./undefined.nix; }
