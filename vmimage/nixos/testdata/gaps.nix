# A tree to check against may have been cut down: without the largest files, or without what its owner has no use for. What
# the evaluation needs of that is stood in for here, by name only. A whole tree has no gap, and nothing is replaced.
{
  lib,
  modulesPath,
  ...
}:
{
  # A module that is in the tree's own list, too, counts once.
  imports = lib.filter builtins.pathExists (
    map (file: modulesPath + "/${file}") [
      "image/images.nix"
      "tasks/filesystems/overlayfs.nix"
    ]
  );
  nixpkgs.overlays = [
    (
      final: prev:
      let
        stub =
          name:
          let
            package = prev.stdenv.mkDerivation {
              inherit name;
              src = null;
              meta = {
                mainProgram = name;
                platforms = lib.platforms.all;
              };
            };
          in
          package // { override = _: stub name; };
        whole = prev.haskellPackages ? ShellCheck;
      in
      {
        qemu-user = if prev ? spice then prev.qemu-user else stub "qemu-user";
        shellcheck =
          if whole then prev.shellcheck else stub "shellcheck" // { unwrapped = stub "shellcheck"; };
        shellcheck-minimal =
          if whole then
            prev.shellcheck-minimal
          else
            stub "shellcheck" // { compiler.bootstrapAvailable = true; };
      }
    )
  ];
}
