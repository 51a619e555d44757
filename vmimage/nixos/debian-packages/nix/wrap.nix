# Store paths out of unpacked Debian packages: one with every shared library, and one per package of nixpkgs, in which each
# program's interpreter and rpath point into the store, and so do the paths in each script and unit.
{
  lib,
  debs,
  stdenv,
}:
let
  deb = name: debs.${name} or (throw "debian-packages: no Debian package ${name} (add it to the file packages)");
  versionOf = name: (deb name).version;

  run =
    attrs:
    stdenv.mkDerivation (
      {
        preferLocalBuild = true;
        dontPatchShebangs = true;
      }
      // attrs
    );

  multiarch = "usr/lib/x86_64-linux-gnu";
  # Perl's and Nix's libraries are of use to them alone, and lie with them.
  withLibs = lib.filter (deb: deb.libraries) (
    lib.attrValues (lib.filterAttrs (n: _: !(lib.hasPrefix "perl" n || n == "nix-bin")) debs)
  );
  interpreter = "${libs}/lib/ld-linux-x86-64.so.2";

  libs =
    run {
      pname = "debian-libs";
      version = "0";
      buildCommand = ''
        mkdir -p $out/lib
        for p in ${toString withLibs}; do
          cp -a --no-preserve=ownership $p/${multiarch}/. $out/lib/
          chmod -R u+w $out/lib
        done
        rm -rf $out/lib/gconv $out/lib/perl* $out/lib/*.a
        # glibc's own files stay as they are: the loader refuses to be patched.
        for f in ${deb "libc6"}/${multiarch}/*; do own="$own ''${f##*/} "; done
        find $out/lib -type f | while read -r f; do
          case "$own" in *" ''${f##*/} "*) continue ;; esac
          [ "$(head -c4 $f | tail -c3)" = ELF ] || continue
          patchelf --force-rpath --set-rpath $out/lib:$out/lib/systemd $f || true
        done
      '';
    }
    // lib.genAttrs [ "bin" "out" "lib" "dev" "static" "getent" ] (_: libs);

  # package NAME [DEBIAN PACKAGES] { post, main, moreTools, version, attrs }
  # NAME as nixpkgs calls it; post: shell, run before the paths are rewritten; main: the main program; moreTools: where
  # rewritten paths may point besides the package itself; attrs: what NixOS's modules read of the package.
  package =
    name: pkgs:
    {
      post ? "",
      main ? name,
      moreTools ? [ ],
      attrs ? { },
      version ? if pkgs == [ ] then "0" else versionOf (lib.head pkgs),
    }:
    let
      drv = run {
        pname = name;
        inherit version post libs;
        pkgs = map deb pkgs;
        sh = lib.optionalString (name != "bash") "${bash}/bin/sh";
        tools =
          lib.optionals (!lib.elem name [ "bash" "coreutils" "gnused" "gnugrep" ]) [
            bash
            coreutils
          ]
          ++ moreTools;
        rewrite = ./rewrite-paths.pl;
        inherit interpreter;
        buildCommand = ''
          mkdir -p $out/bin $out/lib
          ln -s bin $out/sbin
          # What is there already stays: a program in sbin may be a link to the one in bin.
          put() {
            [ -d "$1" ] || return 0
            mkdir -p "$2"
            cp -a -n --no-preserve=ownership "$1"/. "$2"/
            chmod -R u+w $out
          }
          for d in $pkgs; do
            put $d/usr/bin $out/bin
            put $d/usr/sbin $out/bin
            put $d/${multiarch} $out/lib
            for x in $d/usr/lib/*; do
              case $x in
                */x86_64-linux-gnu | *'/*') ;;
                *) if [ -d "$x" ]; then put $x $out/lib/''${x##*/}; else cp -a $x $out/lib/; fi ;;
              esac
            done
            put $d/usr/libexec $out/libexec
            put $d/usr/share $out/share
            put $d/etc $out/etc
          done
          find $out -type f | while read -r f; do
            [ "$(head -c4 "$f" | tail -c3 | tr -d '\0')" = ELF ] || continue
            # What no system runs, but a kernel or a boot loader loads.
            case "$f" in *.ko | *.o | *.mod | *.module | */grub/* | *.c32) continue ;; esac
            if patchelf --print-interpreter "$f" >/dev/null 2>&1; then
              patchelf --set-interpreter $interpreter "$f"
            else
              # A static program, which patching breaks.
              case "$f" in */bin/*) continue ;; esac
            fi
            patchelf --force-rpath --set-rpath $out/lib:$out/lib/systemd:$libs/lib:$libs/lib/systemd "$f" 2>/dev/null || true
          done
          eval "$post"
          perl $rewrite
        '';
        meta = {
          mainProgram = main;
          platforms = lib.platforms.all;
          badPlatforms = [ ];
          license = lib.licenses.free;
        };
      };
      full =
        drv
        // lib.genAttrs [ "out" "bin" "lib" "dev" "man" "doc" "info" "modules" ] (_: full)
        // attrs
        // lib.genAttrs [ "override" "overrideAttrs" "overrideDerivation" ] (_: _: full);
    in
    full;
  bash = package "bash" [ "bash" ] {
    post = "ln -sf bash $out/bin/sh";
    attrs.shellPath = "/bin/bash";
  };
  coreutils = package "coreutils" [ "coreutils" ] { };
  perlVersion = lib.versions.majorMinor (versionOf "perl");
  perl = package "perl" [ "perl-base" "perl" "perl-modules-${perlVersion}" "libperl${perlVersion}" "libfile-slurp-perl" "libjson-perl" ] {
    post = ''
      mv $out/bin/perl $out/bin/.perl
      rm -rf $out/bin/perl5* $out/lib/perl/5*/CORE $out/lib/perl/debian-config*
      {
        echo "#!${bash}/bin/sh"
        echo "export PERL5LIB=\''${PERL5LIB:+\$PERL5LIB:}$out/lib/perl/${perlVersion}:$out/share/perl/${perlVersion}:$out/lib/perl-base:$out/share/perl5"
        echo "exec $out/bin/.perl \"\$@\""
      } >$out/bin/perl
      chmod +x $out/bin/perl
    '';
    attrs = {
      withPackages = _: perl;
      interpreter = "${perl}/bin/perl";
      libPrefix = "lib/perl5";
      isPerl = true;
    };
  };

  # An empty package that says what it is.
  stub =
    name: attrs:
    run (
      {
        pname = name;
        version = "0";
        buildCommand = "mkdir -p $out/bin $out/lib $out/share";
      }
      // attrs
    )
    // lib.genAttrs [ "override" "overrideAttrs" ] (_: _: stub name attrs);

  # Programs of the machine that builds, for building alone.
  host =
    name: programs:
    run {
      inherit name;
      buildCommand = ''
        mkdir -p $out/bin
        for program in ${toString programs}; do ln -s /usr/bin/$program $out/bin/$program; done
      '';
      meta.mainProgram = lib.head (programs ++ [ name ]);
    };

  # A script with its interpreter.
  script =
    name: interpreter: text:
    run {
      inherit name text;
      passAsFile = [ "text" ];
      buildCommand = ''
        mkdir -p $out/bin
        { echo '#!${interpreter}'; cat $textPath; } >$out/bin/${name}
        chmod +x $out/bin/${name}
      '';
      meta.mainProgram = name;
    };
in
{
  inherit
    bash
    coreutils
    deb
    debs
    host
    interpreter
    libs
    package
    perl
    run
    script
    stub
    versionOf
    ;
}
