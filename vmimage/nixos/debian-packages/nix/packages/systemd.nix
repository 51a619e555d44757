# systemd and what belongs to it.
{ lib, wrap, final, ... }:
let
  inherit (wrap) package run stub;
  each = names: value: lib.genAttrs names (_: value);
  kmod = package "kmod" [ "kmod" "libkmod2" ] { };
  systemd = package "systemd" [ "libsystemd-shared" "libsystemd0" "libudev1" "systemd" "udev" "systemd-timesyncd" "systemd-resolved" "libnss-systemd" "libnss-myhostname" "libpam-systemd" "systemd-sysv" "systemd-coredump" "systemd-oomd" ] {
    main = "systemctl";
    # Units and defaults lie where nixpkgs has them; Debian's own settings go.
    post = ''
      mkdir -p $out/example/systemd
      mv $out/lib/systemd/system $out/lib/systemd/user $out/example/systemd/
      mv $out/lib/tmpfiles.d $out/lib/sysctl.d $out/example/ || true
      rm -f $out/example/tmpfiles.d/debian.conf
      touch $out/example/tmpfiles.d/{systemd-nspawn,portables}.conf
      rm -rf $out/lib/systemd/system-preset $out/lib/systemd/initrd-preset
      mkdir -p $out/example/sysctl.d
      [ -e $out/example/sysctl.d/50-default.conf ] || echo 'kernel.sysrq = 16' >$out/example/sysctl.d/50-default.conf
      rm -rf $out/lib/systemd/journald.conf.d $out/lib/systemd/system.conf.d $out/lib/systemd/user.conf.d
      mkdir -p $out/share/factory/etc $out/lib/systemd/catalog
    '';
    # NixOS takes the units of these only where systemd was built with them.
    attrs =
      each [ "withBootloader" "withCryptsetup" "withEfi" "withFido2" "withImportd" "withMachined" "withNspawn" "withPortabled" "withRepart" "withSysupdate" "withTpm2Tss" "withTpm2Units" "withHomed" "withSysusers" "withUtmp" "withRemote" "withUserDb" "withOomd" "withFirstboot" ] false
      // each [ "withHostnamed" "withLocaled" "withLogind" "withTimedated" "withCoredump" "withTimesyncd" "withResolved" "withNetworkd" "withKmod" "withPam" ] true
      // {
        inherit kmod;
        inherit (final) util-linux kbd;
        interfaceVersion = 2;
        passthru = { };
      };
  };
  generators = [ "debug" "fstab" "gpt-auto" "hibernate-resume" "run" "factory-reset" ]; # those of stage 1
in
each [ "systemd" "systemdMinimal" "systemdLibs" "udev" "libudev-zero" ] systemd
// {
  inherit kmod;
  udevCheckHook = stub "udev-check-hook" { };
  dbus = package "dbus" [ "dbus-bin" "dbus-daemon" "dbus-system-bus-common" "dbus-session-bus-common" "dbus" ] { main = "dbus-daemon"; };
  dbus-broker = package "dbus-broker" [ "dbus-broker" ] { };
  zram-generator = package "zram-generator" [ "systemd-zram-generator" ] { };

  # Debian's programs have paths below /usr compiled in: what they find there.
  debian-usr = run {
    name = "debian-usr";
    buildCommand = ''
      mkdir -p $out/lib/systemd $out/bin
      for f in ${systemd}/bin/* ${kmod}/bin/* ${final.dbus-broker}/bin/* ${final.util-linux}/bin/{mount,umount,swapon,swapoff,fsck,agetty,sulogin,losetup,mkswap}; do
        ln -s $f $out/bin/
      done
      for f in ${systemd}/lib/systemd/*; do
        case ''${f##*/} in
          system | user | system-preset | user-preset | network | *.conf.d) ;;
          *) ln -s $f $out/lib/systemd/ ;;
        esac
      done
      cp -a $out/lib/systemd $out/lib/systemd-initrd
      rm $out/lib/systemd-initrd/*-generators
      mkdir $out/lib/systemd-initrd/system-generators
      for g in ${toString generators}; do
        ln -s ${systemd}/lib/systemd/system-generators/systemd-$g-generator $out/lib/systemd-initrd/system-generators/
      done
    '';
  };
}
