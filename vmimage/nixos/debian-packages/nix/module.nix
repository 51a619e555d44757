# The one module that the test tree adds to NixOS's: every way in which a system of the test set differs, with its reason.
# A TEST SET with Debian's binaries: never published, not NixOS.
{
  config,
  lib,
  options,
  pkgs,
  ...
}:
{
  config = lib.mkIf (pkgs ? debian-usr) {
    system.nixos.distroName = "TEST SET, NixOS modules with Debian binaries,";

    # Programs in Rust, for which no Debian package exists: nsncd (Debian's glibc finds its NSS modules by rpath) and
    # switch-to-configuration.
    services.nscd.enable = false;
    system.nssModules = lib.mkForce [ ];
    system.switch.enable = false;
    # Debian's kbd has no keymaps.
    console.enable = false;
    # The manual's tools are Python packages.
    documentation.nixos.enable = false;
    # On by default, and not in the set: GLib and polkit, fonts, logrotate, sudo, what desktops need; dhcpcd, in whose place networkd asks for addresses.
    services.logrotate.enable = lib.mkDefault false;
    environment.stub-ld.enable = lib.mkDefault false;
    security.sudo.enable = lib.mkDefault false;
    xdg = lib.genAttrs [ "autostart" "icons" "menus" "mime" "sounds" ] (_: {
      enable = lib.mkDefault false;
    });
    networking.useNetworkd = lib.mkDefault true;
    services.udisks2.enable = lib.mkDefault false;
    fonts.fontconfig.enable = lib.mkDefault false;
    fonts.enableDefaultPackages = lib.mkDefault false;

    # An image is compressed in an emulated VM here: at NixOS's own level, 19, for most of an hour.
    ${if options ? isoImage then "isoImage" else null}.squashfsCompression = lib.mkDefault "zstd -Xcompression-level 1";
    # Debian's nix names its own static shell.
    nix.settings.sandbox-paths = [ "/bin/sh=${pkgs.busybox-sandbox-shell}/bin/busybox" ];
    # zram-generator finds its programs by PATH.
    systemd.generatorPath = [
      pkgs.kmod
      pkgs.systemd
    ];

    # Debian's binaries have paths below /usr compiled in: in stage 1 …
    boot.initrd.systemd = lib.mkIf config.boot.initrd.systemd.enable {
      storePaths = [ "${pkgs.coreutils}/bin/readlink" ];
      initrdBin = [
        pkgs.kmod
        pkgs.util-linux
      ];
      contents = {
        "/usr/lib/systemd".source = "${pkgs.debian-usr}/lib/systemd-initrd";
        "/usr/lib/udev/rules.d".source = "${pkgs.systemd}/lib/udev/rules.d";
        "/usr/lib/udev/ata_id".source = "${pkgs.systemd}/lib/udev/ata_id";
        "/usr/lib/udev/cdrom_id".source = "${pkgs.systemd}/lib/udev/cdrom_id";
        "/usr/lib/udev/scsi_id".source = "${pkgs.systemd}/lib/udev/scsi_id";
        "/usr/lib/modules".source = "${config.system.build.modulesClosure}/lib/modules";
      };
    };
    # … and in the system.
    system.activationScripts.debian-usr.text = ''
      mkdir -p /usr/lib/x86_64-linux-gnu /usr/libexec /usr/share /usr/sbin /usr/bin /lib /run/sshd
      ln -sfn ${pkgs.debian-usr}/bin/* /usr/bin/
      ln -sfn ${pkgs.debian-usr}/bin/* /usr/sbin/
      ln -sfn /run/booted-system/kernel-modules/lib/modules /usr/lib/modules
      ln -sfn /usr/lib/modules /lib/modules
      ln -sfn ${pkgs.debian-usr}/lib/systemd /usr/lib/systemd
      mkdir -p /usr/lib/udev/rules.d
      ln -sfn $(ls -d ${pkgs.systemd}/lib/udev/* | grep -v '/rules.d$') /usr/lib/udev/
      cp -Lf ${pkgs.systemd}/lib/udev/rules.d/* ${config.environment.etc."udev/rules.d".source}/* /usr/lib/udev/rules.d/
      ln -sfn ${pkgs.openssh}/lib/openssh /usr/lib/openssh
      ln -sfn ${config.nix.package}/libexec/nix /usr/libexec/nix
      ln -sfn ${pkgs.iptables}/lib/xtables /usr/lib/x86_64-linux-gnu/xtables
      ln -sfn /etc/dbus-1 /usr/share/dbus-1
      ln -sfn ${pkgs.tzdata}/share/zoneinfo /usr/share/zoneinfo
      ln -sfn ${pkgs.linux-pam}/bin/unix_chkpwd /usr/sbin/unix_chkpwd
    '';

    # udevd of systemd 260 to 262 takes its rules for changed at every few events where their folder is a link: it reads them
    # all and ends its workers, which under emulation takes longer than devices are waited for. A real folder (above; in stage 1
    # make-initrd-ng.pl makes it).
    environment.etc."udev/rules.d".enable = lib.mkForce false;

    # The disk with this set's sources, a cache of its paths and the build container's /usr, where a VM has it.
    systemd.mounts = [
      {
        what = "/dev/disk/by-id/virtio-proof";
        where = "/proof";
        type = "squashfs";
        options = "ro";
        before = [ "nix-daemon.service" ];
      }
    ];
    services.udev.extraRules = ''
      SUBSYSTEM=="block", ATTR{serial}=="proof", TAG+="systemd", ENV{SYSTEMD_WANTS}+="proof.mount"
    '';
  };
}
