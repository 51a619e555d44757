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
