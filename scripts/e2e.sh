# shellcheck shell=bash
# What the tests with real containers and a real VM share. Project name, image names, ports and folders are their own: an
# installation on the same machine is not touched. Sourced after project.sh.

OTHERS=

# installations: those of the end-to-end test that were started from this folder.
installations() {
  local file
  {
    docker ps -a --filter "label=com.docker.compose.project.working_dir=$ROOT" --format '{{.Label "com.docker.compose.project"}}' 2>/dev/null |
      grep '^osbuilder-e2e-' || true
    # One that has no container yet, or is a clone of its own. The harness leaves this file in its folder.
    for file in "${TMPDIR:-/tmp}"/osbuilder-e2e-*/.checkout; do
      if [ "$(cat "$file" 2>/dev/null)" = "$ROOT" ]; then basename "$(dirname "$file")"; fi
    done
  } | sort -u
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
  local project dir
  [ -f "$OWN/test.env" ] || return 0
  for project in $(installations || true); do
    if printf '%s\n' "$OTHERS" | grep -qxF "$project"; then continue; fi
    compose -p "$project" down --volumes --timeout 5 >>"$LOGS/test-down.log" 2>&1 || true
    # Some folders are file systems of their own: see Disk in the harness.
    for dir in output storage; do umount "${TMPDIR:-/tmp}/$project/$dir" 2>/dev/null || true; done
    # The test names the project after its folder.
    case $project in osbuilder-e2e-*[!0-9]* | osbuilder-e2e-) ;; *) rm -rf "${TMPDIR:-/tmp}/$project" 2>/dev/null || true ;; esac
  done
}

finish_e2e() {
  end_killable
  remove_leftovers
  stop_dockerd
  unlock
}

# packages: all that is missing in one go.
packages() {
  local missing=()
  have docker || missing+=(docker.io)
  have shellcheck || missing+=(shellcheck)
  have gcc || have cc || missing+=(gcc libc6-dev)
  if lacks_sshd; then missing+=(openssh-server inotify-tools); fi
  if [ "$WORLD_REGISTRY" = no ] && ! have mmdebstrap; then missing+=(mmdebstrap); fi
  [ "${#missing[@]}" -eq 0 ] || need_packages "The test" "${missing[@]}"
}

# write_settings: only what this machine asks for. Names, ports, folders and sizes are the end-to-end test's own.
write_settings() {
  cat >"$OWN/test.env" <<ENV
# Written by scripts/e2e.sh.
COMPOSE_PROJECT_NAME=osbuilder-test
COMPOSE_FILE=compose.yaml:vmimage/qemu/compose.yaml:scripts/compose.test.yaml
VM_FLAVOUR=debian
BASE_DEBIAN=$BASE_DEBIAN
BASE_GO=$BASE_GO
BASE_NIX=$BASE_NIX
ENV
  # shellcheck disable=SC2034 # project.sh reads it
  PROJECT_ENV=(--env-file "$OWN/test.env")
}

# own_world: no setting of an installation in this folder may leak into the test's.
own_world() {
  local name
  while read -r name; do
    case $name in BASE_*) ;; *) unset "$name" ;; esac
  done < <(sed -n 's/^#\{0,1\} *\([A-Z_]*\)=.*/\1/p' .env.example)
}

# find_world WHAT: reads the world, and says whether WHAT can be done in it.
find_world() {
  own_world
  look
  print_world
  need_x86 "$1"
  need_disk 10240 "$1"
}

# need_e2e: brings engine, base images and Compose.
need_e2e() {
  need_engine
  need_base_debian
  need_base_go
  need_own_nix
  need_compose
  note_others
  write_settings
}

build_e2e() {
  step images "Building the sidecar, the VM's boot image and its container" compose --progress plain --profile build build
}

# go_e2e ARGUMENT…: runs Go tests that need all of it.
go_e2e() {
  OSBUILDER_E2E_COMPOSE="${COMPOSE[*]}" OSBUILDER_E2E_ENV_FILE="$OWN/test.env" OSBUILDER_E2E_IMAGES=osbuilder-test \
    go test -race -vet off -tags e2e -count=1 -v "$@"
}

# e2e_log LOG ARGUMENT…: the same, and what they say is kept.
e2e_log() {
  local log=$1
  shift
  go_e2e "$@" 2>&1 </dev/null | tee "$log"
}
