# Nix.
{ wrap, ... }:
let
  nix =
    wrap.package "nix" [ "nix-bin" "nix-setup-systemd" ] {
      # Debian's variant wants a group nix-users: back to what Nix itself brings.
      post = ''
        rm -rf $out/etc $out/lib/environment.d
        printf '%s\n' 'd /nix/var/nix/daemon-socket 0755 root root - -' 'd /nix/var/nix/gcroots/per-user 0755 root root - -' \
          'd /nix/var/nix/profiles/per-user 0755 root root - -' >$out/lib/tmpfiles.d/nix-daemon.conf
      '';
    }
    // {
      isLix = false;
    };
in
{
  inherit nix;
  nixVersions = {
    stable = nix;
    latest = nix;
    git = nix;
    nix_2_34 = nix;
    nix_2_31 = nix;
    nix_2_30 = nix;
  };
}
