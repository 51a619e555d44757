# The base of a system: shells, tools, libraries, users.
{ lib, wrap, final, ... }:
let
  inherit (wrap) package stub run deb;
  same = names: lib.genAttrs names (name: package name [ name ] { });
  each = names: value: lib.genAttrs names (_: value);

  util-linux = package "util-linux" [ "util-linux" "util-linux-extra" "mount" "login" "fdisk" "eject" "bsdextrautils" "libblkid1" "libmount1" "libuuid1" "libsmartcols1" "libfdisk1" ] {
    attrs = {
      mount = util-linux;
      login = util-linux;
      swap = util-linux;
      withLastlog = true;
      hasCol = true;
      lastlog = package "lastlog2" [ "libpam-lastlog2" "liblastlog2-2" ] { };
    };
  };
  shadow = package "shadow" [ "passwd" "login.defs" "login" "uidmap" ] {
    main = "nologin";
    post = "ln -s ${util-linux}/bin/newgrp ${util-linux}/bin/sg ${util-linux}/bin/su $out/bin/";
    attrs = {
      shellPath = "/bin/nologin";
      su = shadow;
    };
  };
  getent = package "getent" [ "libc-bin" ] {
    post = "rm -rf $out/etc $out/share $out/lib/locale";
    attrs = { inherit getent; };
  };
  glibc = wrap.libs // {
    pname = "glibc";
    version = wrap.versionOf "libc6";
    inherit getent;
    bin = getent;
    libc = wrap.libs;
  };
  net-tools = package "net-tools" [ "net-tools" "hostname" ] { };
  cacert =
    run {
      pname = "cacert";
      version = "0";
      buildCommand = ''
        mkdir -p $out/etc/ssl/certs
        cat ${deb "ca-certificates"}/usr/share/ca-certificates/mozilla/*.crt >$out/etc/ssl/certs/ca-bundle.crt
      '';
    }
    // {
      override = _: cacert;
      unbundled = cacert;
      p11kit = cacert;
    };
  busybox = package "busybox" [ "busybox" ] {
    post = "for a in $($out/bin/busybox --list); do [ -e $out/bin/$a ] || ln -s busybox $out/bin/$a; done";
  };
  lvm2 = package "lvm2" [ "lvm2" "dmsetup" ] {
    post = "rm -rf $out/etc";
    moreTools = [ final.systemd ];
    attrs = {
      scripts = lvm2;
      vdo = lvm2;
      withVDO = false;
    };
  };
in
same [ "acl" "attr" "bash-completion" "bzip2" "cpio" "curl" "dosfstools" "file" "findutils" "git" "gzip" "hostname" "inotify-tools" "jq" "kbd" "kexec-tools" "less" "mdadm" "mtools" "nano" "nftables" "openssl" "patch" "procps" "psmisc" "rsync" "strace" "time" "zstd" "diffutils" ]
// each [ "bash" "bashNonInteractive" "bashInteractive" "bashInteractiveFHS" "runtimeShellPackage" ] wrap.bash
// each [ "coreutils" "coreutils-full" "uutils-coreutils-noprefix" ] wrap.coreutils
// each [ "perl" "perl5" ] wrap.perl
// each [ "util-linux" "util-linuxMinimal" "util-linuxCurses" "libuuid" "mount" "umount" "login" ] util-linux
// each [ "shadow" "su" ] shadow
// each [ "getent" "libc_bin" ] getent
// each [ "glibc" "libc" ] glibc
// each [ "nettools" "net-tools" ] net-tools
// each [ "lvm2" "lvm2_dmeventd" "lvm2_vdo" ] lvm2
// {
  inherit busybox cacert;
  busybox-sandbox-shell = busybox;
  runtimeShell = "${wrap.bash}/bin/bash";
  perlPackages = {
    inherit (wrap) perl;
    XMLParser = wrap.perl;
  };
  dash = package "dash" [ "dash" ] {
    post = "rm -f $out/bin/sh";
    attrs.shellPath = "/bin/dash";
  };
  which = package "which" [ "debianutils" ] { post = "ln -sf which.debianutils $out/bin/which"; };
  # Debian names this one by its alternatives.
  gawk = package "gawk" [ "gawk" ] { post = "ln -sf gawk $out/bin/awk"; };
  squashfsTools = package "squashfs-tools" [ "squashfs-tools" ] { main = "mksquashfs"; };
  gnugrep = package "gnugrep" [ "grep" ] { main = "grep"; };
  gnused = package "gnused" [ "sed" ] { main = "sed"; };
  gnutar = package "gnutar" [ "tar" ] { main = "tar"; };
  gnupatch = package "gnupatch" [ "patch" ] { main = "patch"; };
  xz = package "xz" [ "xz-utils" ] { };
  ncurses = package "ncurses" [ "ncurses-bin" "ncurses-base" ] { };
  linux-pam = package "linux-pam" [ "libpam-modules" "libpam-modules-bin" "libpam0g" ] { post = "rm -rf $out/etc"; };
  pam = final.linux-pam;
  libcap = package "libcap" [ "libcap2-bin" ] { };
  libxcrypt = stub "libxcrypt" { passthru.enabledCryptSchemeIds = [ "y" "gy" "7" "2b" "6" "5" ]; };
  libxslt = package "libxslt" [ "xsltproc" ] { };
  libxml2 = package "libxml2" [ "libxml2-utils" ] { };
  tzdata = package "tzdata" [ "tzdata" ] { };
  iana-etc = package "iana-etc" [ "netbase" ] { };
  glibcLocales = stub "glibc-locales" { buildCommand = "mkdir -p $out/lib/locale; : >$out/lib/locale/locale-archive"; };
  glibcLocalesUtf8 = final.glibcLocales;

  e2fsprogs = package "e2fsprogs" [ "e2fsprogs" "libext2fs2t64" "libcom-err2" "libss2" ] { };
  openssh = package "openssh" [ "openssh-server" "openssh-client" "openssh-common" "openssh-sftp-server" ] { main = "ssh"; };
  iproute2 = package "iproute2" [ "iproute2" ] { main = "ip"; };
  iputils = package "iputils" [ "iputils-ping" ] { };
  # Debian names these by its alternatives.
  iptables = package "iptables" [ "iptables" ] {
    post = "for x in $out/bin/*tables-nft*; do y=\${x##*/}; ln -sf xtables-nft-multi $out/bin/\${y/-nft/}; done";
  };
  iptables-legacy = final.iptables;
  unixtools =
    each [ "hostname" "ifconfig" "arp" "route" "netstat" "nettools" ] net-tools
    // each [ "getconf" "getent" ] getent
    // each [ "ps" "sysctl" "top" "watch" "procps" ] final.procps
    // each [ "mount" "umount" "fsck" "fdisk" "col" "column" "eject" "more" "script" "wall" "write" "logger" "util-linux" "xxd" "whereis" ] util-linux;
}
