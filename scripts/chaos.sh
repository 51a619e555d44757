#!/usr/bin/env bash
# make chaos [SEED=NUMBER] [JOBS=NUMBER] [CONTROL=naive]: mixed jobs in a real VM while all that they run on is killed, reset, cut
# off and filled up at random; ends with a table. The same seed makes the same plan. With CONTROL=naive the runner gives way to
# the naive loop, and what passes is that the promises are seen to break.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh
. scripts/e2e.sh

SEED=${SEED:-$(date +%s)}
JOBS=${JOBS:-200}
case ${CONTROL:-} in
  "") TEST='^TestChaos$' ;;
  naive) TEST='^TestNaiveLoopBreaks$' ;;
  *) die "CONTROL=$CONTROL is not known." "CONTROL=naive puts the naive loop in the runner's place." ;;
esac

need_go
lock "make chaos"
trap finish_e2e EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
find_world "the chaos test"
packages
need_e2e
build_e2e
say "==> Chaos: SEED=$SEED JOBS=$JOBS${CONTROL:+ CONTROL=$CONTROL}, revision $(git -c safe.directory="$ROOT" rev-parse --short HEAD 2>/dev/null || echo unknown)"
export OSBUILDER_CHAOS_SEED=$SEED OSBUILDER_CHAOS_JOBS=$JOBS
killable e2e_log "$LOGS/chaos-$SEED.log" -timeout 3h -run "$TEST" ./e2e/chaos
