#!/usr/bin/env bash
# make demo: from whatever this machine has to a bootable image in the output folder, in one go.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh

FOLLOW=

finish() {
  [ -z "$FOLLOW" ] || kill "$FOLLOW" 2>/dev/null || true
  unlock
}

# choose_flavour: sets FLAVOUR, of the VM, and with it EXAMPLE, the job. NixOS needs a binary cache and an image with Nix. Once
# the VM has run it, it stays so: what it needs lies on its disk.
choose_flavour() {
  FLAVOUR=$(setting VM_FLAVOUR)
  if [ -n "$FLAVOUR" ]; then
    note "the VM's flavour is $FLAVOUR, as VM_FLAVOUR says"
  elif [ "$WORLD_NIX" = yes ] && find_base_nix; then
    FLAVOUR=nixos
    note "the VM runs NixOS: the Nix cache can be reached, and $BASE_NIX is here"
  elif grep -q '^VM_FLAVOUR=nixos$' "$DEMO_ENV" 2>/dev/null; then
    FLAVOUR=nixos
    note "the VM runs NixOS, as in the last demo"
  else
    FLAVOUR=debian
    if [ "$WORLD_NIX" = no ]; then
      note "the VM runs Debian: the NixOS one needs cache.nixos.org, which can't be reached"
    else
      note "the VM runs Debian: the NixOS one needs $BASE_NIX, which is not here and can't be pulled"
    fi
  fi
  case $FLAVOUR in
    nixos)
      EXAMPLE=minimal.nix
      find_base_nix || die "making the NixOS VM needs $BASE_NIX, which is not here and can't be pulled." \
        "Without a registry: VM_FLAVOUR=debian in .env, or leave it out. BASE_NIX names another image with Nix."
      need_disk 20480 "the demo with NixOS"
      is_x86 || note "warning: the containers here are $WORLD_ARCH and the VM is x86-64: all is emulated, many times slower (see docs/vm-image.md)"
      ;;
    debian)
      EXAMPLE=hello-iso.sh
      need_x86 "the Debian VM"
      ;;
    *) die "VM_FLAVOUR=$FLAVOUR is not known." "It is nixos or debian." ;;
  esac
  NAME=${EXAMPLE%.*}
  [ -f "examples/$EXAMPLE" ] || die "examples/$EXAMPLE is missing." "Restore it: git checkout examples/$EXAMPLE"
}

# lowered VALUE LIMIT: the lower of two numbers.
lowered() { if [ "$1" -lt "$2" ]; then printf '%s' "$1"; else printf '%s' "$2"; fi; }

# kept NAME VALUE: what the last run wrote, else VALUE. Memory and disk in use change from run to run, and a change of
# these would start the VM anew.
kept() {
  local before
  before=$(sed -n "s/^$1=//p" "$DEMO_ENV" 2>/dev/null || true)
  say "$1=${before:-$2}"
}

# need_own_folders: in a rootless engine user 0 is who runs it, and any other would keep him out of his jobs folder.
need_own_folders() {
  case $WORLD_ROOTLESS,$(setting PUID) in
    no,* | yes, | yes,0) ;;
    *) die "Docker is rootless here, and PUID=$(setting PUID) is not you in it." "You are user 0 there: PUID=0 and PGID=0, or leave them out." ;;
  esac
}

# write_settings: what this machine asks for, as .env where there is none. Environment and .env are read by Compose after it
# and win.
write_settings() {
  local memory disk as_env=no
  # The VM leaves room for the host; below 2 GiB its Nix has none.
  memory=$(lowered 16 $((WORLD_MEMORY * 6 / 10 / 1024)))
  [ "$memory" -ge 2 ] || [ -f "$DEMO_ENV" ] || [ -n "$(setting RAM_SIZE)" ] ||
    die "$((WORLD_MEMORY / 1024)) GiB of memory are available; the VM needs 2 GiB of them and the host some." "Free some, or set RAM_SIZE in .env."
  disk=$(lowered 128 $((WORLD_DISK / 2 / 1024)))
  {
    say "# Written by make demo for this machine. As .env it is yours once you have changed it: make demo and make clean leave it alone then."
    [ -z "$FILES" ] || printf '%s\n' "# A compose.override.yaml counts only if it is named here." "COMPOSE_FILE=$FILES"
    say "BASE_DEBIAN=$BASE_DEBIAN"
    say "BASE_GO=$BASE_GO"
    say "VM_FLAVOUR=$FLAVOUR"
    [ -z "${BASE_NIX:-}" ] || say "BASE_NIX=$BASE_NIX"
    kept CPU_CORES "$(lowered 4 "$WORLD_CORES")"
    kept RAM_SIZE "${memory}G"
    kept DISK_SIZE "${disk}G"
    # Root stays outside: the daemon runs as an ordinary user.
    if [ "$WORLD_ROOTLESS" = yes ]; then
      say "PUID=0"
      say "PGID=0"
    elif ! is_root; then
      say "PUID=$(id -u)"
      say "PGID=$(id -g)"
    elif [ -n "${SUDO_UID:-}" ]; then
      say "PUID=$SUDO_UID"
      say "PGID=${SUDO_GID:-$SUDO_UID}"
    fi
  } >"$DEMO_ENV.new"
  # What Compose is told without this script shall be the same: with other settings it would change the VM and its folders' owner.
  if [ ! -e .env ] || demos_env; then as_env=yes; fi
  mv "$DEMO_ENV.new" "$DEMO_ENV"
  [ "$as_env" = yes ] || return 0
  cp "$DEMO_ENV" "$DEMO_ENV.new"
  # Under sudo, it is to be changed by who called that.
  if is_root && [ -n "${SUDO_UID:-}" ]; then chown "$SUDO_UID" "$DEMO_ENV.new"; fi
  mv "$DEMO_ENV.new" .env
}

