#!/usr/bin/env bash
# make check-nixos NIXPKGS=/path [NIXPKGS_OLD="/path…"] [GENERATORS=/path] [GENERATORS_OLD=/path]: evaluates the NixOS builder VM on
# each of the nixpkgs trees, for x86_64 and aarch64, and compares what comes out with vmimage/nixos/testdata/expected.txt: users,
# file systems, units and their order, settings, scripts. Nothing is built, and no network is needed but for Debian's packages.
#
# GENERATORS is nixos-generators' source, for trees that make images themselves (25.05 and later); GENERATORS_OLD one for older
# trees (1.8.0, as they have it). With them a user's configurations must evaluate to the same derivations by both ways.
#
# With REPORT=docs/proof/check-nixos.md the result is written there. NIXPKGS_REVISION and the like, if the trees don't say
# themselves, are written down as given.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh
. scripts/images.sh

IMAGE=osbuilder/check-nixos

build_image() {
  docker build -t "$IMAGE" --build-arg "BASE=$BASE_DEBIAN" - <<'DOCKERFILE'
ARG BASE
FROM ${BASE}
RUN apt-get update -q && apt-get install -y -q --no-install-recommends nix-bin jq shellcheck && rm -rf /var/lib/apt/lists/*
DOCKERFILE
}

# describe TREE REVISION: one line for the report.
describe() {
  local revision=$2 hash
  [ -n "$revision" ] || revision=$(git -C "$1" rev-parse HEAD 2>/dev/null) || revision=
  hash=$(docker run --rm --network none -v "$1:/tree:ro" "$IMAGE" \
    nix --extra-experimental-features nix-command --offline hash path --type sha256 --base32 /tree)
  printf '%s\n' "- NixOS $(cat "$1/lib/.version"): revision ${revision:-not known}; sha256 of the tree (NAR) \`$hash\`"
}

report() {
  mkdir -p "$(dirname "$REPORT")"
  local n=0 tree revision
  {
    printf '# make check-nixos\n\n'
    printf '%s\n' "Written by \`scripts/check-nixos.sh\` on $(date -u +%F), with Nix $(docker run --rm --network none "$IMAGE" nix --version | sed 's/.* //'): evaluated, nothing built." \
      "What was compared is in \`vmimage/nixos/testdata/expected.txt\`; \`gaps.nix\` beside it says how a tree that was cut down is evaluated all the same." ""
    for tree in "${TREES[@]}"; do
      n=$((n + 1))
      if [ $n = 1 ]; then revision=${NIXPKGS_REVISION:-}; else revision=${NIXPKGS_OLD_REVISION:-}; fi
      describe "$tree" "$revision"
    done
    printf '\n```text\n'
    sed 's,/trees/,,g' "$LOGS/check-nixos-result.log"
    printf '```\n'
  } >"$REPORT.new"
  mv "$REPORT.new" "$REPORT"
  note "written: $REPORT"
}

[ -n "${NIXPKGS:-}" ] || die "no nixpkgs tree was named." "make check-nixos NIXPKGS=/path/to/nixpkgs, and NIXPKGS_OLD=/path for older ones."
read -r -a TREES <<<"$NIXPKGS ${NIXPKGS_OLD:-}"
MOUNTS=()
INSIDE=()
for tree in "${TREES[@]}"; do
  [ -f "$tree/lib/.version" ] || die "$tree is no nixpkgs tree: it has no lib/.version."
  # Named for the reader by its release.
  name=/trees/nixos-$(cat "$tree/lib/.version")
  case " ${INSIDE[*]-} " in *" $name "*) name=$name-${#INSIDE[@]} ;; esac
  MOUNTS+=(-v "$(cd "$tree" && pwd -P):$name:ro")
  INSIDE+=("$name")
done
for pair in "generators ${GENERATORS:-}" "generators-old ${GENERATORS_OLD:-}"; do
  path=${pair#* }
  [ -n "$path" ] || continue
  [ -f "$path/nixos-generate.nix" ] || die "$path is not nixos-generators' source: it has no nixos-generate.nix."
  MOUNTS+=(-v "$(cd "$path" && pwd -P):/src/${pair%% *}:ro")
done
look
need_engine
need_base_debian
step check-nixos-image "Building the container that evaluates" build_image
say "==> Evaluating the NixOS VM"
rc=0
# Its store is in memory: thousands of small files.
docker run --rm --network none --tmpfs /nix:exec --tmpfs /tmp:exec -v "$ROOT/vmimage/nixos:/src/nixos:ro" -v "$ROOT/examples:/src/examples:ro" \
  -v "$ROOT/vmimage/internal/imagebuild/image.nix:/src/image.nix:ro" "${MOUNTS[@]}" "$IMAGE" \
  bash /src/nixos/testdata/check.sh "${INSIDE[@]}" 2>&1 | tee "$LOGS/check-nixos-result.log" || rc=$?
[ $rc -eq 0 ] || die "the NixOS VM does not evaluate to what is expected: see above." \
  "If the change is meant, change vmimage/nixos/testdata/expected.txt with it."
REPORT=${REPORT:-}
[ -z "$REPORT" ] || report
