#!/usr/bin/env bash
# The end-to-end test and the NixOS VM's store with what takes make test too long. Part of make test-long.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh
. scripts/e2e.sh

need_go
lock "make test-long"
trap finish_e2e EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
find_world "the test"
packages
need_e2e
build_e2e
killable e2e_log "$LOGS/e2e-long.log" -tags e2e,long -p 2 -timeout 2h ./e2e ./e2e/store
