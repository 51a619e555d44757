#!/usr/bin/env bash
# make vm-iso [TO=FOLDER]: makes the NixOS builder VM's boot.iso into a folder, beside whatever runs. VM_NIXPKGS, VM_NIX_CONF
# and the base images count as in .env. What was downloaded is kept in the volume that the service uses, too. What follows the
# folder goes to the program that makes it: `scripts/vm-iso.sh FOLDER renew` moves on to the newest nixpkgs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh
. scripts/project.sh

IMAGE=osbuilder/vmimage-nixos

# Compose brings a builder that knows the Dockerfile; the engine's own client may have none.
build_image() {
  COMPOSE_FILE=compose.yaml VM_FLAVOUR=nixos BASE_NIX=$BASE_NIX BASE_GO=$BASE_GO BASE_DEBIAN=$BASE_DEBIAN \
    compose --progress plain build vmimage
}

# own: what a container that is root made belongs to whoever asked for it.
own() {
  is_root || docker run --rm --network none -v "$TO:/storage" --entrypoint chown "$IMAGE" -R "$(id -u):$(id -g)" /storage
}

TO=${1:-${TO:-vm-iso}}
[ $# -eq 0 ] || shift
mkdir -p "$TO"
TO=$(cd "$TO" && pwd -P)
lock "make vm-iso"
trap unlock EXIT
trap 'exit 143' INT TERM HUP
: >"$LOGS/times"
look
need_engine
find_base_nix || die "the image with Nix, $BASE_NIX, is not here and can't be pulled." \
  "It needs a container registry. BASE_NIX in .env names another one." \
  "VM_FLAVOUR=debian in .env needs neither: that VM is made from Debian's packages."
need_base_debian
need_base_go
need_compose
step vm-iso-image "Building the container that makes the VM's ISO" build_image
# With the marks that Compose gives to its own, or it would wonder about it.
docker volume create --label "com.docker.compose.project=$(project_name)" --label com.docker.compose.volume=vm-nix \
  "$(project_name)_vm-nix" >/dev/null
NIXPKGS=$(setting VM_NIXPKGS)
say "==> Making the NixOS VM's ISO"
# The same rights and mounts as the service vmimage has.
docker run --rm --init --read-only --tmpfs /tmp:size=64m --cap-drop ALL --cap-add CHOWN --cap-add DAC_OVERRIDE --cap-add FOWNER \
  --security-opt no-new-privileges:true -v "$(project_name)_vm-nix:/nix" -v "$TO:/storage" \
  -e "VM_NIXPKGS=${NIXPKGS:-nixos-26.05}" -e "VM_NIX_CONF=$(setting VM_NIX_CONF)" "$IMAGE" "$@"
own
say "The ISO is $TO/boot.iso"
note "boot it with this project   BOOT_ISO=$TO/boot.iso in .env, then docker compose up -d"
