# shellcheck shell=bash
# The Compose project with the settings of this folder. Sourced after world.sh.

# shellcheck disable=SC2034 # for the scripts that source this
DEMO_ENV=$OWN/demo.env
QEMU_OVERRIDE=vmimage/qemu/compose.yaml
PROJECT_ENV=()

# use_project FILE: settings of ours first, the user's .env after it, so that the user's win. Where .env has all of them, as the
# one that make demo writes, Compose needs to be told nothing.
use_project() {
  PROJECT_ENV=()
  if [ ! -f "$1" ] || env_has "$1"; then return 0; fi
  PROJECT_ENV=(--env-file "$1")
  [ ! -f "$ROOT/.env" ] || PROJECT_ENV+=(--env-file "$ROOT/.env")
}

# env_has FILE: whether .env has every setting that the file has, whatever the value.
env_has() {
  local name
  while IFS= read -r name; do
    grep -q "^$name=" "$ROOT/.env" 2>/dev/null || return 1
  done < <(sed -n 's/^\([A-Z_]*\)=.*/\1/p' "$1")
}

# An empty list is an unset one for Bash 3.2 under `set -u`.
compose() { "${COMPOSE[@]}" ${PROJECT_ENV[@]+"${PROJECT_ENV[@]}"} "$@"; }

# shown_compose: the same command as a person would type it in this folder.
shown_compose() {
  local text="${COMPOSE[*]} ${PROJECT_ENV[*]-}"
  text=${text% }
  printf '%s' "${text//$ROOT\//}"
}

project_name() {
  local name
  name=$(setting COMPOSE_PROJECT_NAME)
  printf '%s' "${name:-$(sed -n 's/^name: *//p' "$ROOT/compose.yaml")}"
}

# other_folder PROJECT: the folder that a project belongs to, if it is not this one. Another clone has the same project name
# unless it was given one, and so the same containers and volumes. Only containers say which folder they come from.
other_folder() {
  local folder
  while read -r folder; do
    if [ -n "$folder" ] && ! [ "$folder" -ef "$ROOT" ]; then
      printf '%s' "$folder"
      return
    fi
  done < <(docker ps -a --filter "label=com.docker.compose.project=$1" \
    --format '{{.Label "com.docker.compose.project.working_dir"}}' | sort -u)
}

need_own_project() {
  local name folder
  name=$(project_name)
  folder=$(other_folder "$name")
  [ -z "$folder" ] ||
    die "the project $name on this machine belongs to another folder: $folder" \
      "Go on there. To have a second one here, set in .env: COMPOSE_PROJECT_NAME=$name-2, and SSH_PORT and VIEWER_PORT of its own." \
      "If that folder is gone, or is this one by a former name: ${COMPOSE[*]-docker compose} -p $name down" \
      "removes its containers and keeps the VM's disk, keys and records. Then run this again."
}

# choose_vm_container: sets FILES, the value for COMPOSE_FILE, empty for Compose's own choice.
choose_vm_container() {
  local image
  FILES=
  image=$(sed -n 's/^ *image: \(qemux\/.*\)/\1/p' compose.yaml)
  VM_IMAGE=$image
  if [ -e /dev/net/tun ] || [ "$(uname -s)" != Linux ]; then
    # Once it runs in our own container it stays there, so that a second demo goes on with what the first one made.
    if ! grep -q "$QEMU_OVERRIDE" "$DEMO_ENV" 2>/dev/null && { image_here "$image" || pull "$image"; }; then return 0; fi
    note "the VM runs in our own QEMU container: $image is not here and can't be pulled"
  else
    note "the VM runs in our own QEMU container: /dev/net/tun is absent, which $image needs"
  fi
  FILES=compose.yaml:$QEMU_OVERRIDE
  VM_IMAGE=osbuilder/qemu
  [ ! -f compose.override.yaml ] || FILES=$FILES:compose.override.yaml
  case $(setting COMPOSE_FILE) in
    "" | *"$QEMU_OVERRIDE"*) ;;
    *) die "your COMPOSE_FILE leaves out $QEMU_OVERRIDE, which is needed on this machine." "Add it: COMPOSE_FILE=$(setting COMPOSE_FILE):$QEMU_OVERRIDE" ;;
  esac
}
