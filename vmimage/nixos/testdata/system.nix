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
  inherit (evaluated) config options pkgs;
  inherit (pkgs) lib;
  ours = lib.filterAttrs (name: _: name == "root" || name == "builder" || lib.hasPrefix "job-" name) config.users.users;
in
{
  iso = config.system.build.isoImage.drvPath;
  release = config.system.nixos.release;
  inherit (config) warnings;
  failed = map (a: a.message) (lib.filter (a: !a.assertion) config.assertions);

  facts = {
    users = lib.mapAttrs (_: user: {
      inherit (user)
        uid
        group
        extraGroups
        home
        createHome
        hashedPassword
        ;
      shell = baseNameOf (toString user.shell);
      keys = user.openssh.authorizedKeys.keys ++ map toString user.openssh.authorizedKeys.keyFiles;
    }) ours;
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
    kernelParams = lib.filter (p: !(lib.hasPrefix "root=" p)) config.boot.kernelParams;
    initrdModules = lib.filter (m: lib.elem m config.boot.initrd.availableKernelModules) [
      "xhci_pci"
      "usb_storage"
      "uas"
      "sd_mod"
      "sr_mod"
      "virtio_scsi"
      "virtio_blk"
      "virtio_pci"
      "virtio_net"
      "squashfs"
      "iso9660"
    ];
    initrd = {
      inherit (config.boot.initrd.systemd) enable emergencyAccess suppressedUnits;
    };
    image = {
      inherit (config.isoImage) makeEfiBootable makeUsbBootable volumeID;
      bios = config.isoImage.makeBiosBootable or pkgs.stdenv.hostPlatform.isx86;
    };
    suppressed = config.systemd.suppressedSystemUnits;
    ports = config.networking.firewall.allowedTCPPorts;
    penalties = lib.versionAtLeast (lib.getVersion config.programs.ssh.package) "9.8";
    tools = lib.sort (a: b: a < b) (
      lib.unique (map lib.getName (lib.filter lib.isDerivation config.environment.systemPackages))
    );
  };
}
