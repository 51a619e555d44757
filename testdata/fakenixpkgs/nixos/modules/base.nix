# The options that a small configuration sets, and those that image-build overrides.
{
  config,
  lib,
  pkgs,
  ...
}:
let
  inherit (lib) mkOption mkEnableOption types;
  option =
    type: default:
    mkOption { inherit type default; };
in
{
  options = {
    assertions = option (types.listOf types.raw) [ ];
    warnings = option (types.listOf types.str) [ ];
    lib = option (types.lazyAttrsOf types.raw) { };
    nixpkgs.system = mkOption { type = types.str; };
    nixpkgs.hostPlatform = option (types.nullOr types.str) null;

    networking.hostName = option types.str "fixture";
    time.timeZone = option (types.nullOr types.str) null;
    users.users = option (types.attrsOf types.raw) { };
    services.openssh.enable = mkEnableOption "sshd";
    services.openssh.ports = option (types.listOf types.int) [ 22 ];
    environment.systemPackages = option (types.listOf types.package) [ ];
    environment.etc = option (types.attrsOf types.raw) { };

    fileSystems = option (types.attrsOf (
      types.submodule {
        device = option (types.nullOr types.str) null;
        label = option (types.nullOr types.str) null;
        fsType = option types.str "auto";
        options = option (types.listOf types.str) [ "defaults" ];
        neededForBoot = option types.bool false;
      }
    )) { };
    swapDevices = option (types.listOf types.raw) [ ];

    boot.marker = option types.str "";
    boot.resumeDevice = option types.str "";
    boot.kernelParams = option (types.listOf types.str) [ ];
    boot.initrd.luks.devices = option (types.attrsOf types.raw) { };
    boot.initrd.availableKernelModules = option (types.listOf types.str) [ ];
    boot.loader = {
      timeout = option (types.nullOr types.int) 5;
      systemd-boot.enable = mkEnableOption "systemd-boot";
      generic-extlinux-compatible.enable = mkEnableOption "extlinux";
      efi.canTouchEfiVariables = option types.bool false;
      grub.enable = option types.bool true;
      grub.device = option types.str "";
      grub.devices = option (types.listOf types.str) [ ];
    };

    system.stateVersion = option types.str "0.0";
    system.build = option (types.lazyAttrsOf types.raw) { };
  };

  config = {
    boot.loader.grub.devices = lib.mkIf (config.boot.loader.grub.device != "") [ config.boot.loader.grub.device ];
    system.build.toplevel =
      let
        failed = map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
      in
      if failed != [ ] then
        throw "\nFailed assertions:\n${lib.concatMapStringsSep "\n" (m: "- ${m}") failed}"
      else
        pkgs.sh "fixture-system-${config.networking.hostName}" ''
          mkdir $out
          printf '%s\n' "$host" >$out/hostname
          printf '%s\n' "$marker" >$out/marker
          printf '%s\n' $packages >$out/packages
          printf '%s\n' "$mounts" >$out/mounts
        '' {
          host = config.networking.hostName;
          inherit (config.boot) marker;
          packages = config.environment.systemPackages;
          mounts = builtins.toJSON config.fileSystems;
        };
  };
}
