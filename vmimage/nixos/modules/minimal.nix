# What a builder does without. (profiles/minimal.nix of 24.05 would rebuild the world.)
{ lib, options, ... }:
let
  # Those of the names that this release has.
  off =
    known: names: lib.genAttrs (lib.filter (name: known ? ${name}) names) (_: { enable = false; });
in
{
  documentation = {
    enable = false;
    # Each of them goes by a switch of its own, too.
    doc.enable = false;
    info.enable = false;
    man.enable = false;
    nixos.enable = false;
  };
  environment = {
    defaultPackages = lib.mkForce [ ];
  }
  # Absent before 24.05.
  // lib.optionalAttrs (options.environment ? stub-ld) { stub-ld.enable = false; };
  fonts.fontconfig.enable = false;
  programs = off options.programs [
    "command-not-found"
    "nano"
  ]
  // {
    less.lessopen = null;
  };
  boot.enableContainers = false;
  security = {
    sudo.enable = false;
    polkit.enable = lib.mkForce false;
  };
  services = {
    logrotate.enable = false;
    udisks2.enable = false;
  };
  systemd = {
    coredump.enable = false;
    # Nobody has told it what it may kill; nix-daemon and the jobs have limits of their own.
    oomd.enable = false;
  };
  system.disableInstallerTools = true;
  xdg = off options.xdg [
    "autostart"
    "icons"
    "mime"
    "sounds"
  ];
}
