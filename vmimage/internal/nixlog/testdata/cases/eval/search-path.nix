{ value = import <nixos-unstable> { }; }
