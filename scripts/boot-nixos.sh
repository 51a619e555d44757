#!/usr/bin/env bash
# make boot-nixos NIXPKGS=/path/to/nixpkgs: builds and boots the NixOS VM where no Nix cache can be reached, and has it build
# an image. NixOS's modules and the VM's configuration are the real ones; the packages are wrappers of Debian's binaries, a
# TEST SET that is never published (vmimage/nixos/debian-packages). What was seen goes into docs/proof/boot-nixos.md.
#
# The installation is one of its own, with its own names and ports, in .osbuilder/proof. Under emulation all of it takes an
# hour or more, so every step's outcome is kept: a second run goes on where the first one stopped, and a change of what a step
# rests on has it done again. To begin anew: FRESH=yes
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh

PROJECT=osbuilder-proof
FOLDER=$OWN/proof
HERE=vmimage/nixos/debian-packages
NIXPKGS=${NIXPKGS:-}
REPORT=${PROOF_REPORT:-docs/proof/boot-nixos.md}
EXAMPLE=examples/minimal.nix
MARKER=OSBUILDER-EXAMPLE-READY
RESULT_BOOT=$PROJECT-result

finish() {
  local rc=$?
  docker rm -f "$RESULT_BOOT" >/dev/null 2>&1 || true
  if [ "$rc" -ne 0 ] && [ -f "$FOLDER/env" ]; then
    compose --ansi never logs --no-color >"$LOGS/proof-logs.log" 2>&1 || true
    note "the installation stays as it is, to be looked at; its log: .osbuilder/log/proof-logs.log"
    note "to go on: make boot-nixos NIXPKGS=$NIXPKGS    to remove it: $(shown_compose) down --volumes"
  fi
  unlock
  exit "$rc"
}

# --- Steps whose outcome is kept --------------------------------------------------------------------------------------

# once NAME WHAT COMMAND…: unless it was done before. What it notes with `saw` belongs to it.
once() {
  local name=$1 what=$2 start
  shift 2
  if [ -f "$FOLDER/done/$name" ]; then
    say "==> $what: done before"
    return 0
  fi
  start=$(date +%s)
  SAW=$FOLDER/done/.$name
  mkdir -p "$FOLDER/done"
  : >"$SAW"
  step "proof-$name" "$what" "$@"
  printf 'seconds\t%s\n' "$(($(date +%s) - start))" >>"$SAW"
  mv "$SAW" "$FOLDER/done/$name"
}

# saw NAME TEXT: a line of the report.
saw() { printf '%s\t%s\n' "$1" "$2" | tee -a "$SAW"; }

seen() { sed -n "s/^$2	//p" "$FOLDER/done/$1" 2>/dev/null | tail -n 1; }

# undo NAME…: has steps done again.
undo() {
  local name
  for name in "$@"; do rm -f "$FOLDER/done/$name"; done
}

# changed NAME KEY: whether what NAME rests on is another one than last time.
changed() {
  local file=$FOLDER/keys/$1
  [ "$(cat "$file" 2>/dev/null)" != "$2" ] || return 1
  mkdir -p "$FOLDER/keys"
  printf '%s' "$2" >"$file"
}

digest_of_files() {
  local file list=$FOLDER/.files
  mkdir -p "$FOLDER"
  find "$@" -type f ! -path '*/programs/*' ! -name '*.md' | sort | while read -r file; do say "$(sha256 "$file")  $file"; done >"$list"
  sha256 "$list"
  rm -f "$list"
}

