#!/usr/bin/env bash
# make prove-nixos: on a machine that reaches a Nix cache and a container registry, everything that is said of the NixOS VM,
# from nothing: its image is made, it boots, it builds examples/minimal.nix and an Arm image, and the first of them boots. What
# was seen goes into docs/proof/prove-nixos.md; that file is what the README's claim rests on.
#
# The installation is one of its own, with its own names, ports and folders, and is removed when all went well.
# For trying this script where there is no cache:
#   PROVE_FLAVOUR=debian PROVE_JOB=FILE PROVE_MARKER=TEXT PROVE_ARM=no PROVE_REPORT=FILE make prove-nixos
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh

PROJECT=osbuilder-prove
FOLDER=$OWN/prove
FLAVOUR=${PROVE_FLAVOUR:-nixos}
JOB=${PROVE_JOB:-examples/minimal.nix}
REPORT=${PROVE_REPORT:-docs/proof/prove-nixos.md}
NAME=$(basename "$JOB")
NAME=${NAME%.*}
FINISHED=no
SSH_PORT=${SSH_PORT:-2922}
VIEWER_PORT=${VIEWER_PORT:-8906}
BOOT=osbuilder-prove-boot

finish() {
  local rc=$?
  docker rm -f "$BOOT" >/dev/null 2>&1 || true
  if [ -f "$FOLDER/env" ] && [ "$FINISHED" = no ]; then
    compose --ansi never logs --no-color >"$LOGS/prove-logs.log" 2>&1 || true
    say "It stays as it is, to be looked at; its log: .osbuilder/log/prove-logs.log"
    note "to remove it: $(shown_compose) down --volumes"
  fi
  unlock
  exit "$rc"
}

# need_the_world: stops early, before anything is made.
need_the_world() {
  if [ "$FLAVOUR" = nixos ] && [ "$WORLD_NIX" = no ]; then
    die "cache.nixos.org can't be reached from here, so the NixOS VM can't be proved on this machine." \
      "Run it on one that reaches it. What can be shown without a cache: make boot-nixos NIXPKGS=/path/to/nixpkgs" \
      "(with a cache of yours alone: VM_NIX_CONF in .env, and WORLD_NIX=yes make prove-nixos)"
  fi
  [ -f "$JOB" ] || die "$JOB is missing." "Restore it: git checkout $JOB"
  need_engine
  is_x86 || die "the containers here are $WORLD_ARCH; the proof is of the x86-64 VM." "Run it on an x86-64 machine."
  need_disk 30720 "the proof"
  if [ "$FLAVOUR" = nixos ]; then
    find_base_nix || die "$BASE_NIX is not here and can't be pulled." "The proof needs a container registry."
  else
    need_base_debian
    need_own_nix
  fi
  need_base_debian
  need_base_go
  need_compose
}

write_settings() {
  local memory
  memory=$((WORLD_MEMORY * 6 / 10 / 1024))
  [ "$memory" -le 16 ] || memory=16
  rm -rf "$FOLDER"
  mkdir -p "$FOLDER/jobs" "$FOLDER/output"
  chmod 755 "$FOLDER" "$FOLDER/jobs" "$FOLDER/output"
  # Neither the user's override nor the images of an installation beside this one.
  FILES=${FILES%:compose.override.yaml}
  {
    say "services:"
    say "  init: {image: $PROJECT/sidecar}"
    say "  sidecar: {image: $PROJECT/sidecar}"
    say "  vmimage: {image: $PROJECT/vmimage-$FLAVOUR}"
    [ -z "$FILES" ] || say "  vm: {image: $PROJECT/qemu}"
  } >"$FOLDER/images.yaml"
  cat >"$FOLDER/env" <<ENV
COMPOSE_PROJECT_NAME=$PROJECT
COMPOSE_FILE=${FILES:-compose.yaml}:.osbuilder/prove/images.yaml
VM_FLAVOUR=$FLAVOUR
BASE_DEBIAN=$BASE_DEBIAN
BASE_GO=$BASE_GO
BASE_NIX=$BASE_NIX
JOBS_DIR=$FOLDER/jobs
OUTPUT_DIR=$FOLDER/output
SSH_PORT=$SSH_PORT
VIEWER_PORT=$VIEWER_PORT
PUID=$(if [ "$WORLD_ROOTLESS" = yes ]; then echo 0; elif is_root; then echo 1000; else id -u; fi)
PGID=$(if [ "$WORLD_ROOTLESS" = yes ]; then echo 0; elif is_root; then echo 1000; else id -g; fi)
CPU_CORES=$(if [ "$WORLD_CORES" -lt 4 ]; then echo "$WORLD_CORES"; else echo 4; fi)
RAM_SIZE=${memory}G
DISK_SIZE=64G
ENV
  PROJECT_ENV=(--env-file "$FOLDER/env")
}

