#!/bin/bash
# Inside the container: runs the cases and keeps what Nix said on stderr.
set -uo pipefail

nix_settings() {
  mkdir -p /etc/nix
  cat >/etc/nix/nix.conf <<'CONF'
build-users-group = nixbld
experimental-features = nix-command flakes
sandbox = false
filter-syscalls = false
require-sigs = false
substituters =
connect-timeout = 3
download-attempts = 1
log-lines = 10
system-features = nixos-test benchmark big-parallel
max-jobs = 3
CONF
  groupadd -f -g 30000 nixbld
  for n in $(seq 8); do useradd -u $((30000 + n)) -g nixbld -G nixbld -d /var/empty -s /usr/sbin/nologin -M "nixbld$n"; done
  useradd -u 1001 -m job-1
  cp -r /cases /src
  cd /src || exit
}

# Both ways do the same from the outside.
as() {
  case $WAY in
    direct) env HOME=/root "$@" ;;
    daemon) setpriv --reuid=1001 --regid=1001 --clear-groups env HOME=/home/job-1 NIX_REMOTE=daemon "$@" ;;
  esac
}

record() {
  local name=$1
  shift
  as timeout 120 "$@" 2>"/recorded/$name.log" >/dev/null </dev/null
  echo $? >"/recorded/$name.exit"
}

build() {
  local name=$1 attribute=$2 drv
  shift 2
  drv=$(as nix-instantiate build.nix -A "$attribute" 2>/dev/null)
  record "build-$name" nix-store -r "$drv" --log-format internal-json "$@"
}

evaluate() { record "eval-$1" nix-instantiate --eval --strict --json --show-trace --log-format internal-json "${@:2}"; }

start_daemon() {
  [ "$WAY" = daemon ] || return 0
  nix-daemon >/var/log/nix-daemon.log 2>&1 &
  DAEMON=$!
  for _ in $(seq 100); do
    [ -S /nix/var/nix/daemon-socket/socket ] && return
    sleep 0.1
  done
}

ordinary() {
  if [ "$WAY" = daemon ]; then record build-nodaemon nix-store -r /nix/store/00000000000000000000000000000000-x.drv --log-format internal-json; fi
  start_daemon
  for name in fail dependents killed foreign hash parallel; do build "$name" "$name"; done
  if [ "$WAY" = daemon ]; then
    for name in segfault feature empty fetch curl forkless; do build "$name" "$name"; done
    build silent slow --max-silent-time 2
  fi
  build timeout slow --timeout 2
  if [ "$WAY" = daemon ]; then
    # It dies in the middle of a build.
    (
      sleep 2
      pkill -KILL -x nix-daemon
    ) &
    build daemondies slow
    rm -f /nix/var/nix/daemon-socket/socket
    start_daemon
  fi

  # A cache that answers, in a folder.
  cached=$(nix-build --no-out-link build.nix -A cached --option substituters '' 2>/dev/null)
  nix copy --to 'file:///cache?compression=none' "$cached" 2>/dev/null
  chmod -R a+rX /cache
  nix-store --delete "$cached" >/dev/null 2>&1
  serve "file:///cache"
  build cache fromCache
  record dryrun-cache nix-store -r "$(as nix-instantiate build.nix -A dependents 2>/dev/null)" --dry-run --log-format internal-json

  # One that doesn't.
  serve "https://cache.example.invalid"
  record dryrun-nocache nix-store -r "$(as nix-instantiate build.nix -A world 2>/dev/null)" --dry-run --log-format internal-json
  build nocache after
  serve ""

  evaluate undefined eval/undefined.nix
  evaluate throw eval/throw.nix
  record eval-memory bash -c 'ulimit -v 1200000; exec nix-instantiate --eval --strict --log-format internal-json eval/memory.nix'
  # The evaluator is the same either way.
  [ "$WAY" = daemon ] || return
  evaluate syntax eval/syntax.nix
  evaluate missing-attribute eval/missing-attribute.nix
  evaluate abort eval/abort.nix
  evaluate assert eval/assert.nix
  evaluate recursion eval/recursion.nix
  evaluate type eval/type.nix
  evaluate missing-file eval/missing-file.nix
  evaluate search-path eval/search-path.nix
  evaluate download eval/download.nix
  evaluate imported eval/imported.nix
  if [ -d /nixpkgs ]; then
    for name in option unknown-option conflict assertion module-type import-missing package infinite thrown; do
      evaluate "module-$name" modules.nix --argstr nixpkgs /nixpkgs --argstr configuration "/src/eval/$name.nix"
    done
  fi
}

serve() {
  sed -i "s|^substituters.*|substituters = $1|" /etc/nix/nix.conf
  if [ "$WAY" = daemon ]; then
    kill "$DAEMON" && wait "$DAEMON" 2>/dev/null
    rm -f /nix/var/nix/daemon-socket/socket
    start_daemon
  fi
}

memory() {
  start_daemon
  build memory hungry
}

disk() {
  start_daemon
  build disk disk
  dd if=/dev/zero of=/nix/filler bs=64k 2>/dev/null
  truncate -s -128K /nix/filler
  evaluate disk --read-write-mode eval/disk.nix
}

nix_settings
"$1"
# Whoever made the folder outside may remove what is in it.
chmod -R a+rwX /recorded
