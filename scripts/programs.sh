#!/usr/bin/env bash
# programs.sh [FOLDER]: builds the programs that the NixOS flavour of the VM takes in as they are, static, into
# vmimage/nixos/programs. GOARCH chooses another machine than this one: amd64 or arm64.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh

need_go
folder=${1:-vmimage/nixos/programs}
mkdir -p "$folder"
export GOOS=linux CGO_ENABLED=0
for package in ./pipe/cmd/pipe-runner ./vmimage/cmd/image-build; do
  # Whole or not at all, and a new file: one that a VM image is being made from stays as it is.
  go build -trimpath -buildvcs=false -ldflags='-s -w' -o "$folder/.new" "$package"
  mv "$folder/.new" "$folder/${package##*/}"
done
note "$folder: pipe-runner, image-build for linux/$(go env GOARCH)"
