# The builder VM, evaluated for scripts/check-nixos.sh: what the modules decided, as data. The texts that come into the image
# are read from its derivations.
{ nixpkgs, system }:
let
  evaluated = import (nixpkgs + "/nixos/lib/eval-config.nix") {
    inherit system;
    modules = [
      ../configuration.nix
      ./gaps.nix
    ];
  };
  inherit (evaluated) config pkgs;
  inherit (pkgs) lib;
  ours = lib.filterAttrs (name: _: name == "root" || name == "builder" || lib.hasPrefix "job-" name) config.users.users;
in
{
  iso = config.system.build.isoImage.drvPath;
  release = config.system.nixos.release;

  facts = {
    users = lib.mapAttrs (
      _: user:
      lib.concatStringsSep " " [
        (toString user.uid)
        user.group
        user.home
        (lib.boolToString user.createHome)
        user.hashedPassword
        (lib.getName (if lib.isDerivation user.shell then user.shell else baseNameOf user.shell))
        (toString (
          user.extraGroups
          ++ user.openssh.authorizedKeys.keys
          ++ map toString user.openssh.authorizedKeys.keyFiles
        ))
      ]
    ) ours;
    # Of all others: whoever could log in by a password or a key, or shares a number with ours.
    strangers = lib.attrNames (
      lib.filterAttrs (
        name: user:
        !(ours ? ${name})
        && (
          !(lib.elem user.hashedPassword [
            null
            "!"
            "*"
          ])
          || user.password or null != null
          || user.initialPassword or null != null
          || user.hashedPasswordFile or null != null
          || user.openssh.authorizedKeys.keys != [ ]
          || user.isNormalUser
        )
      ) config.users.users
    );
    groups = lib.mapAttrs (_: group: group.gid) {
      inherit (config.users.groups) builder jobs nixbld;
    };
    mutableUsers = config.users.mutableUsers;
    fileSystems = lib.mapAttrs (_: fs: fs.fsType) config.fileSystems;
    swap = config.swapDevices;
    # Those that decide on consoles and shells, and whatever else is none of nixpkgs' usual ones.
    kernelParams = lib.filter (
      p: !(lib.any (known: lib.hasPrefix known p) [ "root=" "loglevel=" "lsm=" ])
    ) config.boot.kernelParams;
    missingModules = lib.subtractLists config.boot.initrd.availableKernelModules [
      "xhci_pci"
      "usb_storage"
      "uas"
      "sd_mod"
      "sr_mod"
      "virtio_scsi"
      "virtio_blk"
      "virtio_pci"
      "squashfs"
      "iso9660"
    ];
    initrd = {
      inherit (config.boot.initrd.systemd) emergencyAccess suppressedUnits;
    };
    image = {
      inherit (config.isoImage) makeEfiBootable makeUsbBootable;
      bios = config.isoImage.makeBiosBootable or pkgs.stdenv.hostPlatform.isx86;
    };
    suppressed = config.systemd.suppressedSystemUnits;
    ports = config.networking.firewall.allowedTCPPorts;
    # What runs beside the jobs and must not.
    enabled = lib.filterAttrs (_: on: on) {
      sudo = config.security.sudo.enable;
      polkit = config.security.polkit.enable;
      oomd = config.systemd.oomd.enable;
      coredump = config.systemd.coredump.enable;
      emergencyMode = config.systemd.enableEmergencyMode;
      gc = config.nix.gc.automatic;
      channel = config.nix.channel.enable;
    };
    disabled = lib.filterAttrs (_: on: !on) {
      sshd = config.services.openssh.enable;
      timesyncd = config.services.timesyncd.enable;
      firewall = config.networking.firewall.enable;
      networkd = config.systemd.network.enable;
      nix = config.nix.enable;
    };
    getty = map (unit: unit.name or unit) (
      lib.filter (name: config.systemd.units.${name}.enable && lib.hasInfix "getty" name && !(lib.hasInfix "getty-pre" name)) (
        lib.attrNames config.systemd.units
      )
    );
    etc = {
      image = config.environment.etc."osbuilder-image".source;
    };
    generators = lib.filterAttrs (_: path: path == "/dev/null") config.systemd.generators;
    missingTools = lib.subtractLists (map lib.getName (
      lib.filter lib.isDerivation config.environment.systemPackages
    )) (
      [
        "osbuilder-programs"
        "inotify-tools"
        "nix"
        "git"
        "jq"
        "curl"
        "gnutar"
        "xz"
        "zstd"
        "cpio"
        "squashfs"
        "libisoburn"
        "mtools"
        "dosfstools"
      ]
      ++ lib.optional (pkgs ? nixos-generators) "nixos-generators"
    );
  };

  # What gaps.nix stood in for: nothing in a whole tree.
  gaps =
    let
      listed = map toString (import (nixpkgs + "/nixos/modules/module-list.nix"));
    in
    lib.filter (file: !(lib.elem "${toString nixpkgs}/nixos/modules/${file}" listed)) (
      lib.filter (file: builtins.pathExists (nixpkgs + "/nixos/modules/${file}")) [
        "image/images.nix"
        "tasks/filesystems/overlayfs.nix"
      ]
    )
    ++ lib.optional (!(pkgs.haskellPackages ? ShellCheck)) "shellcheck"
    ++ lib.optional (!(pkgs ? spice)) "qemu-user"
    ++ lib.optional (!(pkgs ? roboto)) "roboto (so no manual, and no installer's image)"
    ++ lib.optional (!(pkgs ? nixos-generators)) "nixos-generators (left out)";

  # What decides which lines of expected.txt count.
  tags = [ system ]
    ++ lib.optional config.boot.initrd.systemd.enable "systemd-stage-1"
    ++ lib.optional (!config.boot.initrd.systemd.enable) "scripted-stage-1"
    ++ lib.optional (lib.versionAtLeast (lib.getVersion config.programs.ssh.package) "9.8") "penalties"
    ++ lib.optional (lib.versionOlder (lib.getVersion config.nix.package) "2.30") "old-nix";
}
