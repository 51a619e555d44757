#!/usr/bin/env bash
# make test-long: what takes too long for make test, one after another, whatever fails. Each test is one line below and brings
# what it needs. ONLY='NAME NAME' runs some of them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

TABLE=$LOGS/test-long
FAILED=

# long NAME COMMAND…: one test. What it says is in .osbuilder/log/long-NAME.log.
long() {
  local name=$1 start rc=0 outcome=ok
  shift
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  start=$(date +%s)
  say "==> $name: $*"
  killable "$@" >"$LOGS/long-$name.log" 2>&1 </dev/null || rc=$?
  if [ "$rc" -ne 0 ]; then
    outcome="failed ($rc)"
    FAILED="$FAILED $name"
    tail -n 30 "$LOGS/long-$name.log" | sed 's/^/    | /'
  fi
  printf '%s\t%s\t%s\n' "$name" $(($(date +%s) - start)) "$outcome" >>"$TABLE"
  note "$outcome, $(($(date +%s) - start)) s"
}

need_go
trap end_killable EXIT
trap 'exit 143' INT TERM HUP
: >"$TABLE"

long lint scripts/checks.sh lint
long e2e scripts/e2e-long.sh
long chaos-1 env SEED=1 JOBS=200 scripts/chaos.sh
long chaos-2 env SEED=2 JOBS=200 scripts/chaos.sh
long chaos-3 env SEED=3 JOBS=200 scripts/chaos.sh
long model go test -tags long -timeout 30m -run LargerBounds ./pipe/model
long crash-points go test -tags long -v -timeout 12h -run 'TestStopped$' ./daemon
long fuzz env FUZZTIME=60s ONLY= scripts/checks.sh fuzz
long bench env JOBS=100 scripts/bench.sh
long soak env MINUTES=60 scripts/checks.sh soak
long chaos-naive env SEED=1 JOBS=20 CONTROL=naive scripts/chaos.sh

say ""
say "make test-long, $(date -u +%Y-%m-%d), revision $(git -c safe.directory="$ROOT" describe --always --dirty 2>/dev/null || echo unknown)"
awk -F '\t' '{ printf "  %-16s %6d s  %s\n", $1, $2, $3 }' "$TABLE"
[ -z "$FAILED" ] || die "failed:$FAILED" "The logs: .osbuilder/log/long-NAME.log"
