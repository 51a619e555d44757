#!/usr/bin/env bash
# make down: stops the project and removes its containers and network. Volumes, images and folders stay.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/project.sh

docker version >/dev/null 2>&1 || die "the Docker engine does not answer, so nothing of it is running." "If it should: start Docker and run this again."
find_compose || die "Docker Compose is not installed, so nothing was started here." "See: make demo"
need_own_project
use_project "$DEMO_ENV"
step down "Stopping: the VM powers itself off, which can take up to two minutes" compose down
say "Stopped. Jobs, images, the VM's disk and the records are kept."
if [ "${#PROJECT_ENV[@]}" -eq 0 ]; then
  say "Go on: make demo, or $(shown_compose) up -d"
else
  say "Go on: make demo. .env lacks some of .osbuilder/demo.env; without them plain docker compose goes on with other settings."
fi
