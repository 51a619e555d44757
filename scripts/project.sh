# shellcheck shell=bash
# The Compose project with the settings of this folder. Sourced after world.sh.

# shellcheck disable=SC2034 # for the scripts that source this
DEMO_ENV=$OWN/demo.env
PROJECT_ENV=()

# use_project [FILE]: settings of ours first, the user's .env after it, so that the user's win.
use_project() {
  PROJECT_ENV=()
  [ -z "${1:-}" ] || [ ! -f "$1" ] || PROJECT_ENV=(--env-file "$1")
  if [ -f "$ROOT/.env" ] && [ "${#PROJECT_ENV[@]}" -gt 0 ]; then PROJECT_ENV+=(--env-file "$ROOT/.env"); fi
}

# An empty list is an unset one for Bash 3.2 under `set -u`.
compose() { "${COMPOSE[@]}" ${PROJECT_ENV[@]+"${PROJECT_ENV[@]}"} "$@"; }

# shown_compose: the same command as a person would type it in this folder.
shown_compose() {
  local text="${COMPOSE[*]} ${PROJECT_ENV[*]-}"
  printf '%s' "${text//$ROOT\//}"
}

project_name() {
  local name
  name=$(setting COMPOSE_PROJECT_NAME)
  printf '%s' "${name:-$(sed -n 's/^name: *//p' "$ROOT/compose.yaml")}"
}

# need_own_project: another clone has the same project name unless it was given one, and so the same containers and volumes.
# Only containers say which folder they come from.
need_own_project() {
  local name folder
  name=$(project_name)
  while read -r folder; do
    if [ -z "$folder" ] || [ "$folder" -ef "$ROOT" ]; then continue; fi
    die "the project $name on this machine belongs to another folder: $folder" \
      "Go on there. To have a second one here, set in .env: COMPOSE_PROJECT_NAME=$name-2, and SSH_PORT and VIEWER_PORT of its own." \
      "If that folder is gone, or is this one by a former name: ${COMPOSE[*]-docker compose} -p $name down" \
      "removes its containers and keeps the VM's disk, keys and records. Then run this again."
  done < <(docker ps -a --filter "label=com.docker.compose.project=$name" \
    --format '{{.Label "com.docker.compose.project.working_dir"}}' | sort -u)
}
