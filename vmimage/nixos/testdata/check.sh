#!/usr/bin/env bash
# check.sh TREE…: evaluates the builder VM on each nixpkgs tree, for both processors, and compares what comes out with
# expected.txt; then users' configurations, with what nixos-generators makes of them. Run by scripts/check-nixos.sh in a
# container that has Nix, jq and shellcheck, and /src: the VM's sources, image.nix, and perhaps generators, generators-old.
set -euo pipefail
sources=/src/nixos
work=$(mktemp -d)
# The tree's own programs need not be built to be evaluated with.
cp -r "$sources" "$work/nixos"
mkdir -p "$work/nixos/programs"
touch "$work/nixos/programs/pipe-runner" "$work/nixos/programs/image-build"
here=$work/nixos/testdata
export HOME=$work NIX_CONFIG="build-users-group ="
bad=0

# wrong WHAT: counts; its details come from standard input, but not from a pipe, which would count elsewhere.
wrong() {
  printf 'wrong: %s: %s\n' "$where" "$1"
  sed 's/^/    /'
  bad=$((bad + 1))
}

# expected TAG…: the lines of expected.txt that count. "@tag@ " begins one that counts with that tag only.
expected() {
  awk -v tags=" $* " '
    /^#/ { next }
    match($0, /^@[a-z0-9_-]+@ ?/) {
      tag = substr($0, 2, RLENGTH - 1); sub(/@ ?$/, "", tag)
      if (index(tags, " " tag " ") == 0) next
      $0 = substr($0, RLENGTH + 1)
    }
    { print }' "$here/expected.txt"
}

# facts FILE: as lines.
facts() {
  jq -r '.facts | to_entries[] | .key as $key
    | if (.value | type) == "object" then "\($key):", (.value | to_entries[] | "  \(.key): \(.value | if type == "array" then map(tostring) | join(" ") else tostring end)")
      elif $key == "kernelParams" then "\($key):", "  \(.value[])"
      elif (.value | type) == "array" then "\($key): \(.value | map(tostring) | join(" "))"
      else "\($key): \(.value)" end | gsub("\\s+$"; "")' "$1"
}

# scripts DRV: what systemd is to run of ours is the script in the repository, after two lines of nixpkgs; and all of it
# passes shellcheck.
scripts() {
  local name drv text
  for name in import-config address systems; do
    case $name in import-config) drv=config ;; *) drv=$name ;; esac
    text=$work/osbuilder-$drv-start
    drv=$(nix-store -qR "$1" | grep -- "-unit-script-osbuilder-$drv-start.drv\$") || {
      wrong "scripts/$name.sh is in no unit" </dev/null
      continue
    }
    nix --extra-experimental-features nix-command --offline derivation show "$drv" | jq -r '.[].env.text' | sed '1s,.*,#!/bin/bash,' >"$text"
    shellcheck -x "$text" >"$work/out" 2>&1 || wrong "shellcheck of the unit's script for scripts/$name.sh" <"$work/out"
    diff -u <(sed '/./,$!d' "$here/../scripts/$name.sh" | sed -e '/^$/d') <(sed -e '1,2d' -e '/^$/d' "$text") >"$work/out" ||
      wrong "the unit's script is not scripts/$name.sh" <"$work/out"
  done
}

# evaluate TREE SYSTEM EXPRESSION [ARGUMENT…]: prints the derivation that it names.
evaluate() {
  local tree=$1 system=$2 expression=$3
  shift 3
  nix-instantiate --read-write-mode --eval --strict --json -I "nixpkgs=$tree" --argstr nixpkgs "$tree" --argstr system "$system" \
    "$@" "$expression" 2>"$work/said" >"$work/answer" || return
  jq -r 'if type == "object" then .derivation // .generators else . end' "$work/answer"
}

# gave_way: what of the example for an installed machine an ISO has no use for, as image.nix says it.
gave_way() {
  cat <<'LINES'
fileSystems."/" (/dev/disk/by-label/nixos, ext4): the image's own, tmpfs
fileSystems."/boot" (/dev/disk/by-label/boot, vfat): not mounted
swapDevices (/dev/disk/by-label/swap): not used
boot.loader.systemd-boot: the image brings its own boot loader
LINES
}

