# shellcheck shell=bash
# What this machine has, found out before anything is changed. Sourced; sets variables that begin with WORLD_.

# The VM in the demo's own QEMU needs `!override`; a Compose without it would start the wrong container.
COMPOSE_LEAST=2.24.4

is_debian() { [ -r /etc/os-release ] && grep -Eq '^(ID|ID_LIKE)=.*debian' /etc/os-release && have apt-get; }
is_root() { [ "$(id -u)" = 0 ]; }

# answers URL: whether a server answers there, in a few seconds and whatever it says.
answers() {
  local host=${1#https://}
  host=${host%%/*}
  if have curl; then
    curl -s -o /dev/null --connect-timeout 4 --max-time 6 "$1"
  elif have wget; then
    # 8 is wget's code for "the server answered with an error".
    wget -q -T 4 -t 1 -O /dev/null "$1" || [ $? = 8 ]
  else
    # shellcheck disable=SC2016 # expanded by the inner shell
    bounded 4 bash -c 'exec 3<>"/dev/tcp/$0/443"' "$host" 2>/dev/null
  fi
}

# find_compose: the user's own Compose if it is new enough, else the one in this folder. Sets COMPOSE, a list, and WORLD_COMPOSE.
find_compose() {
  local version
  WORLD_COMPOSE=
  COMPOSE=()
  if version=$(docker compose version --short 2>/dev/null) && at_least "$version" $COMPOSE_LEAST; then
    COMPOSE=(docker compose)
  elif version=$(docker-compose version --short 2>/dev/null) && at_least "$version" $COMPOSE_LEAST; then
    COMPOSE=(docker-compose)
  elif [ -x "$OWN/bin/docker-compose" ] && version=$("$OWN/bin/docker-compose" version --short 2>/dev/null); then
    COMPOSE=("$OWN/bin/docker-compose")
  else
    return 1
  fi
  WORLD_COMPOSE=$version
}

# look: reads the world without changing it.
look() {
  WORLD_ENGINE=$(docker version --format '{{.Server.Version}}' 2>/dev/null || true)
  find_compose || true
  WORLD_REGISTRY=no WORLD_NIX=no
  ! answers https://registry-1.docker.io/v2/ || WORLD_REGISTRY=yes
  ! answers https://cache.nixos.org/nix-cache-info || WORLD_NIX=yes
  WORLD_KVM=no
  [ ! -e /dev/kvm ] || WORLD_KVM=yes
  WORLD_CORES=$(getconf _NPROCESSORS_ONLN)
  if [ -r /proc/meminfo ]; then
    WORLD_MEMORY=$(awk '/^MemTotal:/ { t = $2 } /^MemAvailable:/ { a = $2 } END { print int((a ? a : t) / 1024) }' /proc/meminfo)
  else
    WORLD_MEMORY=$(($(sysctl -n hw.memsize) / 1048576))
  fi
  look_at_engine
}

# look_at_engine: where the engine runs in a VM of its own, what that one has is what counts.
look_at_engine() {
  WORLD_ENGINE_ROOT=
  # shellcheck disable=SC2034 # for the scripts that source this
  WORLD_ROOTLESS=no
  WORLD_ARCH=$(uname -m)
  if [ -n "$WORLD_ENGINE" ]; then
    local cores bytes
    cores=$(docker info --format '{{.NCPU}}' 2>/dev/null || true)
    bytes=$(docker info --format '{{.MemTotal}}' 2>/dev/null || true)
    if [ "${cores:-0}" -gt 0 ] && [ "$cores" -lt "$WORLD_CORES" ]; then WORLD_CORES=$cores; fi
    if [ "${bytes:-0}" -gt 0 ] && [ $((bytes / 1048576)) -lt "$WORLD_MEMORY" ]; then WORLD_MEMORY=$((bytes / 1048576)); fi
    WORLD_ARCH=$(docker info --format '{{.Architecture}}' 2>/dev/null || echo "$WORLD_ARCH")
    WORLD_ENGINE_ROOT=$(docker info --format '{{.DockerRootDir}}' 2>/dev/null || true)
    # shellcheck disable=SC2034
    case $(docker info --format '{{.SecurityOptions}}' 2>/dev/null) in *name=rootless*) WORLD_ROOTLESS=yes ;; esac
  fi
  WORLD_DISK=$(megabytes_free "$ROOT")
  # The images and the VM's disk lie with the engine.
  if [ -n "$WORLD_ENGINE_ROOT" ] && [ -d "$WORLD_ENGINE_ROOT" ]; then
    local there
    there=$(megabytes_free "$WORLD_ENGINE_ROOT")
    if [ -n "$there" ] && [ "$there" -lt "$WORLD_DISK" ]; then WORLD_DISK=$there; fi
  fi
}

gib() { awk -v m="${1:-0}" 'BEGIN { printf "%.0f", m / 1024 }'; }

# output_folder: where images will appear, or this folder if that one is not there yet.
output_folder() {
  local folder
  folder=$(folder OUTPUT_DIR ./output)
  if [ -d "$folder" ]; then printf '%s' "$folder"; else printf '%s' "$ROOT"; fi
}

print_world() {
  local engine="none" compose="none, or older than $COMPOSE_LEAST" registry="no answer" nix="no answer" kvm="no device: software emulation, slow"
  [ -z "$WORLD_ENGINE" ] || engine="Docker $WORLD_ENGINE"
  [ -z "$WORLD_COMPOSE" ] || compose="$WORLD_COMPOSE (${COMPOSE[*]})"
  [ "$WORLD_REGISTRY" = no ] || registry="reachable"
  [ "$WORLD_NIX" = no ] || nix="reachable"
  [ "$WORLD_KVM" = no ] || kvm="device present; the VM's container tries whether it works"
  say "This machine:"
  note "engine      $engine"
  note "Compose     $compose"
  note "registry    $registry"
  note "Nix cache   $nix"
  note "KVM         $kvm"
  note "memory      $(awk -v m="$WORLD_MEMORY" 'BEGIN { printf "%.1f", m / 1024 }') GiB available, $WORLD_CORES cores"
  note "disk        $(gib "$(megabytes_free "$(output_folder)")") GiB free for images, $(gib "$WORLD_DISK") GiB with Docker, where the VM's disk grows"
}

# need_disk MEGABYTES WHAT FOR
need_disk() {
  [ "$WORLD_DISK" -ge "$1" ] ||
    die "$((WORLD_DISK / 1024)) GiB of disk are free; $2 needs about $(($1 / 1024)) GiB." \
      "Make room on the disk of ${WORLD_ENGINE_ROOT:-Docker} and of this folder, then run it again." \
      "docker system df says what Docker holds."
}

is_x86() { case $WORLD_ARCH in x86_64 | amd64) ;; *) return 1 ;; esac }

# need_x86 WHAT: before hours of emulation, or an error from within a build.
need_x86() {
  is_x86 || die "the containers of this machine are $WORLD_ARCH; $1 needs an x86-64 host." \
    "Run it on an x86-64 machine, or set DOCKER_HOST to the engine of one."
}
