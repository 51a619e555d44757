# nixpkgs + a NixOS configuration + a format -> the image's derivation, and what
# is to be said about it. One evaluation answers all: it costs seconds.
#
# Where this nixpkgs has image.modules (25.05 and later), the format's module is
# merged with the configuration, so that the configuration may itself set
# isoImage.* and the like; it is the same derivation that upstream's
# system.build.images.FORMAT would be. Older ones go through nixos-generators as
# that nixpkgs packages it: the first evaluation names its derivation, the
# second is given what was built.
{
  nixpkgs, # path, as a string
  configuration, # path of the user's file, as a string
  system,
  format ? null,
  attribute ? null, # instead of a format: this attribute of the configuration, with no module added
  generators ? null, # nixos-generators, built
}:
let
  lib = import (nixpkgs + "/lib");
  evalConfig = import (nixpkgs + "/nixos/lib/eval-config.nix");
  # As a path: so errors name the file.
  user = /. + configuration;

  # All that is known of a format. More of them: another line here, and its name
  # in the Go table of formats.
  formats = {
    iso = {
      upstream = "iso";
      generators = "iso";
      modules = [
        bootable
        live
      ];
    };
    install-iso = {
      upstream = "iso-installer";
      generators = "install-iso";
      modules = [
        bootable
        live
      ];
    };
  };
  chosen =
    formats.${format}
      or (throw "osbuilder: unsupported format '${format}'; there are: ${toString (builtins.attrNames formats)}");

  # Upstream's bare iso starts by BIOS and from a CD only.
  bootable =
    { lib, ... }:
    {
      isoImage.makeEfiBootable = lib.mkDefault true;
      isoImage.makeUsbBootable = lib.mkDefault true;
    };

  # A live system has no disks of its own: a configuration that was written for
  # an installed machine would wait at boot for disks that are not there.
  live =
    {
      config,
      lib,
      options,
      ...
    }:
    let
      # Just above mkImageMediaOverride, which the installer's module itself uses
      # for some of these: definitions of one priority would be merged.
      off = lib.mkOverride 59;
      loader = options.boot.loader;
    in
    {
      fileSystems = off (config.lib.isoFileSystems // kept);
      swapDevices = off [ ];
      boot.initrd.luks.devices = off { };
      boot.resumeDevice = off "";
      boot.loader = {
        systemd-boot.enable = off false;
        generic-extlinux-compatible.enable = off false;
        efi.canTouchEfiVariables = off false;
      }
      # Others, where this nixpkgs has them.
      // lib.optionalAttrs (loader ? limine) { limine.enable = off false; }
      # isolinux takes 0 for "wait for ever".
      // lib.optionalAttrs (written.boot.loader.timeout == 0) { timeout = off 1; };
      # It fails where there is no such file system.
      services = lib.optionalAttrs (options.services ? btrfs) { btrfs.autoScrub.enable = off false; };
    };

  # Mounts that need no disk of this machine stay.
  diskless = [
    "9p"
    "cephfs"
    "cifs"
    "nfs"
    "nfs4"
    "ramfs"
    "smb3"
    "sshfs"
    "tmpfs"
    "virtiofs"
  ];
  images = [
    "/"
    "/boot"
    "/iso"
    "/nix"
    "/nix/store"
  ];
  keep = mount: fs: builtins.elem fs.fsType diskless && !builtins.elem mount images && !lib.hasPrefix "/nix/." mount;
  kept = lib.mapAttrs (
    _: fs:
    lib.filterAttrs (name: value: value != null && builtins.elem name [ "device" "fsType" "options" "neededForBoot" ]) fs
  ) (lib.filterAttrs keep written.fileSystems);

  # --- the configuration ---

  upstreamFile = nixpkgs + "/nixos/modules/image/images.nix";
  base = evalConfig {
    inherit system;
    # Reduced nixpkgs have the file without listing it; the module system takes it once.
    modules = [ user ] ++ lib.optional (format != null && builtins.pathExists upstreamFile) (/. + upstreamFile);
  };
  # The configuration as it was written, before it became an image. It may set
  # options that only the format's module declares: unknown ones are no error here.
  loose = base.extendModules { modules = [ { _module.check = false; } ]; };
  written = loose.config;
  hasVariants = loose.options ? image.modules;

  variant = base.extendModules {
    modules = [
      (written.image.modules.${chosen.upstream}
        or (throw "osbuilder: unsupported: this nixpkgs makes no '${chosen.upstream}' images")
      )
    ]
    ++ chosen.modules;
  };

  share = generators + "/share/nixos-generator";
  generatedFormat = share + "/formats/${chosen.generators}.nix";
  generated =
    (import (share + "/nixos-generate.nix") {
      inherit nixpkgs system;
      configuration = user;
      formatConfig =
        if builtins.pathExists generatedFormat then
          generatedFormat
        else
          throw "osbuilder: unsupported: this nixpkgs' nixos-generators has no format '${chosen.generators}'";
    }).extendModules
      { modules = chosen.modules; };

  # --- what was overridden, in words ---

  said =
    image:
    let
      was = written;
      is = image.config;
      source =
        fs:
        if fs.device or null != null then
          fs.device
        else if fs.label or null != null then
          "label ${fs.label}"
        else
          fs.fsType;
      mounts = lib.concatMap (
        mount:
        let
          old = was.fileSystems.${mount};
          new = is.fileSystems.${mount} or null;
          what = "fileSystems.\"${mount}\" (${source old}, ${old.fsType})";
        in
        if new == null then
          [ "${what}: not mounted" ]
        else if new.fsType != old.fsType || new.device != old.device then
          [ "${what}: the image's own, ${new.fsType}" ]
        else
          [ ]
      ) (builtins.attrNames was.fileSystems);
      swaps = map (swap: "swapDevices (${swap.device}): not used") was.swapDevices;
      luks = map (name: "boot.initrd.luks.devices.${name}: not opened") (
        builtins.attrNames was.boot.initrd.luks.devices
      );
      loader = was.boot.loader;
      loaders =
        lib.optional (loader.systemd-boot.enable && !is.boot.loader.systemd-boot.enable) "boot.loader.systemd-boot: the image brings its own boot loader"
        ++
          lib.optional (loader.grub.enable && loader.grub.devices != [ ] && !is.boot.loader.grub.enable)
            "boot.loader.grub (${toString loader.grub.devices}): the image brings its own boot loader"
        ++
          lib.optional (
            loader.generic-extlinux-compatible.enable && !is.boot.loader.generic-extlinux-compatible.enable
          ) "boot.loader.generic-extlinux-compatible: the image brings its own boot loader"
        ++
          lib.optional (loader ? limine && loader.limine.enable && !is.boot.loader.limine.enable)
            "boot.loader.limine: the image brings its own boot loader"
        ++
          lib.optional (loader.timeout == 0 && is.boot.loader.timeout != 0)
            "boot.loader.timeout = 0: 1 second, since the image's boot loader would wait for ever";
      resume = lib.optional (
        was.boot.resumeDevice != is.boot.resumeDevice
      ) "boot.resumeDevice (${was.boot.resumeDevice}): nothing to resume from";
      scrub = lib.optional (was.services.btrfs.autoScrub.enable or false) "services.btrfs.autoScrub: no disk to scrub";
    in
    mounts ++ swaps ++ luks ++ loaders ++ resume ++ scrub;

  # --- the answer ---

  describe = image: derivation: method: {
    inherit method;
    derivation = derivation.drvPath;
    # Where it is built; a configuration may itself ask for another system than the flag.
    inherit (derivation) system;
    host = image.pkgs.stdenv.hostPlatform.system;
    filePath =
      let
        path = derivation.passthru.filePath or image.config.image.filePath or null;
      in
      if builtins.isString path then path else null;
    overridden = if format == null then [ ] else said image;
  };

  byAttribute =
    let
      found = lib.attrByPath (lib.splitString "." attribute) null base;
    in
    if found ? drvPath then found else throw "osbuilder: the evaluated configuration has no derivation '${attribute}'";
in
if attribute != null then
  describe base byAttribute "attribute"
else if hasVariants then
  describe variant variant.config.system.build.image "image.modules"
else if generators != null then
  describe generated generated.config.system.build.${generated.config.formatAttr} "nixos-generators"
else
  {
    method = "nixos-generators";
    # Only text is taken from it: so the builder's own system.
    generators =
      (import nixpkgs { }).nixos-generators.drvPath or (throw
        "osbuilder: unsupported: this nixpkgs has neither image.modules (25.05 and later) nor nixos-generators"
      );
  }
