# Stand-ins: small programs of NixOS in Rust, rewritten as scripts, and empty packages for what no test uses.
{ lib, wrap, final, ... }:
let
  inherit (wrap) run stub;
in
{
  nixos-init = stub "nixos-init" {
    meta.mainProgram = "initrd-init";
    buildCommand = ''
      mkdir -p $out/bin
      printf '%s\n' '#!${wrap.bash}/bin/sh' '${final.jq}/bin/jq -r "to_entries[] | .key + \"=\" + .value" </etc/systemd/generator-environment.json' >$out/bin/env-generator
      {
        echo '#!${wrap.bash}/bin/sh'
        echo 'PATH=$PATH:${wrap.coreutils}/bin'
        cat ${../resolve-in-root.sh}
      } >$out/bin/resolve-in-root
      printf '%s\n' '#!${wrap.bash}/bin/sh' 'exit 1' | tee $out/bin/find-etc >$out/bin/clear-etc-opaque
      chmod +x $out/bin/*
    '';
  };
  makeInitrdNGTool = run {
    name = "make-initrd-ng";
    meta.mainProgram = "make-initrd-ng";
    buildCommand = ''
      mkdir -p $out/bin
      { echo '#!${wrap.perl}/bin/perl'; cat ${../make-initrd-ng.pl}; } >$out/bin/make-initrd-ng
      chmod +x $out/bin/make-initrd-ng
    '';
  };
  nixos-firewall-tool = stub "nixos-firewall-tool" { };
  nixos-generators = stub "nixos-generators" { };
  man-db = stub "man-db" { };
  man = final.man-db;
  bind = stub "bind" { } // {
    host = final.bind;
    dnsutils = final.bind;
  };
  host = final.bind;
  dnsutils = final.bind;
  libressl = stub "libressl" { } // {
    nc = final.libressl;
  };
  netcat = final.libressl;
}
// lib.genAttrs [ "mkpasswd" "nix-bash-completions" "xauth" "kbdlight" "btrfs-progs" "mailcap" "nixos-rebuild-ng" "openresolv" "shared-mime-info" "desktop-file-utils" "hicolor-icon-theme" "sound-theme-freedesktop" "glib" ] (name: stub name { })
// lib.genAttrs [ "fish" "zsh" "xonsh" "nushell" ] (name: stub name { passthru.shellPath = "/bin/${name}"; })