# need_port VARIABLE DEFAULT: free, unless it is our own VM that has it.
need_port() {
  local port address
  port=$(setting "$1")
  port=${port:-$2}
  address=$(setting BIND_ADDRESS)
  case $address in "" | 0.0.0.0) address=127.0.0.1 ;; esac
  # shellcheck disable=SC2016 # expanded by the inner shell
  if bounded 2 bash -c 'exec 3<>"/dev/tcp/$0/$1"' "$address" "$port" 2>/dev/null; then
    die "port $port of this machine is in use by another program." "Choose another one: $1=NUMBER in .env, or $1=NUMBER make demo"
  fi
}

# results_in FOLDER: the jobs that have ended there.
results_in() {
  local result
  for result in "$1"/*/result.json; do
    result=${result%/result.json}
    # The link `latest` shows one of them a second time.
    if [ -f "$result/result.json" ] && [ ! -L "$result" ]; then say "$result"; fi
  done
}

# drop_job: puts the example in whole, by rename. Sets BEFORE, what had ended by then.
drop_job() {
  local temporary=$JOBS/.$EXAMPLE.$$
  BEFORE=$(results_in "$OUTPUT/$NAME")
  cp "examples/$EXAMPLE" "$temporary"
  mv "$temporary" "$JOBS/$EXAMPLE"
  say "==> Put examples/$EXAMPLE into $JOBS. The sidecar says from here on:"
}

# follow: what the sidecar says from STARTED on, into a file. By the program itself and not by our function, whose process
# would leave it behind when it is ended.
follow() {
  : >"$LOGS/sidecar.log"
  SHOWN=0 COLOR='' UNCOLOR=''
  if [ -t 1 ] && [ -z "${NO_COLOR:-}" ] && [ "${TERM:-dumb}" != dumb ]; then COLOR=$(printf '\033[36m') UNCOLOR=$(printf '\033[0m'); fi
  "${COMPOSE[@]}" ${PROJECT_ENV[@]+"${PROJECT_ENV[@]}"} --ansi never logs -f --no-log-prefix --since "$STARTED" sidecar \
    >"$LOGS/sidecar.log" 2>&1 </dev/null &
  FOLLOW=$!
}

# show: what has been added to that file since the last time, without the control codes that Compose puts before a line. On a
# terminal the job's name is coloured.
show() {
  local size
  size=$(wc -c <"$LOGS/sidecar.log" | tr -d ' ')
  [ "$size" -gt "$SHOWN" ] || return 0
  tail -c "+$((SHOWN + 1))" "$LOGS/sidecar.log" | head -c "$((size - SHOWN))" | plain | sed "s/^\($NAME *\) |/$COLOR\1$UNCOLOR |/"
  SHOWN=$size
}

# wait_for_job: until the job that was dropped has ended. Sets RESULT, its folder.
wait_for_job() {
  local start result limit=1800
  start=$(date +%s)
  # The first NixOS image downloads, and without KVM all of it is slow.
  [ "$FLAVOUR" = debian ] || limit=10800
  RESULT=
  while [ -z "$RESULT" ]; do
    sleep 0.5
    show
    while IFS= read -r result; do
      printf '%s\n' "$BEFORE" | grep -qxF "$result" || RESULT=$result
    done < <(results_in "$OUTPUT/$NAME")
    if [ -n "$RESULT" ]; then break; fi
    kill -0 "$FOLLOW" 2>/dev/null || die "the sidecar stopped." "Its log: $(shown_compose) logs sidecar"
    [ $(($(date +%s) - start)) -lt "$limit" ] ||
      die "the job has not ended within $((limit / 60)) minutes." "It goes on. The VM's console: $(shown_compose) logs vm" "The sidecar: $(shown_compose) logs sidecar"
  done
  # The last lines of the log are still on their way.
  sleep 1
  show
  kill "$FOLLOW" 2>/dev/null || true
  FOLLOW=
}

# report: the image, checked again on this side, and how to boot it.
report() {
  local sum name image='' size=0 bytes memory=512
  grep -Eq '"status": *"succeeded"' "$RESULT/result.json" ||
    die "the job did not succeed: $(sed -n 's/^ *"reason": *"\(.*\)",\{0,1\}$/\1/p' "$RESULT/result.json" | plain)" "What it said: $RESULT/build.log" "The result: $RESULT/result.json"
  while read -r sum name; do
    name=${name#\*}
    [ "$(sha256 "$RESULT/$name")" = "$sum" ] || die "$RESULT/$name is not what the VM made: its sha256 differs from SHA256SUMS."
    bytes=$(wc -c <"$RESULT/$name" | tr -d ' ')
    if [ "$bytes" -ge "$size" ]; then image=$name size=$bytes SUM=$sum; fi
  done <"$RESULT/SHA256SUMS"
  say ""
  if [ "$FLAVOUR" = nixos ]; then
    memory=2048
    say "Done: a NixOS image from examples/$EXAMPLE, built in a NixOS VM."
  else
    say "Done: a small test image, built in a Debian VM. Neither of them is NixOS."
  fi
  note "image   $RESULT/$image"
  note "size    $(human_size "$size") ($size bytes)"
  note "sha256  $SUM (computed again on this machine: the same)"
  say "Boot it, and end it with Ctrl-A X:"
  if have qemu-system-x86_64; then
    note "qemu-system-x86_64 -m $memory -nographic -cdrom $(printf '%q' "$RESULT/$image")"
  else
    local folder
    folder=$(cd "$RESULT" && pwd -P)
    note "docker run --rm -it -v $(printf '%q' "$folder"):/image:ro --entrypoint qemu-system-x86_64 $VM_IMAGE -m $memory -nographic -cdrom /image/$image"
  fi
  say "It goes on running. Put jobs into the jobs folder; images appear in $OUTPUT."
  if [ "${#PROJECT_ENV[@]}" -eq 0 ]; then
    note "settings    .env; after a change: $(shown_compose) up -d"
  else
    note "settings    .env, which lacks some of .osbuilder/demo.env: put them there, or plain docker compose has others than make demo"
  fi
  note "follow it   $(shown_compose) logs -f sidecar"
  note "stop it     make down"
  note "remove it   make clean"
  local engine
  if engine=$(own_dockerd); then note "the engine  was started by make demo; it stops with: kill $engine"; fi
}

lock "make demo"
trap finish EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
say "This demo builds a bootable image in a VM, all in containers on this machine."
JOBS=$(folder JOBS_DIR ./jobs)
OUTPUT=$(folder OUTPUT_DIR ./output)
look
print_world
need_disk 6144 "the demo"
need_engine
need_own_folders
need_own_project
choose_flavour
need_base_debian
need_base_go
need_compose
choose_vm_container
write_settings
use_project "$DEMO_ENV"
if [ -z "$(compose ps --status running -q vm 2>/dev/null)" ]; then
  need_port SSH_PORT 2022
  [ -n "$FILES" ] || need_port VIEWER_PORT 8006
fi
step build "Building the sidecar, the VM's boot image and its container (minutes the first time, seconds later)" compose --progress plain build
say "What the VM gets, of what this machine has:"
# The daemon's own words, which are in its log, too. Whatever is wrong with it, the next steps say.
compose run --rm --no-deps -T sidecar preflight 2>>"$LOGS/preflight.log" </dev/null || note "not known; see .osbuilder/log/preflight.log"
STARTED=$(date -u +%Y-%m-%dT%H:%M:%SZ)
if [ "$FLAVOUR" = nixos ]; then
  # Apart, so that its steps are seen.
  step vmimage "Making the NixOS VM's boot image, if it is not there (5 to 15 minutes the first time, an estimate)" \
    compose --ansi never up --no-log-prefix --exit-code-from vmimage vmimage
fi
step up "Starting them" compose up -d
follow
drop_job
wait_for_job
report