# own_world: no setting of an installation in this folder may leak into the proof, but what the VM is made from and its cache.
own_world() {
  local name nixpkgs conf
  nixpkgs=$(setting VM_NIXPKGS)
  conf=$(setting VM_NIX_CONF)
  while read -r name; do
    case $name in BASE_* | SSH_PORT | VIEWER_PORT) ;; *) unset "$name" ;; esac
  done < <(sed -n 's/^#\{0,1\} *\([A-Z_]*\)=.*/\1/p' .env.example)
  [ -z "$nixpkgs" ] || export VM_NIXPKGS=$nixpkgs
  [ -z "$conf" ] || export VM_NIX_CONF=$conf
}

# drop FILE NAME: puts a job in whole, by rename.
drop() {
  cp "$1" "$FOLDER/jobs/.$2.new"
  chmod 644 "$FOLDER/jobs/.$2.new"
  mv "$FOLDER/jobs/.$2.new" "$FOLDER/jobs/$2"
}

# wait_for NAME: until that job has ended, and well.
wait_for() {
  local result='' file start
  start=$(date +%s)
  while [ -z "$result" ]; do
    sleep 2
    for file in "$FOLDER/output/$1"/*/result.json; do
      if [ -f "$file" ]; then result=$file; fi
    done
    [ $(($(date +%s) - start)) -lt 14400 ] || { echo "no outcome of $1 within four hours" && return 1; }
    compose --ansi never logs --no-color --no-log-prefix --tail 1 sidecar 2>/dev/null || true
  done
  grep -q '"status": *"succeeded"' "$result" || {
    cat "$result"
    return 1
  }
}

# boots IMAGE MARKER: whether it comes up to its marker in a machine without network.
boots() {
  local start
  start=$(date +%s)
  docker rm -f "$BOOT" >/dev/null 2>&1 || true
  docker run -d --name "$BOOT" --network none -v "$(dirname "$1"):/image:ro" --entrypoint qemu-system-x86_64 "$(vm_image)" \
    -m 2048 -smp 2 -nographic -no-reboot -cdrom "/image/$(basename "$1")" || return
  while ! docker logs "$BOOT" 2>&1 | tr -d '\r' | grep -aqF "$2"; do
    sleep 2
    docker logs --tail 1 "$BOOT" 2>&1 | tr -cd '[:print:]\n'
    [ -n "$(docker ps -q --filter "name=^$BOOT\$")" ] || { echo "the machine ended without its marker" && return 1; }
    [ $(($(date +%s) - start)) -lt 1200 ] || { echo "no marker within 20 minutes" && return 1; }
  done
  docker logs "$BOOT" 2>&1 | printable >"$FOLDER/boot.txt"
}

printable() { tr -d '\r' | sed "s/$(printf '\033')\[[0-9;?]*[A-Za-z]//g" | tr -cd '[:print:]\n'; }

vm_image() { compose config --images vm 2>/dev/null | grep -E '/qemu(-arm)?(:|$)' | head -n 1; }

image_of() {
  local file
  for file in "$FOLDER/output/$1"/latest/*.iso; do
    if [ -f "$file" ]; then printf '%s' "$file"; fi
  done
}

# marker: what the job's image says on its console: the last text in quotes that begins with OSBUILDER.
marker() { printf '%s' "${PROVE_MARKER:-$(grep -o 'OSBUILDER[ -][A-Za-z0-9 :,.-]*' "$JOB" | tail -n 1)}"; }

# digest_of IMAGE: the one that it was pulled by, else the local id.
digest_of() {
  docker image inspect --format '{{if .RepoDigests}}{{index .RepoDigests 0}}{{else}}{{.Id}} (local){{end}}' "$1" 2>/dev/null || echo "not here"
}

# in_volume COMMAND…: in the VM's storage, read-only.
in_volume() {
  docker run --rm --network none -v "${PROJECT}_vm-storage:/storage:ro" --entrypoint "$1" "$PROJECT/vmimage-$FLAVOUR" "${@:2}" 2>/dev/null || true
}

seconds_of() { awk -F '\t' -v n="$1" '$1 == n { print $2 " s" }' "$LOGS/times"; }

# write_report: what was seen, with what it was seen of. Nothing in it is of the machine but its size.
write_report() {
  local image arm revision dirty
  image=$(image_of "$NAME")
  arm=$(image_of "$NAME-arm")
  revision=$(git -c safe.directory="$ROOT" rev-parse HEAD 2>/dev/null || echo unknown)
  dirty=$(git -c safe.directory="$ROOT" status --porcelain 2>/dev/null | grep -v 'docs/proof/' | head -n 1) || true
  mkdir -p "$(dirname "$REPORT")"
  {
    if [ "$FLAVOUR" = nixos ]; then
      say "# The NixOS VM, proved with a Nix cache"
    else
      say "# A trial of the proof's script, with the $FLAVOUR VM: this proves nothing of NixOS"
    fi
    say ""
    say "Written by \`make prove-nixos\` on $(date -u +%Y-%m-%d), of revision $revision${dirty:+, with changes that are not committed}."
    say ""
    say "| | |"
    say "|---|---|"
    say "| machine | $WORLD_CORES cores, $((WORLD_MEMORY / 1024)) GiB available, engine $WORLD_ENGINE, $(compose --ansi never logs --no-color --no-log-prefix vm 2>/dev/null | printable | grep '^KVM: ' | head -n 1) |"
    say "| the VM's ISO made | $(seconds_of vmimage), sha256 $(in_volume cut -d' ' -f1 /storage/boot.iso.sha256) |"
    say "| VM up and \`$JOB\` built | $(seconds_of job) |"
    say "| its image | $(basename "$image"), $(human_size "$(wc -c <"$image" | tr -d ' ')"), sha256 $(sha256 "$image") |"
    say "| booted to its marker | $(seconds_of boot) |"
    if [ -n "$arm" ]; then
      say "| the same for aarch64-linux, by emulation | $(seconds_of arm), $(human_size "$(wc -c <"$arm" | tr -d ' ')"), sha256 $(sha256 "$arm"); not booted |"
    fi
    say ""
    say "## What it was made of"
    say ""
    say "| image | digest |"
    say "|---|---|"
    for image in "$BASE_NIX" "$BASE_GO" "$BASE_DEBIAN" "$(vm_image)"; do say "| \`$image\` | $(digest_of "$image") |"; done
    say ""
    say "Compose $WORLD_COMPOSE, $(docker run --rm --network none --entrypoint qemu-system-x86_64 "$(vm_image)" --version 2>/dev/null | head -n 1)."
    say ""
    say "nixpkgs of the VM, as it was resolved:"
    say ""
    say '```json'
    # shellcheck disable=SC2016 # expanded in the container
    in_volume sh -c 'for f in /storage/nixpkgs/*.json; do if [ -f "$f" ]; then cat "$f"; echo; fi; done'
    say '```'
    say ""
    say "result.json of the job:"
    say ""
    say '```json'
    cat "$FOLDER/output/$NAME/latest/result.json"
    say '```'
    say ""
    say "## The console's end"
    say ""
    say "The VM's:"
    say ""
    say '```'
    compose --ansi never logs --no-color --no-log-prefix --tail 30 vm 2>&1 | printable
    say '```'
    say ""
    say "The image's:"
    say ""
    say '```'
    tail -n 30 "$FOLDER/boot.txt"
    say '```'
  } >"$REPORT.new"
  mv "$REPORT.new" "$REPORT"
}

case $FLAVOUR in nixos | debian) ;; *) die "PROVE_FLAVOUR=$FLAVOUR is not known." "It is nixos, or debian to try this script." ;; esac
if [ "$FLAVOUR" != nixos ] && [ -z "${PROVE_REPORT:-}" ]; then
  die "a trial with the $FLAVOUR VM must not overwrite the proof." "Name another file: PROVE_REPORT=FILE"
fi
lock "make prove-nixos"
trap finish EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
own_world
KNOWN=${WORLD_NIX:-}
look
[ -z "$KNOWN" ] || WORLD_NIX=$KNOWN
print_world
need_the_world
choose_vm_container
write_settings
compose down --volumes >/dev/null 2>&1 || true
step build "Building the containers" compose --progress plain build
step vmimage "Making the VM's ISO" compose --ansi never up --no-build --no-log-prefix --exit-code-from vmimage vmimage
step up "Starting the VM and the sidecar" compose --ansi never up -d --no-build
drop "$JOB" "$NAME.${JOB##*.}"
step job "The VM boots and builds $JOB" wait_for "$NAME"
step boot "Booting what it built, up to «$(marker)»" boots "$(image_of "$NAME")" "$(marker)"
if [ "${PROVE_ARM:-yes}" = yes ]; then
  say "SYSTEM=aarch64-linux" >>"$FOLDER/env"
  step arm-up "Telling the sidecar to build for aarch64-linux" compose --ansi never up -d --no-build sidecar
  drop "$JOB" "$NAME-arm.${JOB##*.}"
  step arm "Building the same for Arm, by emulation in the VM" wait_for "$NAME-arm"
fi
write_report
FINISHED=yes
step down "Removing the installation of the proof" compose down --volumes --timeout 100
docker image rm "$PROJECT/sidecar" "$PROJECT/vmimage-$FLAVOUR" "$PROJECT/qemu" >/dev/null 2>&1 || true
rm -rf "$FOLDER"
say ""
if [ "$FLAVOUR" = nixos ]; then
  say "Proved. The report: $REPORT. Commit it, then the README may say so."
else
  say "The script works with the $FLAVOUR VM; of NixOS it has proved nothing. The report: $REPORT"
fi