# forget_what_changed: each step is done again when what it rests on has changed.
forget_what_changed() {
  local all=(tree iso disk first second newer usb uefi mission example)
  if [ "${FRESH:-}" = yes ]; then undo packages "${all[@]}"; fi
  if changed packages "$(digest_of_files $HERE/packages $HERE/fetch-packages $HERE/Dockerfile)"; then undo packages "${all[@]}"; fi
  if changed tree "$NIXPKGS $(digest_of_files $HERE/nix $HERE/make-tree "$NIXPKGS/nixos/modules/module-list.nix")"; then undo "${all[@]}"; fi
  if changed vm "$(digest_of_files vmimage/nixos/configuration.nix vmimage/nixos/modules vmimage/nixos/scripts vmimage/nixos/store vmimage/cmd vmimage/internal vmimage/qemu pipe)"; then
    undo iso disk first second newer usb uefi mission example
  fi
  if changed example "$(digest_of_files $EXAMPLE)"; then undo mission example; fi
}

# --- Making -----------------------------------------------------------------------------------------------------------

# builder COMMAND…: in the container in which the set is made.
builder() {
  docker run --rm --name "$PROJECT-builder" -v "$FOLDER:/proof" -v "$FOLDER/nix:/nix" -v "$ROOT/vmimage:/src/vmimage:ro" -v "$NIXPKGS:/nixpkgs:ro" \
    --network "${NETWORK:-none}" "$PROJECT/debian-packages" "$@"
}

build_container() { docker build --build-arg "BASE_DEBIAN=$BASE_DEBIAN" -t "$PROJECT/debian-packages" $HERE; }

