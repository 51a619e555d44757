# The builder VM, as NixOS builds it. One source for NixOS 24.05 and later, x86_64 and aarch64.
# Nothing secret is in here: keys and settings of the site come with each boot (modules/settings.nix).
{
  imports = [
    ./modules/iso.nix
    ./modules/console.nix
    ./modules/minimal.nix
    ./modules/network.nix
    ./modules/power.nix
    ./modules/users.nix
    ./modules/settings.nix
    ./modules/ssh.nix
    ./modules/store.nix
    ./modules/nix.nix
    ./modules/systems.nix
    ./modules/tools.nix
    ./modules/runner.nix
  ];
}