# compare TREE SYSTEM: a user's configuration comes to the same derivation as with nixos-generators, of the version that goes
# with the tree: nixpkgs that make images themselves want the newest, older ones the one that they have.
compare() {
  local tree=$1 system=$2 version=/src/generators pair user format ours theirs given=()
  # To build nixos-generators is not needed: image.nix takes its text.
  if [[ ! -e $tree/nixos/modules/image/images.nix ]]; then
    version=/src/generators-old
    mkdir -p "$work/generators/share"
    ln -sfn "$version" "$work/generators/share/nixos-generator"
    given=(--argstr generators "$work/generators")
  fi
  if [[ ! -e $version ]]; then
    printf 'not compared: %s: no nixos-generators for it was given\n' "$where"
    return 0
  fi
  # An installer's image holds nixpkgs itself, which takes a while to read: once is enough.
  for pair in minimal:iso settings:iso minimal:install-iso; do
    user=${pair%:*} format=${pair#*:}
    [[ $pair = minimal:iso || $system = x86_64-linux ]] || continue
    if [[ $format = install-iso ]] && jq -e '.gaps | any(startswith("roboto"))' "$work/system.json" >/dev/null; then
      printf 'not compared: %s: an installer, whose manual this tree cannot make\n' "$where"
      continue
    fi
    ours=$(evaluate "$tree" "$system" /src/image.nix --argstr format "$format" --argstr configuration "$work/$user.nix" "${given[@]}") || {
      wrong "$user.nix as $format does not evaluate" <"$work/said"
      continue
    }
    theirs=$(evaluate "$tree" "$system" "$here/generated.nix" --argstr generators "$version" --argstr format "$format" --argstr configuration "$work/$user.nix") || {
      wrong "$user.nix as $format does not evaluate with nixos-generators" <"$work/said"
      continue
    }
    if [[ $ours == /nix/store/*.drv && $ours == "$theirs" ]]; then
      printf 'the same as with nixos-generators: %s: %s.nix as %s: %s\n' "$where" "$user" "$format" "${ours##*/}"
    else
      wrong "$user.nix as $format is not what nixos-generators makes of it" <<<"ours:   $ours"$'\n'"theirs: $theirs"
    fi
  done
  [[ $system = x86_64-linux ]] || return 0
  # A configuration of an installed machine comes to an ISO.
  if ! evaluate "$tree" "$system" /src/image.nix --argstr format iso --argstr configuration "$work/machine.nix" "${given[@]}" >"$work/out"; then
    wrong "examples/machine does not evaluate" <"$work/said"
  elif ! jq -r '.overridden[]' "$work/answer" | diff -u <(gave_way) - >"$work/out"; then
    wrong "what gives way of examples/machine" <"$work/out"
  else
    printf 'made an ISO of: %s: examples/machine, of which %s settings gave way\n' "$where" "$(gave_way | wc -l)"
  fi
}

# A user's configurations: the example, and one with settings that only the image's module declares.
cat >"$work/minimal.nix" <<EOF
{ imports = [ $here/gaps.nix /src/examples/minimal.nix ]; }
EOF
cat >"$work/machine.nix" <<EOF
{ imports = [ $here/gaps.nix /src/examples/machine/configuration.nix ]; }
EOF
cat >"$work/settings.nix" <<EOF
{ imports = [ ./minimal.nix ]; isoImage.volumeID = "MINE"; isoImage.squashfsCompression = "zstd -Xcompression-level 3"; }
EOF

for tree in "$@"; do
  for system in x86_64-linux aarch64-linux; do
    where="${tree##*/}, $system"
    start=$SECONDS
    if ! nix-instantiate --read-write-mode -I "nixpkgs=$tree" --eval --strict --json --arg nixpkgs "$tree" --argstr system "$system" \
      "$here/system.nix" >"$work/system.json" 2>"$work/said"; then
      wrong "it does not evaluate" <"$work/said"
      continue
    fi
    # NixOS stops at a failed assertion, and says its warnings here.
    [[ ! -s $work/said ]] || wrong "evaluating it says something" <"$work/said"
    iso=$(jq -r .iso "$work/system.json")
    mapfile -t tags < <(jq -r '.tags[]' "$work/system.json")
    { facts "$work/system.json" && bash "$here/texts.sh" "$iso"; } >"$work/actual"
    expected "${tags[@]}" >"$work/expected"
    diff -u --label expected --label "$where" "$work/expected" "$work/actual" >"$work/out" || wrong "not as expected" <"$work/out"
    scripts "$iso"
    jq -r --arg where "$where" '.gaps | select(length > 0) | "stood in for: \($where): \(join(", "))"' "$work/system.json"
    printf 'checked: %s: NixOS %s, %s lines as expected, %s derivations, %s s\n' "$where" "$(jq -r .release "$work/system.json")" \
      "$(wc -l <"$work/expected")" "$(nix-store -qR "$iso" | wc -l)" $((SECONDS - start))
    compare "$tree" "$system"
  done
done
if ((bad)); then
  printf '%s wrong\n' "$bad"
  exit 1
fi
