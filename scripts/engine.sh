# shellcheck shell=bash
# Brings what is missing: Debian's packages, a running engine, Compose. Sourced after lib.sh and world.sh.

# Set when this run started the engine itself.
STARTED_DOCKERD=

# need_packages WHAT FOR PACKAGE…: installs Debian's packages as root; elsewhere names them and stops.
need_packages() {
  local what=$1
  shift
  if ! is_debian; then
    die "$what needs programs that are not installed here." "Install them: $*, or what your system calls them."
  elif ! is_root; then
    die "$what needs packages that are not installed." "As root: apt-get install $*"
  fi
  ask "$what needs Debian's packages $*. Install them now?" ||
    die "nothing was installed." "Install them yourself and run this again: apt-get install $*"
  step "packages-$1" "Installing Debian's packages: $*" install_packages "$@"
}

install_packages() {
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -q || return
  # The tests start a server of their own; nobody asked for one at port 22.
  if [[ " $* " == *" openssh-server "* ]] && ! have_sshd && have systemctl; then systemctl mask ssh.service ssh.socket || true; fi
  # From trixie on the client is a package of its own.
  if [ "$1" = docker.io ] && apt-cache show docker-cli >/dev/null 2>&1; then set -- "$@" docker-cli; fi
  apt-get install -q -y --no-install-recommends ca-certificates "$@"
}

# have_sshd: as a rule it lies where only root's PATH leads.
have_sshd() { have sshd || [ -x /usr/sbin/sshd ]; }

# lacks_sshd: what the tests of the link need, which are Linux's alone, is not all there.
lacks_sshd() { [ "$(uname -s)" = Linux ] && ! { have_sshd && have inotifywait; }; }

# need_engine: an engine that answers, started here only where nobody else's can be meant.
need_engine() {
  have docker || {
    if is_debian; then
      need_packages "Running containers" docker.io
    else
      die "Docker is not installed." "Install Docker Engine or Docker Desktop, version 20.10 or later: https://docs.docker.com/engine/install/"
    fi
  }
  local said
  if ! said=$(docker version --format '{{.Server.Version}}' 2>&1); then
    case $said in
      *"permission denied"*) die "this user may not use Docker." "Add yourself to its group and log in again: sudo usermod -aG docker $(id -un)" ;;
    esac
    start_engine "$said"
  fi
  WORLD_ENGINE=$(docker version --format '{{.Server.Version}}')
  at_least "$WORLD_ENGINE" 20.10 || die "Docker $WORLD_ENGINE is too old." "Install version 20.10 or later."
  look_at_engine
}

start_engine() {
  if [ -n "${DOCKER_HOST:-}" ]; then
    die "the Docker engine at DOCKER_HOST=$DOCKER_HOST does not answer." "Start it, or unset DOCKER_HOST." "It said: $1"
  elif [ "$(uname -s)" != Linux ] || ! is_root || ! have dockerd; then
    die "the Docker engine does not answer." "Start it (Docker Desktop, or: sudo systemctl start docker) and run this again." "It said: $1"
  elif [ -d /run/systemd/system ]; then
    step engine "Starting the Docker engine" systemctl start docker
  elif pgrep -x dockerd >/dev/null 2>&1; then
    # A second one would take the first one's network away.
    die "a Docker engine is running but does not answer." "See its log, stop it, and run this again." "It said: $1"
  else
    step engine "Starting the Docker engine" start_dockerd
    STARTED_DOCKERD=$(own_dockerd || true)
  fi
}

# is_own_dockerd PID: whether that process is the engine that was started here, and not one that got the number since.
is_own_dockerd() {
  [ "$(cat "/proc/${1:-none}/comm" 2>/dev/null)" = dockerd ] &&
    tr '\0' '\n' <"/proc/$1/cmdline" 2>/dev/null | grep -qxF -- "$OWN/dockerd.pid"
}

# own_dockerd: its number, if it runs.
own_dockerd() {
  local pid
  pid=$(cat "$OWN/dockerd.pid" 2>/dev/null) && is_own_dockerd "$pid" && printf '%s' "$pid"
}

# start_dockerd: for machines without an init system, as containers and CI runners are.
start_dockerd() {
  mountpoint -q /sys/fs/cgroup || mount -t cgroup2 none /sys/fs/cgroup || return
  # None runs, as was seen before; dockerd itself would heed the number of whatever has it now.
  rm -f "$OWN/dockerd.pid"
  setsid dockerd --pidfile "$OWN/dockerd.pid" >"$OWN/log/dockerd.log" 2>&1 </dev/null &
  local i
  for ((i = 0; i < 120; i++)); do
    ! docker version >/dev/null 2>&1 || return 0
    sleep 0.5
  done
  tail -n 20 "$OWN/log/dockerd.log"
  return 1
}

stop_dockerd() {
  is_own_dockerd "$STARTED_DOCKERD" || return 0
  kill "$STARTED_DOCKERD" 2>/dev/null || return 0
  local i
  for ((i = 0; i < 150; i++)); do
    is_own_dockerd "$STARTED_DOCKERD" || return 0
    sleep 0.2
  done
}

# need_compose: the user's own is left alone. One that is absent is taken out of Debian's package into this folder,
# where it runs by itself: no plugin folder and no Docker configuration is touched. Needs BASE_DEBIAN.
need_compose() {
  find_compose && return 0
  [ "$(uname -s)" = Linux ] ||
    die "Docker Compose $COMPOSE_LEAST or later is not installed." "It comes with Docker Desktop; update that."
  step compose "Fetching Docker Compose into .osbuilder/bin" fetch_compose ||
    die "Docker Compose could not be fetched from Debian's packages." "Install the Compose plugin, $COMPOSE_LEAST or later: https://docs.docker.com/compose/install/"
  find_compose || die "the Docker Compose in .osbuilder/bin does not run here." "Install the Compose plugin, $COMPOSE_LEAST or later."
}

fetch_compose() {
  mkdir -p "$OWN/bin"
  # The package comes out on standard output, so that it works with an engine that can't see this folder.
  # shellcheck disable=SC2016 # expanded in the container
  docker run --rm "$BASE_DEBIAN" sh -ec '
    exec 3>&1 >&2
    apt-get -q update
    cd /tmp
    apt-get -q -o APT::Sandbox::User=root download docker-compose
    dpkg-deb --fsys-tarfile docker-compose_*.deb | tar -xf - ./usr/libexec/docker/cli-plugins/docker-compose
    cat usr/libexec/docker/cli-plugins/docker-compose >&3
  ' >"$OWN/bin/.docker-compose.new" &&
    chmod 755 "$OWN/bin/.docker-compose.new" &&
    "$OWN/bin/.docker-compose.new" version &&
    mv "$OWN/bin/.docker-compose.new" "$OWN/bin/docker-compose"
}
