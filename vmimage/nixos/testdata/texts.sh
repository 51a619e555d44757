#!/usr/bin/env bash
# texts.sh ISO.drv: the texts of ours that come into the image, as its derivations have them, without what differs from one
# nixpkgs to the next by nature: hashes, versions, and the order of what has none.
set -euo pipefail

export NIX_CONFIG="experimental-features = nix-command"
names='unit-(script-)?(osbuilder-[a-z]+|pipe-runner)(-start|\.service)|unit-(sshd|nix-daemon|emergency|panic-on-fail)\.service|unit-10-ethernet\.network|sshd\.conf-(final|settings)|nix\.conf|isolinux\.cfg(-in)?|efi-directory|etc-systemd-(journald|logind)\.conf|.*-disabled'
nix-store -qR "$1" | grep -E -- "-($names)\.drv\$" | xargs nix --offline derivation show | jq -r '
  def plain:
    gsub("/nix/store/[0-9a-z]{32}-(?<name>[^/\\s\"]*)"; "/nix/store/…-" + .name)
    | gsub("(?<name>/nix/store/…-[A-Za-z0-9_.+-]*?)-[0-9][0-9a-zA-Z.+_-]*(?<out>-bin|-lib|-man)?(?=[/\\s\"]|$)"; .name);
  def wanted($re): split("\n") | map(select(test($re)) | gsub("^\\s+|\\s+$"; "")) | join("\n");
  to_entries | map(.value) | sort_by(.name)[]
  | .name as $name
  | (if $name == "sshd.conf-final" then .env.buildCommand
     elif ($name | startswith("isolinux")) then (.env.text // "" | wanted("TIMEOUT|ALLOW|NOESCAPE|PROMPT|MENU HIDDEN|NOTABMSG"))
     elif $name == "efi-directory" then (.env.buildCommand | wanted("set timeout|set textmode=(true|false)"))
     elif ($name | endswith("-disabled")) then (.env.buildCommand | wanted("/dev/null"))
     else .env.text end)
  | "== \($name)\n\(plain)\n"'
