# What is needed to build only: links to programs of the build container. Nothing of it is in a system's closure.
{ lib, wrap, final, prev, ... }:
let
  inherit (wrap) host run script stub;
  python =
    host "python3" [ "python3" ]
    // {
      withPackages = _: python;
      interpreter = "/usr/bin/python3";
      pkgs = { };
      isPy3k = true;
    };
  bintools = run {
    name = "bintools";
    buildCommand = ''
      mkdir -p $out/bin $out/nix-support
      for x in strip ranlib readelf ld ar nm objcopy; do ln -s /usr/bin/$x $out/bin/$x; done
      echo 'export STRIP=strip RANLIB=ranlib READELF=readelf OBJCOPY=objcopy' >$out/nix-support/setup-hook
    '';
  };
  # One grey dot: pictures of the boot menus.
  dot = run {
    name = "dot.png";
    buildCommand = "echo iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNoAAAAggCBd81ytgAAAABJRU5ErkJggg== | base64 -d >$out";
  };
  # Nothing is fetched. A package that would need it shows up as "unfetchable" among the derivations.
  unfetchable = lib.makeOverridable (
    a:
    if lib.hasSuffix ".png" (a.url or "") then
      dot
    else
      run {
        name = "unfetchable";
        what = a.name or a.repo or a.pname or (lib.head (a.urls or [ (a.url or "source") ]));
        buildCommand = "echo cannot fetch $what; exit 1";
      }
      // {
        url = "none";
        rev = "none";
        tag = "none";
        owner = "";
        repo = "";
      }
  );
in
{
  python3 = python;
  python3Minimal = python;
  xorriso = host "xorriso" [ "xorriso" ];
  libisoburn = final.xorriso;
  libfaketime = host "libfaketime" [ "faketime" ];
  fakeroot = host "fakeroot" [ "fakeroot" ];
  lndir = host "lndir" [ "lndir" ];
  patchelf = host "patchelf" [ "patchelf" ];
  shellcheck = host "shellcheck" [ "shellcheck" ] // {
    compiler.bootstrapAvailable = true;
    unwrapped = final.shellcheck;
  };
  shellcheck-minimal = final.shellcheck;
  inherit bintools;
  binutils = bintools;
  binutils-unwrapped = bintools;
  # A UUID out of the last argument, always the same.
  libossp_uuid = script "uuid" "/bin/sh" ''
    for n; do :; done
    echo "$n" | sha1sum | sed -E "s/^(.{8})(.{4}).(.{3}).(.{3})(.{12}).*/\1-\2-5\3-a\4-\5/"
  '';
}
// lib.genAttrs [ "pkg-config" "gettext" "texinfo" "libtool" "automake" "autoconf" "cmake" "meson" "ninja" ] (name: stub name { })
// lib.genAttrs [ "fetchurl" "fetchzip" "fetchgit" "fetchFromGitHub" "fetchFromGitLab" "fetchpatch" "fetchpatch2" "fetchFromGitea" "fetchCargoVendor" "fetchPypi" ] (_: unfetchable)
