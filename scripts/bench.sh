#!/usr/bin/env bash
# make bench [JOBS=100]: jobs a minute, in one process and through the real VM, each beside the naive loop.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh
. scripts/e2e.sh

need_go
lock "make bench"
trap finish_e2e EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
killable go test -run '^$' -bench 'NoOp|Naive' -benchtime "${JOBS:-100}x" ./daemon </dev/null
find_world "the benchmark"
packages
need_e2e
build_e2e
killable go_e2e -timeout 1h -run '^$' -bench . -benchtime "${JOBS:-100}x" ./e2e </dev/null