fetch_packages() {
  NETWORK=bridge builder /src/$HERE/fetch-packages /proof/packages /proof/packages.json || return
  saw packages "$(grep -c '"hash"' "$FOLDER/packages.json") Debian packages: systemd $(version_of systemd), Nix $(version_of nix-bin), kernel $(sed -n 's/.*"linux-modules-\([^"]*\)".*/\1/p' "$FOLDER/packages.json")"
}

version_of() { grep -A 3 "^  \"$1\": {" "$FOLDER/packages.json" | sed -n 's/.*"version": "\(.*\)".*/\1/p'; }

make_tree() {
  builder /src/$HERE/make-tree /nixpkgs /proof/packages.json /proof/nixpkgs || return
  saw release "$(cat "$NIXPKGS/.version" 2>/dev/null || cat "$NIXPKGS/lib/.version")"
  saw revision "${NIXPKGS_REVISION:-$(git -c safe.directory='*' -C "$NIXPKGS" rev-parse HEAD 2>/dev/null || cat "$NIXPKGS/.git-revision" 2>/dev/null || echo "not told; module-list.nix has sha256 $(sha256 "$NIXPKGS/nixos/modules/module-list.nix")")}"
}

# make_iso: by the service vmimage, as for everyone. Only its image's base and the nixpkgs are others.
make_iso() {
  local out=$LOGS/proof-vmimage.log
  # The service goes by what the ISO is made from, and can't see that the tree behind the same path changed.
  compose run --rm --no-deps -T --entrypoint rm vmimage -rf /storage/boot.iso.sha256 /storage/nixpkgs || return
  compose --ansi never up --no-build --no-log-prefix --exit-code-from vmimage vmimage 2>&1 | tee "$out"
  [ "${PIPESTATUS[0]}" = 0 ] || return 1
  saw iso "$(sed -n "s/.*made \(builder.iso, [0-9]* MiB\).*/\1/p" "$out" | tail -n 1), sha256 $(sed -n 's/.*sha256 \([0-9a-f]*\).*/\1/p' "$out" | tail -n 1)"
}

make_disk() {
  mkdir -p "$FOLDER/disk"
  builder /src/$HERE/make-disk /proof/nixpkgs /proof/disk/proof.img || return
  saw disk "$(human_size "$(wc -c <"$FOLDER/disk/proof.img" | tr -d ' ')")"
}

# make_newer: the same configuration with a setting changed, and so another ISO for the same disk.
make_newer() {
  # shellcheck disable=SC2016 # expanded in the container
  builder bash -ec '
    cp -r /src/vmimage/nixos /tmp/newer
    docker=$(ls /nix/store | grep -- "-osbuilder-programs$" | head -n 1)
    mkdir -p /tmp/newer/programs
    cp /nix/store/$docker/bin/* /tmp/newer/programs/
    printf "%s\n" "{ imports = [ ./configuration.nix ]; environment.etc.\"osbuilder-newer\".text = \"a newer image\"; }" >/tmp/newer/newer.nix
    out=$(nix-build --no-out-link /proof/nixpkgs/nixos --arg configuration /tmp/newer/newer.nix -A config.system.build.isoImage)
    cp --remove-destination "$out"/iso/*.iso /proof/newer.iso'
}

write_settings() {
  mkdir -p "$FOLDER/nix" "$FOLDER/disk" "$FOLDER/nixpkgs" "$FOLDER/jobs" "$FOLDER/output" "$FOLDER/consoles"
  chmod 755 "$FOLDER" "$FOLDER/jobs" "$FOLDER/output"
  cat >"$FOLDER/env" <<ENV
# Written by make boot-nixos.
COMPOSE_PROJECT_NAME=$PROJECT
COMPOSE_FILE=compose.yaml:vmimage/qemu/compose.yaml:$HERE/compose.yaml
VM_FLAVOUR=nixos
BASE_DEBIAN=$BASE_DEBIAN
BASE_GO=$BASE_GO
BASE_NIX=$PROJECT/debian-packages
JOBS_DIR=$FOLDER/jobs
OUTPUT_DIR=$FOLDER/output
PUID=$(if [ "$WORLD_ROOTLESS" = yes ]; then echo 0; elif is_root; then echo 1000; else id -u; fi)
PGID=$(if [ "$WORLD_ROOTLESS" = yes ]; then echo 0; elif is_root; then echo 1000; else id -g; fi)
SSH_PORT=${PROOF_SSH_PORT:-2032}
VIEWER_PORT=8032
CPU_CORES=$(if [ "$WORLD_CORES" -lt 4 ]; then echo "$WORLD_CORES"; else echo 4; fi)
RAM_SIZE=${PROOF_RAM:-5G}
DISK_SIZE=32G
# A site's settings, as a user would give them: its cache, and what is visible in the sandbox.
VM_NIX_CONF="substituters = file:///proof/cache?trusted=true
sandbox-paths = /usr=/proof/root/usr /bin=/proof/root/usr/bin /lib=/proof/root/usr/lib /lib64=/proof/root/usr/lib64 /etc/alternatives=/proof/root/etc/alternatives"
ENV
  PROJECT_ENV=(--env-file "$FOLDER/env")
}

# own_world: no setting of an installation in this folder may leak into the proof.
own_world() {
  local name
  while read -r name; do
    case $name in BASE_DEBIAN | BASE_GO | NIXPKGS) ;; *) unset "$name" ;; esac
  done < <(sed -n 's/^#\{0,1\} *\([A-Z_]*\)=.*/\1/p' .env.example)
}

# --- The VM -----------------------------------------------------------------------------------------------------------

printable() { tr -d '\r' | sed "s/$(printf '\033')\[[0-9;?!]*[A-Za-z]//g; s/$(printf '\033')][^$(printf '\033')]*$(printf '\033')\\\\//g" | tr -cd '[:print:]\n'; }

console() { docker logs --since "$BOOTED" "$PROJECT-vm-1" 2>&1 | printable; }

sidecar_said() { docker logs --since "$BOOTED" "$PROJECT-sidecar-1" 2>&1 | printable; }

# boot MEDIA FIRMWARE [ISO]: starts the VM and waits until the sidecar has its hello.
boot() {
  local start since
  stop_vm || return
  export PROOF_MEDIA=$1 PROOF_FIRMWARE=$2 BOOT_ISO=${3:-}
  [ -n "$BOOT_ISO" ] || unset BOOT_ISO
  BOOTED=$(date -u +%Y-%m-%dT%H:%M:%SZ)
  start=$(date +%s)
  compose --ansi never up -d --no-build || return
  while ! sidecar_said | grep 'builder says hello' >/dev/null; do
    sleep 2
    since=$(($(date +%s) - start))
    if [ $((since % 60)) -lt 3 ]; then console | tail -n 1 | cut -c 1-100; fi
    [ -n "$(docker ps -q --filter "name=^$PROJECT-vm-1\$")" ] || { console | tail -n 20 && echo "the VM ended" && return 1; }
    [ "$since" -lt 1500 ] || { console | tail -n 20 && echo "no hello within 25 minutes" && return 1; }
  done
  saw ready "$(($(date +%s) - start)) s from \`up\` to the sidecar's «builder says hello», with $(uptime_load)"
}

uptime_load() { awk '{ print "a load of " $1 " on this machine" }' /proc/loadavg; }

# stop_vm: presses the power button, waits, and looks at what is left of the disk.
stop_vm() {
  [ -n "$(docker ps -q --filter "name=^$PROJECT-vm-1\$")" ] || return 0
  compose --ansi never stop vm
}

# power_off: the same as a part of the proof.
power_off() {
  local start state
  start=$(date +%s)
  stop_vm || return
  state=$(docker inspect --format '{{.State.ExitCode}}' "$PROJECT-vm-1")
  [ "$state" = 0 ] || { echo "the VM did not power itself off: exit code $state" && return 1; }
  ! console | grep 'ended by force' || return 1
  saw power-off "$(($(date +%s) - start)) s after the power button"
  disk_is_clean
}

# disk_is_clean: no journal to be replayed. The disk has no partitions.
disk_is_clean() {
  local said
  said=$(docker run --rm --network none -v "${PROJECT}_vm-storage:/storage:ro" "$PROJECT/debian-packages" dumpe2fs -h /storage/data.img 2>/dev/null) || return
  printf '%s\n' "$said" | grep -E '^(Filesystem state|Filesystem features|Mount count|Filesystem volume)'
  printf '%s\n' "$said" | grep -q '^Filesystem state: *clean$' || return 1
  ! printf '%s\n' "$said" | grep -q '^Filesystem features:.*needs_recovery' || return 1
  saw disk-after 'clean, no journal to recover'
}

# run_job NAME: drops the script on standard input and waits for its end. Sets JOB, its folder.
run_job() {
  local before after start
  start=$(date +%s)
  before=$(find "$FOLDER/output/$1" -name result.json 2>/dev/null | sort)
  cat >"$FOLDER/jobs/.$1.new"
  chmod 644 "$FOLDER/jobs/.$1.new"
  mv "$FOLDER/jobs/.$1.new" "$FOLDER/jobs/${2:-$1.sh}"
  while :; do
    sleep 2
    after=$(find "$FOLDER/output/$1" -name result.json ! -path '*/latest/*' 2>/dev/null | sort)
    JOB=$(comm -13 <(printf '%s\n' "$before") <(printf '%s\n' "$after") | head -n 1)
    [ -z "$JOB" ] || break
    [ -n "$(docker ps -q --filter "name=^$PROJECT-vm-1\$")" ] || { echo "the VM ended" && return 1; }
    [ $(($(date +%s) - start)) -lt "${LONGEST:-1200}" ] || { echo "$1 has not ended" && sidecar_said | tail -n 5 && return 1; }
  done
  JOB=${JOB%/result.json}
  grep -q '"status": *"succeeded"' "$JOB/result.json" || {
    tail -n 40 "$JOB/build.log"
    cat "$JOB/result.json"
    return 1
  }
}

# look_inside NAME: asks the VM, by a job, what only it knows; prints it and judges.
look_inside() {
  run_job "$1" <<'JOB' || return
#!/bin/bash
echo "user: $(id -un), uid $(id -u), groups $(id -Gn)"
echo "kernel: $(uname -r); $(sed -n 's/^PRETTY_NAME=//p' /etc/os-release)"
echo "image: $(cat /etc/osbuilder-image)"
echo "store: $(cat /run/osbuilder/store 2>/dev/null) ($(findmnt -no SOURCE,FSTYPE /nix | tail -n 1 | tr -s ' '))"
echo "systems: $(tr '\n' ' ' </run/osbuilder/systems)"
echo "boot medium: $(findmnt -no SOURCE /iso)"
echo "newer image: $(cat /etc/osbuilder-newer 2>/dev/null || echo no)"
state=$(systemctl is-system-running)
echo "system: $state"
echo "failed units: $(systemctl --failed --no-legend --plain | tr '\n' ' ')"
systemctl --failed --no-legend --plain | grep . && exit 1
# A job itself is a unit that is still starting.
case $state in running | starting) ;; *) exit 1 ;; esac
prompts=$(systemctl list-units --no-legend --plain --state=active,activating '*getty@*' 'console-getty*' 'emergency*' 'rescue*' 'systemd-ask-password*.service')
echo "prompts: ${prompts:-none}"
[ -z "$prompts" ] || exit 1
echo "root's spool: $(ls /data/spool 2>&1 | head -n 1)"
echo "proof disk: $(findmnt -no SOURCE,FSTYPE /proof | tr -s ' ')"
path=$(nix-build --no-out-link --expr 'derivation { name = "osbuilder-probe"; system = "x86_64-linux"; builder = "/bin/sh"; args = [ "-c" "echo built by uid $(/usr/bin/id -u) >$out" ]; }') || exit 1
echo "a sandboxed build: $(cat "$path")"
echo done >"$OUT/done"
JOB
  cat "$JOB/build.log"
  local line
  for line in prompts user kernel store systems system "boot medium" "newer image" "a sandboxed build"; do
    saw "$line" "$(sed -n "s/^.*$line: //p" "$JOB/build.log" | head -n 1)"
  done
  # A job sees nothing of /sys/firmware.
  saw firmware "$(if console | grep 'BdsDxe: starting' >/dev/null; then say UEFI; else say BIOS; fi)"
  saw "no unit failed" yes
}

