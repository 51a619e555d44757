#!/usr/bin/env bash
# checks.sh lint|unit|e2e-build|soak: the checks that need no engine. Also what make test runs beside the building of images.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/engine.sh

# files GIT-LS-FILES-ARGUMENT…: what is in the project or could be. Git asks root for leave in a folder of another user.
files() { git -c safe.directory="$ROOT" ls-files --cached --others --exclude-standard "$@"; }

# tool NAME PACKAGE: builds a program at the version in tools/go.mod, once for that version. Prints its path.
tool() {
  local key file
  key=$( (go env GOVERSION && cat tools/go.sum) | cksum | cut -d' ' -f1)
  file=$OWN/bin/$1-$key
  if [ ! -x "$file" ]; then
    mkdir -p "$OWN/bin"
    (cd tools && go build -trimpath -ldflags '-s -w' -o "$file.new" "$2") >&2
    mv "$file.new" "$file"
  fi
  printf '%s' "$file"
}

shell_files() {
  local file
  files | while read -r file; do
    if [ -f "$file" ] && { [ "${file%.sh}" != "$file" ] || head -n 1 "$file" | grep -Eq '^#!.*[/ ](ba)?sh( |$)'; }; then
      printf '%s\n' "$file"
    fi
  done
}

# fuzz_seeds: a fuzz test that has lost its seeds still passes, and tests next to nothing. Each needs an f.Add of its own
# or a file in its folder of testdata/fuzz.
fuzz_seeds() {
  local file name bare=0 program
  # shellcheck disable=SC2016 # awk's own variables
  program='
    FNR == 1 { name = "" }
    /^func Fuzz[A-Za-z0-9_]*\(/ { name = $2; sub(/\(.*/, "", name); seeds = 0 }
    name != "" && /\.Add\(/ { seeds = 1 }
    name != "" && /^}/ { if (!seeds) print FILENAME ":" name; name = "" }'
  while IFS=: read -r file name; do
    if [ -z "$(ls "$(dirname "$file")/testdata/fuzz/$name" 2>/dev/null)" ]; then
      printf '%s: %s has no seeds. Add some with f.Add, or as files in testdata/fuzz/%s.\n' "$file" "$name" "$name"
      bare=1
    fi
  done < <(files -z '*_test.go' | xargs -0 awk "$program" /dev/null)
  return $bare
}

lint() {
  local shell rc=0 golangci shfmt
  golangci=$(tool golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
  shfmt=$(tool shfmt mvdan.cc/sh/v3/cmd/shfmt)
  shell=$(shell_files)
  "$golangci" run ./... || rc=1
  # shellcheck disable=SC2086 # one word each: the project's names have no spaces
  shellcheck -x $shell || rc=1
  # shellcheck disable=SC2086
  "$shfmt" -d $shell || rc=1
  fuzz_seeds || rc=1
  return $rc
}

need_go
case ${1:-} in
  lint)
    have shellcheck || need_packages "The lint of shell scripts" shellcheck
    lint
    ;;
  unit)
    have gcc || have cc || need_packages "The race detector" gcc libc6-dev
    go test -race ./...
    ;;
  e2e-build) go test -race -tags e2e -c -o /dev/null ./e2e/... ;;
  soak) go test -tags soak -count 1 -timeout 0 -run Soak -v ./daemon -args -minutes "${MINUTES:-60}" ;;
  *) die "checks.sh does not know «${1:-}»." "It knows lint, unit, e2e-build and soak." ;;
esac
