#!/usr/bin/env bash
# make test: lint, unit tests and the end-to-end test with real containers and a real VM, from whatever this machine has.
# Project name, image names, ports and folders are its own: an installation on the same machine is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh

CHECKS=
OTHERS=
FAILED=

finish() {
  if [ -n "$CHECKS" ]; then
    kill -- "-$CHECKS" 2>/dev/null || true
    wait "$CHECKS" 2>/dev/null || true
  fi
  remove_leftovers
  stop_dockerd
  unlock
}

# installations: those of the end-to-end test that were started from this folder.
installations() {
  docker ps -a --filter "label=com.docker.compose.project.working_dir=$ROOT" \
    --format '{{.Label "com.docker.compose.project"}}' 2>/dev/null | grep '^osbuilder-e2e-' | sort -u
}

# note_others: what was there before is not this run's to remove.
note_others() {
  local project
  OTHERS=$(installations || true)
  for project in $OTHERS; do
    note "$project runs or was left by an earlier test; to remove it: ${COMPOSE[*]} -p $project down --volumes"
  done
}

# remove_leftovers: for a test that was ended before it could tidy up.
remove_leftovers() {
  local project
  [ -f "$OWN/test.env" ] || return 0
  for project in $(installations || true); do
    if printf '%s\n' "$OTHERS" | grep -qxF "$project"; then continue; fi
    compose -p "$project" down --volumes --timeout 5 >>"$LOGS/test-down.log" 2>&1 || true
    # The test names the project after its folder.
    case $project in osbuilder-e2e-*[!0-9]* | osbuilder-e2e-) ;; *) rm -rf "${TMPDIR:-/tmp}/$project" 2>/dev/null || true ;; esac
  done
}

# packages: all that is missing in one go.
packages() {
  local missing=()
  have docker || missing+=(docker.io)
  have shellcheck || missing+=(shellcheck)
  have gcc || have cc || missing+=(gcc libc6-dev)
  if [ "$WORLD_REGISTRY" = no ] && ! have mmdebstrap; then missing+=(mmdebstrap); fi
  [ "${#missing[@]}" -eq 0 ] || need_packages "The test" "${missing[@]}"
}

# checks: in the background, beside the building of images, which mostly waits for the network.
checks() {
  local name start
  for name in unit e2e-build lint; do
    start=$(date +%s)
    if scripts/checks.sh $name >"$LOGS/$name.log" 2>&1 </dev/null; then
      printf '%s\t%s\tok\n' $name $(($(date +%s) - start)) >>"$LOGS/times"
      note "[$name] passed after $(($(date +%s) - start)) s"
    else
      printf '%s\t%s\tfailed\n' $name $(($(date +%s) - start)) >>"$LOGS/times"
      note "[$name] FAILED after $(($(date +%s) - start)) s; its output follows at the end"
    fi
  done
}

# write_settings: only what this machine asks for. Names, ports, folders and sizes are the end-to-end test's own.
write_settings() {
  cat >"$OWN/test.env" <<ENV
# Written by make test.
COMPOSE_PROJECT_NAME=osbuilder-test
COMPOSE_FILE=compose.yaml:vmimage/qemu/compose.yaml:scripts/compose.test.yaml
VM_FLAVOUR=debian
BASE_DEBIAN=$BASE_DEBIAN
BASE_GO=$BASE_GO
BASE_NIX=$BASE_NIX
ENV
  PROJECT_ENV=(--env-file "$OWN/test.env")
}

build_maker() { VM_FLAVOUR=nixos compose --progress plain build vmimage; }

# own_world: no setting of an installation in this folder may leak into the test's.
own_world() {
  local name
  while read -r name; do
    case $name in BASE_*) ;; *) unset "$name" ;; esac
  done < <(sed -n 's/^#\{0,1\} *\([A-Z_]*\)=.*/\1/p' .env.example)
}

end_to_end() {
  local start rc=0
  start=$(date +%s)
  say "==> End-to-end test"
  OSBUILDER_E2E_COMPOSE="${COMPOSE[*]}" OSBUILDER_E2E_ENV_FILE="$OWN/test.env" OSBUILDER_E2E_IMAGES=osbuilder-test \
    go test -race -tags e2e -count=1 -p 1 -timeout 25m -v ./e2e/... 2>&1 </dev/null | tee "$LOGS/e2e.log" || rc=$?
  if [ "$rc" -eq 0 ]; then
    printf 'e2e\t%s\tok\n' $(($(date +%s) - start)) >>"$LOGS/times"
  else
    printf 'e2e\t%s\tfailed\n' $(($(date +%s) - start)) >>"$LOGS/times"
  fi
}

summary() {
  local name
  for name in lint unit e2e-build; do
    if grep -q "^$name.*failed\$" "$LOGS/times"; then
      say ""
      say "==> What $name said (.osbuilder/log/$name.log), its end:"
      grep -Ev '^(ok|\?) ' "$LOGS/$name.log" | tail -n 150
    fi
  done
  FAILED=$(awk -F '\t' '$3 == "failed" { printf " %s", $1 }' "$LOGS/times")
  say ""
  awk -F '\t' '{ printf "  %-14s %5d s  %s\n", $1, $2, $3 }' "$LOGS/times"
  printf '  %-14s %5d s\n\n' all $(($(date +%s) - BEGAN))
  [ -z "$FAILED" ] || printf 'error: failed:%s\n       The logs: .osbuilder/log\n\n' "$FAILED"
  # go test's own words close the run.
  cat "$LOGS/unit.log" "$LOGS/e2e.log" 2>/dev/null | grep -E '^(ok|FAIL|---|panic:)' | grep -v '^--- PASS' || true
}

need_go
lock "make test"
trap finish EXIT
trap 'exit 143' INT TERM HUP
BEGAN=$(date +%s)
: >"$LOGS/times"
rm -f "$LOGS"/{unit,lint,e2e-build,e2e}.log
own_world
look
print_world
need_x86 "the test"
need_disk 10240 "the test"
packages
# A process group of their own, so that all of it can be ended.
set -m
checks &
CHECKS=$!
set +m
need_engine
need_base_debian
need_base_go
need_own_nix
need_compose
note_others
write_settings
BUILT=yes
step images "Building the sidecar, the VM's boot image and its container" compose --progress plain --profile build build || BUILT=no
step maker "Building the container that makes the NixOS VM's image, with Debian's Nix" build_maker || BUILT=no
say "==> Waiting for lint and unit tests"
wait "$CHECKS"
CHECKS=
[ "$BUILT" = no ] || end_to_end
summary
[ -z "$FAILED" ]
