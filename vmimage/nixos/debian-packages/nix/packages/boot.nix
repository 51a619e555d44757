# The kernel and the boot loaders.
{ lib, wrap, final, prev, ... }:
let
  inherit (wrap) package run stub deb;
  modDirVersion = lib.removePrefix "linux-modules-" (
    lib.head (lib.filter (lib.hasPrefix "linux-modules-") (lib.attrNames wrap.debs))
  );
  version = lib.head (lib.splitString "+" modDirVersion);
  modules = name: "${deb "linux-${name}-${modDirVersion}"}/usr/lib/modules/${modDirVersion}";
  # No virtual machine has these.
  absent = [
    "sound"
    "drivers/{media,infiniband,staging,iio,isdn,comedi,hwmon,platform,video,accel}"
    "drivers/net/{wireless,can,ieee802154}"
    "drivers/gpu/drm/{amd,nouveau,i915,xe,radeon,gma500}"
    "net/{wireless,mac80211,bluetooth,can,nfc,ieee802154}"
  ];
  kernel = package "linux" [ ] {
    inherit version;
    # Modules unpacked, as those of nixpkgs' kernels are.
    post = ''
      mkdir -p $out/lib/modules
      cd $out/lib/modules
      cp -a ${modules "modules"} .
      chmod -R u+w .
      cd ${modDirVersion}
      cp -a ${modules "base"}/. .
      cp ${modules "binary"}/vmlinuz $out/bzImage
      rm -f vmlinuz
      ${lib.concatMapStrings (x: "rm -rf kernel/${x}\n") absent}
      find kernel -name '*.ko.xz' -print0 | xargs -0 -r -P2 -n50 xz -d
      find kernel -name '*.ko.zst' -print0 | xargs -0 -r zstd -q -d --rm
      cp System.map* $out/System.map 2>/dev/null || true
      rm -f System.map*
      /usr/sbin/depmod -b $out ${modDirVersion} 2>&1 | tail -2
      rm -rf $out/bin $out/sbin
    '';
    attrs = {
      inherit version modDirVersion;
      target = "bzImage";
      isZen = false;
      isHardened = false;
      isLibre = false;
      kernelOlder = lib.versionOlder version;
      # Debian's squashfs, which always uses several threads, can't choose them as a mount option. NixOS asks for that from
      # 6.2 on.
      kernelAtLeast = wanted: wanted != "6.2" && lib.versionAtLeast version wanted;
      features = {
        ia32Emulation = true;
        netfilterRPFilter = true;
        efiBootStub = true;
      };
      # Debian's kernel has it all, as a rule in modules.
      config = lib.genAttrs [ "isEnabled" "isYes" "isModule" "isSet" ] (_: _: true) // {
        isNo = _: false;
        isDisabled = _: false;
        getValue = _: "y";
      };
      configfile = "${modules "base"}/config";
      buildDTBs = false;
      DTB = false;
      commonMakeFlags = [ ];
      kernelPatches = [ ];
      randstructSeed = "";
    };
  };
  linuxPackages = lib.makeExtensible (_: {
    inherit kernel;
    inherit (kernel) kernelAtLeast kernelOlder;
    inherit (prev) stdenv;
    recurseForDerivations = false;
  });
  grub = package "grub" [ "grub-common" "grub2-common" "grub-pc-bin" "grub-efi-amd64-bin" "grub-efi-amd64-unsigned" ] {
    post = ''
      rm -rf $out/etc
      cd $out/lib/grub/x86_64-efi
      # Absent in Debian. Any module will do that is not in the image under its own name, too.
      [ -e gfxterm_menu.mod ] || cp hello.mod gfxterm_menu.mod
    '';
    attrs = {
      grubTarget = "i386-pc";
      efiSupport = false;
    };
  };
  qemu =
    package "qemu" [ "qemu-user" "qemu-guest-agent" ] {
      post = "rm -rf $out/etc $out/lib/systemd $out/lib/udev";
      attrs.ga = qemu;
    }
    // {
      pname = "qemu-user";
    };
in
{
  inherit linuxPackages;
  linuxPackages_latest = linuxPackages;
  linuxKernel = prev.linuxKernel // {
    packages.linux_default = linuxPackages;
  };
  linuxHeaders = stub "linux-headers" { };
  kmod-blacklist-ubuntu = stub "kmod-blacklist" { buildCommand = "mkdir $out; : >$out/modprobe.conf"; };
  kmod-debian-aliases = stub "kmod-debian-aliases" { buildCommand = ": >$out"; };

  inherit grub;
  grub2 = grub;
  grub2_efi = grub // {
    grubTarget = "x86_64-efi";
  };
  grub2_pvgrub_image = grub;
  nixos-grub2-theme = stub "grub2-theme" { buildCommand = "mkdir $out; echo 'desktop-color: \"#000000\"' >$out/theme.txt"; };
  refind = stub "refind" { buildCommand = "mkdir -p $out/share/refind; : >$out/share/refind/refind_x64.efi"; };
  memtest86plus = stub "memtest86plus" { };
  syslinux = package "syslinux" [ "syslinux" "syslinux-utils" "syslinux-common" "isolinux" ] {
    post = ''
      mkdir -p $out/share/syslinux
      cp -r ${deb "syslinux-common"}/usr/lib/syslinux/modules/bios/. $out/share/syslinux/
      cp -r ${deb "syslinux-common"}/usr/lib/syslinux/mbr/. ${deb "isolinux"}/usr/lib/ISOLINUX/. $out/share/syslinux/
      rm -rf $out/lib/syslinux $out/lib/ISOLINUX
    '';
  };

  inherit qemu;
  qemu_kvm = qemu;
  qemu-user = qemu;
  # NixOS's own C programs are compiled by Debian's gcc, static.
  pkgsStatic = final // {
    callPackage =
      f: args:
      final.callPackage f (
        args
        // {
          stdenv = prev.stdenv // {
            mkDerivation =
              a:
              prev.stdenv.mkDerivation (
                a
                // {
                  installPhase = "CC='gcc -static'\n" + a.installPhase;
                  dontFixup = true;
                }
              );
          };
        }
      );
    qemu-user = qemu;
  };
  srcOnly =
    x:
    if x ? libc then
      run {
        name = "unsecvars";
        buildCommand = "mkdir $out; cp ${../unsecvars.h} $out/unsecvars.h";
      }
    else
      prev.srcOnly x;
  # Not an empty file: with one udevd takes its rules for changed every three seconds, reads them all and ends its workers.
  bcache-tools = stub "bcache-tools" {
    buildCommand = "mkdir -p $out/lib/udev/rules.d $out/bin; echo '# none' >$out/lib/udev/rules.d/69-bcache.rules";
  };
}
