#!/usr/bin/env bash
# texts.sh ISO.drv: what of ours comes into the image, as its derivations have it, without what differs from one nixpkgs to
# the next by nature: hashes and versions, and settings that are nixpkgs' own.
set -euo pipefail
export NIX_CONFIG="${NIX_CONFIG:-}
experimental-features = nix-command"

names='unit-(osbuilder-[a-z]+|pipe-runner|sshd|sshd-keygen|nix-daemon|emergency|panic-on-fail)\.service|unit-script-sshd.*|unit-10-ethernet\.network'
names+='|sshd\.conf-(final|settings)|nix\.conf|isolinux\.cfg(-in)?|efi-directory|etc-systemd-(journald|logind)\.conf'
names+='|unit-[a-z-]*-disabled|unit-.*getty.*-disabled'
# shellcheck disable=SC2016 # jq's own variables
nix-store -qR "$1" | grep -E -- "-($names)\.drv\$" | xargs nix --offline derivation show | jq -r '
  def plain:
    gsub("/nix/store/[0-9a-z]{32}-(?<name>[^/\\s\"]*)"; "…" + .name)
    | gsub("(?<name>…[A-Za-z0-9_.+-]*?)-[0-9][0-9a-zA-Z.+_-]*(?=[/\\s\"]|$)"; .name)
    | gsub("…bash-interactive"; "…bash") | gsub("-binfmt-P-[a-z0-9_-]*"; "-binfmt-P");
  # The folders of PATH by their packages, each once.
  def path:
    if startswith("Environment=\"PATH=") then
      "PATH: " + ([scan("…([a-z0-9-]+)/bin")[0]] | reduce .[] as $p ([]; if index($p) then . else . + [$p] end) | join(" "))
    else . end;
  def wanted($re): map(select(test($re)));
  def but($re): map(select(test($re) | not));
  to_entries | map(.value) | sort_by(.name)[]
  | .name as $name
  | (.env.text // .env.buildCommand // "") | plain
  | split("\n") | map(gsub("^\\s+|\\s+$"; "")) | map(select(. != ""))
  | if $name == "sshd.conf-final" then wanted("^(Subsystem|AuthorizedKeys|HostKey|Port|ListenAddress)")
    elif $name == "sshd.conf-settings" then but("^(Ciphers|KexAlgorithms|Macs|LogLevel|AuthorizedPrincipalsFile|GatewayPorts) ")
    elif $name == "nix.conf" then but("^(#|auto-optimise-store|builders|require-sigs|substituters|system-features|trusted-public-keys|trusted-substituters) ?")
    elif ($name | startswith("isolinux")) then wanted("^(TIMEOUT|PROMPT|ALLOWOPTIONS|NOESCAPE|MENU HIDDEN|MENU NOTABMSG)")
    elif $name == "efi-directory" then wanted("^set timeout")
    elif $name == "etc-systemd-journald.conf" then but("^(RateLimit|Audit=keep)")
    elif $name == "etc-systemd-logind.conf" then but("^(Handle|KillUserProcesses)") + wanted("^HandlePowerKey=(?!poweroff$)")
    elif ($name | startswith("unit-script-sshd")) then wanted("ssh-keygen")
    elif ($name | endswith("-disabled")) then wanted("/dev/null")
    elif ($name | endswith(".service")) then but("^(Environment=\"(LOCALE_ARCHIVE|TZDIR|CURL_CA_BUNDLE|LD_LIBRARY_PATH)=|X-|IOScheduling|CPUScheduling|LimitNOFILE|RequiresMountsFor=/nix/store$)") | map(path)
      | map(gsub(" sshd-keygen.service"; "") | gsub("RELEASE=[0-9.]+"; "RELEASE=N"))
      | if $name | test("sshd|nix-daemon") then but("^(PATH:|Type=|ExecStartPre=…unit-script-sshd-pre-start/)") else . end
    else . end
  | select(length > 0)
  | "", "== \($name | sub("-in$"; ""))", .[]'
