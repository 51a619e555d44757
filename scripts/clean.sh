#!/usr/bin/env bash
# make clean: removes what this project made, and nothing else: containers, network, volumes, images, .osbuilder, and .env if it
# is as make demo wrote it. What lies in jobs/ and output/ is the user's and stays, unless he says otherwise.
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
    grep -E '^(osbuilder|osbuilder-test|osbuilder-proof|osbuilder-prove|osbuilder-base)/[a-z-]+:' || true
}

# remove_proofs: the installations of make boot-nixos and make prove-nixos, whose settings lie beside their files.
remove_proofs() {
  local name folder
  for name in proof prove; do
    [ -f "$OWN/$name/env" ] || continue
    folder=$(other_folder "osbuilder-$name")
    if [ -n "$folder" ]; then
      say "The project osbuilder-$name belongs to another folder and stays: $folder"
      continue
    fi
    step "down-$name" "Removing the installation in .osbuilder/$name" down_proof "$OWN/$name/env" || return
  done
}

# down_proof FILE: with the settings in the file alone; those of the environment would go before them.
down_proof() (
  while read -r name; do unset "$name"; done < <(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$1")
  PROJECT_ENV=(--env-file "$1")
  compose down --volumes --remove-orphans
)

# remove_roots_files: what containers have written there as root, when this is run by somebody else.
remove_roots_files() {
  local image
  if is_root || [ ! -d "$OWN/proof" ] || rm -rf "$OWN/proof" 2>/dev/null; then return 0; fi
  for image in osbuilder-proof/debian-packages $(own_images | grep -E '(debian|qemu|vmimage-debian):') debian:trixie-slim; do
    docker image inspect "$image" >/dev/null 2>&1 || continue
    docker run --rm --network none -v "$OWN:/own" --entrypoint rm "$image" -rf /own/proof && return 0
  done
  return 0 # what is left is told at the end
}

# remove_images: one by one, since one in use by another project must not keep the rest. Sets STAYED.
remove_images() {
  local image
  STAYED=
  for image in $(own_images); do
    docker image rm "$image" || STAYED="$STAYED $image"
  done
}

# each_result FOLDER COMMAND…: with each that the sidecar put into the folder. The folder is the user's own choice and may hold more.
each_result() {
  local folder=$1 path
  shift
  for path in "$folder"/*/*; do
    if [ -f "$path/result.json" ] && [ ! -L "$path" ]; then "$@" "$path"; fi
  done
  for path in "$folder"/*/latest; do
    if [ -L "$path" ] && { [ -f "$path/result.json" ] || [ ! -e "$path" ]; }; then "$@" "$path"; fi
  done
  [ ! -d "$folder/.partial" ] || "$@" "$folder/.partial"
}

# each_drop FOLDER ACTION…: what find does with each drop that was taken or rejected. Never a list of them by lines: a name may
# have several.
each_drop() {
  local jobs=$1 folder
  shift
  for folder in "$jobs/.taken" "$jobs/rejected"; do
    [ ! -d "$folder" ] || find "$folder" -mindepth 1 -maxdepth 1 "$@" || true
  done
}

# remove_result PATH: the last one takes the folder of its name along.
remove_result() {
  rm -rf "$1" || return 0
  case $1 in */.partial) ;; *) rmdir "${1%/*}" 2>/dev/null || true ;; esac
}

# remove_results: asked for apart, since this is what all the rest was for.
remove_results() {
  [ -n "$(each_result "$OUTPUT" say && each_drop "$JOBS" -print)" ] || return 0
  if confirm "Delete the images in $OUTPUT and the jobs that were taken or rejected, too?" 1; then
    each_result "$OUTPUT" remove_result
    each_drop "$JOBS" -exec rm -rf {} +
    rmdir "$JOBS/.taken" "$JOBS/rejected" 2>/dev/null || true
  else
    say "Kept: $OUTPUT and $JOBS."
  fi
}

lock "make clean"
trap unlock EXIT
trap 'exit 143' INT TERM HUP
JOBS=$(folder JOBS_DIR ./jobs)
OUTPUT=$(folder OUTPUT_DIR ./output)
confirm "This removes the VM's disk, its keys and the records of all jobs of the project $(project_name). Go on?" 0 || die "nothing was removed."
if docker version >/dev/null 2>&1; then
  need_own_project
  if find_compose; then
    use_project "$DEMO_ENV"
    step down "Stopping and removing containers, network and volumes" compose down --volumes --remove-orphans
    remove_proofs
  else
    say "Docker Compose is not installed: containers and volumes, if there are any, stay."
  fi
  remove_roots_files
  step images "Removing the images of this project" remove_images
  [ -z "$STAYED" ] || note "stayed, being in use:$STAYED"
else
  say "The Docker engine does not answer: containers, volumes and images, if there are any, stay."
fi
remove_results
if STARTED_DOCKERD=$(own_dockerd); then
  if [ -z "$(docker ps -q 2>/dev/null)" ]; then
    say "==> Stopping the Docker engine that make demo had started"
    stop_dockerd
  else
    say "Other containers are running: the Docker engine that make demo had started stays. It stops with: kill $STARTED_DOCKERD"
  fi
fi
if demos_env; then
  rm -f .env
elif [ -e .env ]; then
  say "Kept: .env, which has settings of yours."
fi
rm -rf "$OWN" || die "not all of .osbuilder could be removed: some of it is another user's." "As root: rm -rf $OWN"
say "Removed. What Docker keeps of builds is shared with your other projects: docker builder prune removes it for all of them."
