#!/usr/bin/env bash
# make test: vet, unit tests and the end-to-end test with real containers and a real VM, from whatever this machine has.
# Project name, image names, ports and folders are its own: an installation on the same machine is not touched.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh
. scripts/e2e.sh

CHECKS=
FAILED=

finish() {
  if [ -n "$CHECKS" ]; then
    kill -- "-$CHECKS" 2>/dev/null || true
    wait "$CHECKS" 2>/dev/null || true
  fi
  finish_e2e
}

# checks: in the background, beside the building of images, which mostly waits for the network, and the end-to-end test.
checks() {
  local name start
  for name in unit e2e-build vet; do
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

build_maker() { VM_FLAVOUR=nixos compose --progress plain build vmimage; }

end_to_end() {
  local start rc=0
  start=$(date +%s)
  say "==> End-to-end test"
  # Three at a time: each waits more than it computes.
  # The naive loop, which breaks what is promised, is part of make test-long.
  killable e2e_log "$LOGS/e2e.log" -p 3 -timeout 45m -skip '^TestNaiveLoopBreaks$' ./e2e/... || rc=$?
  if [ "$rc" -eq 0 ]; then
    printf 'e2e\t%s\tok\n' $(($(date +%s) - start)) >>"$LOGS/times"
  else
    printf 'e2e\t%s\tfailed\n' $(($(date +%s) - start)) >>"$LOGS/times"
  fi
}

summary() {
  local name
  for name in vet unit e2e-build; do
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
rm -f "$LOGS"/{unit,vet,e2e-build,e2e}.log
find_world "the test"
packages
# A process group of their own, so that all of it can be ended.
set -m
checks &
CHECKS=$!
set +m
need_e2e
BUILT=yes
build_e2e || BUILT=no
step maker "Building the container that makes the NixOS VM's image, with Debian's Nix" build_maker || BUILT=no
# Beside the unit tests: each of the two waits more than it computes, and together they take two thirds of the time.
[ "$BUILT" = no ] || end_to_end
say "==> Waiting for vet and unit tests"
wait "$CHECKS"
CHECKS=
summary
[ -z "$FAILED" ]
