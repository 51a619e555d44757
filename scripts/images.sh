# shellcheck shell=bash
# The images that ours are built from: found, else pulled, else made from Debian's packages under names of our own.
# Sourced after engine.sh.

OWN_DEBIAN=osbuilder-base/debian:trixie-slim
OWN_GO=osbuilder-base/golang:1.26
OWN_NIX=osbuilder-base/nix:trixie

image_here() { docker image inspect "$1" >/dev/null 2>&1; }

# pull IMAGE: 0 when it is here afterwards. A registry that says nothing within a few seconds is taken as absent; once it
# has answered, the pull may take its time.
pull() {
  local log=$LOGS/pull.log pid waited=0 said=
  : >"$log"
  docker pull "$1" >"$log" 2>&1 </dev/null &
  pid=$!
  while kill -0 "$pid" 2>/dev/null && ! grep -q 'Pulling from' "$log"; do
    if [ "$waited" -ge 40 ]; then
      kill "$pid" 2>/dev/null
      said="no answer within 8 s"
      break
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
  if grep -q 'Pulling from' "$log"; then note "pulling $1"; fi
  if wait "$pid" 2>/dev/null && image_here "$1"; then return 0; fi
  # Said, so that a rate limit or a fault of the name service doesn't pass for a machine without a registry.
  note "$1 can't be pulled: ${said:-$(tail -n 1 "$log" | plain | cut -c 1-200)}"
  return 1
}

# need_base_debian: sets BASE_DEBIAN.
need_base_debian() {
  BASE_DEBIAN=$(setting BASE_DEBIAN)
  if [ -z "$BASE_DEBIAN" ]; then
    BASE_DEBIAN=debian:trixie-slim
    image_here "$BASE_DEBIAN" || image_here "$OWN_DEBIAN" || pull "$BASE_DEBIAN" || true
    image_here "$BASE_DEBIAN" || BASE_DEBIAN=$OWN_DEBIAN
  fi
  # A .env that began as the demo's may name ours, which make clean removes.
  if [ "$BASE_DEBIAN" != "$OWN_DEBIAN" ] || image_here "$OWN_DEBIAN"; then return 0; fi
  need_mmdebstrap
  step base-debian "Making a Debian base image from Debian's packages ($OWN_DEBIAN)" make_base_debian
}

# need_base_go: sets BASE_GO. Needs BASE_DEBIAN.
need_base_go() {
  BASE_GO=$(setting BASE_GO)
  if [ -z "$BASE_GO" ]; then
    BASE_GO=golang:1.26-trixie
    image_here "$BASE_GO" || image_here "$OWN_GO" || pull "$BASE_GO" || true
    image_here "$BASE_GO" || BASE_GO=$OWN_GO
  fi
  if [ "$BASE_GO" != "$OWN_GO" ] || image_here "$OWN_GO"; then return 0; fi
  need_mmdebstrap
  step base-go "Making a Go base image from Debian's packages and $(own_go_tree || echo "Debian's Go") ($OWN_GO)" make_base_go
}

# find_base_nix: sets BASE_NIX to an image with Nix that is here, after a pull if need be; fails where there is none.
find_base_nix() {
  BASE_NIX=$(setting BASE_NIX)
  [ -z "$BASE_NIX" ] || return 0
  BASE_NIX=$(sed -n 's/^ARG BASE_NIX=//p' "$ROOT/vmimage/nixos/Dockerfile")
  image_here "$BASE_NIX" || pull "$BASE_NIX"
}

# need_own_nix: sets BASE_NIX to one with Debian's Nix, in which the test makes an ISO of its own. It is the test's alone: what
# it lacks of the public one is found out by nobody. Needs BASE_DEBIAN.
need_own_nix() {
  BASE_NIX=$(setting BASE_NIX)
  [ -z "$BASE_NIX" ] || return 0
  BASE_NIX=$OWN_NIX
  image_here "$BASE_NIX" || step base-nix "Making an image with Debian's Nix ($OWN_NIX)" make_own_nix
}

make_own_nix() {
  printf 'FROM %s\nRUN apt-get update -q && apt-get install -y -q --no-install-recommends nix-bin ca-certificates && rm -rf /var/lib/apt/lists/*\n' \
    "$BASE_DEBIAN" | docker build -t "$OWN_NIX" -
}

need_mmdebstrap() {
  have mmdebstrap || need_packages "Making base images without a container registry" mmdebstrap
}

# own_go_tree: this machine's Go, if the project can be built with it.
own_go_tree() {
  local version
  version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) && at_least "${version#go}" "$(sed -n 's/^go //p' "$ROOT/go.mod")" &&
    GOTOOLCHAIN=local go env GOROOT
}

# debian_mirror: the one that apt uses here. Without one of Debian's own (as on Ubuntu) mmdebstrap has its default.
debian_mirror() {
  # shellcheck disable=SC2016 # apt's own placeholders
  apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null | head -n 1
}

make_base_debian() {
  local tar=$OWN/debian.tar mirror dir args
  mirror=$(debian_mirror)
  args=(--quiet --variant=minbase)
  for dir in doc man locale info; do args+=("--dpkgopt=path-exclude=/usr/share/$dir/*"); done
  args+=(trixie "$tar")
  [ -z "$mirror" ] || args+=("deb $mirror trixie main")
  mmdebstrap "${args[@]}" && docker import -c 'CMD ["bash"]' "$tar" "$OWN_DEBIAN" && rm -f "$tar"
}

# make_base_go: the Debian base with Go laid over it. It holds this machine's CA bundle, since the module proxy may be
# reached through one of its own: the image must not be published.
make_base_go() {
  local container rc=0
  container=$(docker create "$BASE_DEBIAN" sh -ec 'apt-get -q update; apt-get -q -y --no-install-recommends install golang-go; rm -rf /var/lib/apt/lists/*') || return
  fill_base_go "$container" || rc=$?
  docker rm -f "$container" >/dev/null
  return $rc
}

fill_base_go() {
  local container=$1 tree name value changes without=()
  changes=(-c 'CMD ["bash"]' -c 'WORKDIR /go' -c 'ENV GOPATH=/go')
  if tree=$(own_go_tree); then
    # Without what only builds and tests Go itself: two thirds of its files.
    for name in ./test ./api ./src/cmd testdata '*_test.go'; do without+=("--exclude=$name"); done
    tar -C "$tree" "${without[@]}" --transform 's,^\.,go,' -c . | docker cp - "$container:/usr/local" || return
    changes+=(-c 'ENV GOTOOLCHAIN=local' -c 'ENV PATH=/usr/local/go/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin')
  else
    # Debian's Go is older than this project's; it fetches the right one by itself, as a module.
    docker start --attach "$container" || return
    changes+=(-c 'ENV GOTOOLCHAIN=auto')
  fi
  if [ -r /etc/ssl/certs/ca-certificates.crt ]; then
    tar -C / -h -c etc/ssl/certs/ca-certificates.crt | docker cp - "$container:/" || return
  fi
  if have go; then
    for name in GOPROXY GOSUMDB; do
      value=$(go env "$name")
      [ -z "$value" ] || changes+=(-c "ENV $name=$value")
    done
  fi
  docker commit "${changes[@]}" "$container" "$OWN_GO"
}