# nobody_can_type: no prompt stands at the end of the console.
nobody_can_type() {
  sleep 5
  ! console | tail -n 15 | grep -iE 'login: *$|password: *$|[#$] *$|press enter|emergency mode' || return 1
  saw prompt 'none on the console'
}

# keep_console NAME: its end, for the report.
keep_console() {
  console >"$FOLDER/consoles/$1"
  grep -E '^osbuilder: |: osbuilder: ' "$FOLDER/consoles/$1" || true
}

first_boot() {
  docker volume rm "${PROJECT}_state" >/dev/null 2>&1 || true
  compose run --rm --no-deps -T --entrypoint rm vmimage -f /storage/data.img || return
  boot cd legacy || return
  look_inside inside || return
  nobody_can_type || return
  saw seeded "$(console | sed -n 's/.*osbuilder: store: \(cop.*\)/\1/p' | paste -sd ';' -)"
  power_off || return
  keep_console first
}

second_boot() {
  boot cd legacy || return
  # What the first boot's job built is still there.
  run_job kept <<'JOB' || return
#!/bin/bash
nix path-info /nix/store/*-osbuilder-probe || exit 1
echo done >"$OUT/done"
JOB
  saw kept 'what a job of the first boot built is valid in the store'
  look_inside inside || return
  ! console | grep 'osbuilder: store: copying' || return 1
  saw seeded 'nothing to copy'
  nobody_can_type || return
  power_off || return
  keep_console second
}

# mission: the configuration, dropped as a user drops it, is built inside that VM.
mission() {
  local start iso sum file
  boot cd legacy || return
  start=$(date +%s)
  LONGEST=14400 run_job minimal minimal.nix <$EXAMPLE || return
  tail -n 40 "$JOB/build.log"
  iso=$(find "$JOB" -name '*.iso' | head -n 1)
  [ -s "$iso" ] || return 1
  [ -s "$JOB/SHA256SUMS" ] || return 1
  while read -r sum file; do
    [ "$(sha256 "$JOB/$file")" = "$sum" ] || { say "$file is not what SHA256SUMS says" && return 1; }
  done <"$JOB/SHA256SUMS" || return
  keep_console mission
  cp "$JOB/result.json" "$FOLDER/mission.json"
  cp "$iso" "$FOLDER/minimal.iso"
  saw built "$(basename "$iso"), $(human_size "$(wc -c <"$iso" | tr -d ' ')"), in $(($(date +%s) - start)) s"
}

# boots_to_its_marker: what came out, in a machine of its own.
boots_to_its_marker() {
  local start
  start=$(date +%s)
  docker rm -f "$RESULT_BOOT" >/dev/null 2>&1 || true
  docker run -d --name "$RESULT_BOOT" --network none -v "$FOLDER:/image:ro" --entrypoint qemu-system-x86_64 "$PROJECT/qemu" \
    -m 2048 -smp 2 -cpu max -nographic -no-reboot -cdrom /image/minimal.iso || return
  while ! docker logs "$RESULT_BOOT" 2>&1 | grep -aF "$MARKER" >/dev/null; do
    sleep 2
    [ -n "$(docker ps -q --filter "name=^$RESULT_BOOT\$")" ] || { docker logs --tail 20 "$RESULT_BOOT" && return 1; }
    [ $(($(date +%s) - start)) -lt 1500 ] || { docker logs --tail 20 "$RESULT_BOOT" && return 1; }
  done
  saw marker "$MARKER after $(($(date +%s) - start)) s"
  docker logs "$RESULT_BOOT" 2>&1 | printable >"$FOLDER/consoles/example"
  docker rm -f "$RESULT_BOOT" >/dev/null
}

# newer_boot: the disk of the first image under a newer one, which is given as a file, and as qemux/qemu attaches it.
newer_boot() {
  make_newer || return
  boot '' legacy "$FOLDER/newer.iso" || return
  look_inside inside || return
  [ "$(sed -n 's/^newer image	//p' "$SAW")" = "a newer image" ] || return 1
  saw seeded "$(console | sed -n 's/.*osbuilder: store: \(cop.*\)/\1/p' | paste -sd ';' -)"
  power_off || return
  keep_console newer
}

usb_boot() {
  boot usb-disk legacy "$FOLDER/newer.iso" || return
  look_inside inside || return
  power_off || return
  keep_console usb
}

uefi_boot() {
  boot cd uefi || return
  look_inside inside || return
  [ "$(sed -n 's/^firmware	//p' "$SAW")" = UEFI ] || return 1
  nobody_can_type || return
  power_off || return
  keep_console uefi
}

# --- The report -------------------------------------------------------------------------------------------------------

row() { say "| $1 | $2 |"; }

# boot_row NAME WHAT
boot_row() {
  [ -f "$FOLDER/done/$1" ] || { row "$2" "**not shown**" && return 0; }
  row "$2" "$(seen "$1" ready); $(seen "$1" firmware), from $(seen "$1" 'boot medium'); store $(seen "$1" store); ${3:+$(seen "$1" seeded); }system $(seen "$1" system), no failed unit$(if [ -n "$(seen "$1" power-off)" ]; then say "; off $(seen "$1" power-off), disk $(seen "$1" disk-after)"; fi)"
}

write_report() {
  local name
  mkdir -p "$(dirname "$REPORT")"
  {
    say "# The NixOS VM, built and booted with Debian's binaries"
    say ""
    say "Written by \`make boot-nixos\` on $(date -u +%Y-%m-%d), of revision $(git -c safe.directory="$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)."
    say "NixOS's modules and the VM's configuration are the real ones; its packages are Debian's binaries: a test set, not NixOS."
    say ""
    say "| | |"
    say "|---|---|"
    row "nixpkgs" "$(seen tree release), revision $(seen tree revision)${NIXPKGS_NOTE:+; $NIXPKGS_NOTE}"
    row "packages" "$(seen packages packages)"
    row "machine" "$WORLD_CORES cores, software emulation (no KVM), the VM with $(sed -n 's/^RAM_SIZE=//p' "$FOLDER/env") and $(sed -n 's/^CPU_CORES=//p' "$FOLDER/env") cores"
    row "the VM's ISO, by the service \`vmimage\`" "$(seen iso iso), in $(seen iso seconds) s"
    boot_row first "as a CD, BIOS, blank disk" seeded
    row "a job" "$(seen first user); in the sandbox: $(seen first 'a sandboxed build'); systems: $(seen first systems)"
    row "prompts" "units that would ask: $(seen first prompts); $(seen first prompt)"
    boot_row second "the same disk again" seeded
    row "kept" "$(seen second kept)"
    row "\`$EXAMPLE\`, dropped, built in the VM" "$(seen mission built)"
    row "what came out boots" "$(seen example marker)"
    boot_row newer "a newer image over the older image's disk, by USB as \`qemux/qemu\` attaches it" seeded
    boot_row usb "as a USB disk"
    boot_row uefi "by UEFI"
    say ""
    say "## What was stubbed"
    say ""
    say "- Every package is a wrapper of Debian's binary (sid), with interpreter and library paths set to the store."
    say "- NixOS's programs in Rust (make-initrd-ng, parts of nixos-init) are scripts here; switch-to-configuration and nsncd are off."
    say "- Locales, keymaps, manuals and pictures are empty. \`xorriso\` and other tools for building alone are the build container's."
    say "- Every other deviation of the system is in \`$HERE/nix/module.nix\`, with its reason."
    say "- Inside the VM Nix's cache is a file: the proof disk, with the paths that building the VM's ISO left; the sandbox shows the build container's \`/usr\`."
    say ""
    say "Not shown: nixpkgs' own packages and kernel configuration, KVM, aarch64, a cache in the network."
    for name in first second newer usb uefi example; do
      [ -f "$FOLDER/consoles/$name" ] || continue
      say ""
      say "## The console's end: $name"
      say ""
      say '```'
      grep -Ev '^M?\[[ *]*\] |^ *$' "$FOLDER/consoles/$name" | tail -n 15 | cut -c 1-150
      say '```'
    done
    if [ -f "$FOLDER/mission.json" ]; then
      say ""
      say "## result.json of the example"
      say ""
      say '```json'
      cat "$FOLDER/mission.json"
      say '```'
    fi
  } >"$REPORT.new"
  mv "$REPORT.new" "$REPORT"
}

# --- All of it --------------------------------------------------------------------------------------------------------

[ -n "$NIXPKGS" ] || die "NIXPKGS is not given." "Name a nixpkgs tree: make boot-nixos NIXPKGS=/path/to/nixpkgs"
[ -f "$NIXPKGS/nixos/modules/module-list.nix" ] || die "$NIXPKGS is no nixpkgs tree."
NIXPKGS=$(cd "$NIXPKGS" && pwd -P)
lock "make boot-nixos"
trap finish EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
own_world
look
print_world
need_x86 "the proof"
need_disk 20480 "the proof"
need_engine
need_base_debian
need_base_go
need_compose
write_settings
forget_what_changed
step proof-container "Building the container with Debian's packages" build_container
once packages "Fetching Debian's packages" fetch_packages
once tree "Making the test tree" make_tree
step proof-images "Building the containers" compose --progress plain build
once iso "The service vmimage makes the VM's ISO" make_iso
once disk "Making the proof disk" make_disk
once first "First boot: as a CD, with a blank disk" first_boot
once second "Second boot, with the same disk" second_boot
once newer "A newer image over the same disk, by USB as qemux/qemu does" newer_boot
once usb "As a USB disk" usb_boot
once mission "The VM builds $EXAMPLE" mission
once example "Booting what it built" boots_to_its_marker
once uefi "By UEFI" uefi_boot
stop_vm
write_report
say ""
say "Shown. The report: $REPORT"
