#!/usr/bin/env bash
# make clean: removes what this project made, and nothing else: containers, network, volumes, images, .osbuilder.
# What lies in jobs/ and output/ is the user's and stays, unless he says otherwise.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/project.sh

confirm() {
  [ -t 0 ] && [ -t 1 ] || return "$2"
  local answer
  printf '%s [y/N] ' "$1"
  read -r answer && case $answer in y | Y | yes) return 0 ;; *) return 1 ;; esac
}

# own_images: by our own names only. Debian and Go images that were pulled may serve others.
own_images() {
  docker image ls --format '{{.Repository}}:{{.Tag}}' |
    grep -E '^(osbuilder|osbuilder-test|osbuilder-base)/[a-z-]+:' || true
}

remove_images() {
  local images
  images=$(own_images)
  # shellcheck disable=SC2086 # one word each
  [ -z "$images" ] || docker image rm $images
}

# remove_results: asked for apart, since this is what all the rest was for.
remove_results() {
  local jobs output
  jobs=$(setting JOBS_DIR)
  output=$(setting OUTPUT_DIR)
  jobs=${jobs:-./jobs}
  output=${output:-./output}
  if [ -z "$(find "$output" "$jobs/.taken" "$jobs/rejected" -mindepth 1 ! -name .gitkeep 2>/dev/null | head -n 1)" ]; then return 0; fi
  if confirm "Delete the images in $output and the jobs that were taken or rejected, too?" 1; then
    find "$output" -mindepth 1 ! -name .gitkeep -delete
    rm -rf "$jobs/.taken" "$jobs/rejected"
  else
    say "Kept: $output and $jobs."
  fi
}

lock "make clean"
trap unlock EXIT
trap 'exit 143' INT TERM HUP
confirm "This removes the VM's disk, its keys and the records of all jobs. Go on?" 0 || die "nothing was removed."
if docker version >/dev/null 2>&1; then
  if find_compose; then
    use_project "$DEMO_ENV"
    step down "Stopping and removing containers, network and volumes" compose down --volumes --remove-orphans
  fi
  step images "Removing the images of this project" remove_images
else
  say "The Docker engine does not answer: containers, volumes and images, if there are any, stay."
fi
remove_results
if [ -f "$OWN/dockerd.pid" ] && STARTED_DOCKERD=$(cat "$OWN/dockerd.pid") && kill -0 "$STARTED_DOCKERD" 2>/dev/null; then
  if [ -z "$(docker ps -q 2>/dev/null)" ]; then
    say "==> Stopping the Docker engine that make demo had started"
    stop_dockerd
  else
    say "Other containers are running: the Docker engine that make demo had started stays. It stops with: kill $STARTED_DOCKERD"
  fi
fi
rm -rf "$OWN"
say "Removed. What Docker keeps of builds is shared with your other projects: docker builder prune removes it for all of them."
