#!/usr/bin/env bash
# checks.sh lint|vet|unit|fuzz|e2e-build|soak: the checks that need no engine. Also what make test runs beside the building of images.
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
    # Without -trimpath, so that the standard library of the unit tests' programs is this one's too.
    (cd tools && go build -ldflags '-s -w' -o "$file.new" "$2") >&2
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

# fuzz_targets: each fuzz test as a line, its folder and its name.
fuzz_targets() {
  files -z '*_test.go' | xargs -0 grep '^func Fuzz' /dev/null | sed -n 's|^\(.*\)/[^/:]*:func \(Fuzz[A-Za-z0-9_]*\)(.*|./\1 \2|p' | sort
}

# fuzz: each fuzz test for FUZZTIME, one after another. What breaks one is kept in its testdata/fuzz.
fuzz() {
  local folder name rc=0
  while read -r folder name; do
    case " ${ONLY:-$name} " in *" $name "*) ;; *) continue ;; esac
    printf '%s %s\n' "$folder" "$name"
    go test -run '^$' -fuzz "^$name\$" -fuzztime "${FUZZTIME:-60s}" "$folder" </dev/null || rc=1
  done < <(fuzz_targets)
  return $rc
}

# lint: all of it. To build golangci-lint takes a bare machine longer than anything else that make test builds.
lint() {
  local rc=0 golangci
  golangci=$(tool golangci-lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint)
  "$golangci" run ./... || rc=1
  lint_shell || rc=1
  return $rc
}

# vet: what of it is quick. With the race detector, since for it everything is compiled already.
vet() {
  local rc=0 file unformatted
  unformatted=$(files '*.go' | while read -r file; do if [ -f "$file" ]; then gofmt -l "$file"; fi; done) || rc=1
  if [ -n "$unformatted" ]; then
    printf 'not formatted by gofmt:\n%s\n' "$unformatted"
    rc=1
  fi
  go vet -race -tags e2e,long,soak ./... || rc=1
  lint_shell || rc=1
  return $rc
}

lint_shell() {
  local shell rc=0 shfmt
  shfmt=$(tool shfmt mvdan.cc/sh/v3/cmd/shfmt)
  shell=$(shell_files)
  # shellcheck disable=SC2086 # one word each: the project's names have no spaces
  shellcheck -x $shell || rc=1
  # shellcheck disable=SC2086
  "$shfmt" -d $shell || rc=1
  return $rc
}

need_go
case ${1:-} in
  lint | vet)
    have shellcheck || need_packages "The lint of shell scripts" shellcheck
    "$1"
    ;;
  unit)
    have gcc || have cc || need_packages "The race detector" gcc libc6-dev
    if lacks_sshd; then need_packages "The test of the link" openssh-server inotify-tools; fi
    # Vetted apart. Ten minutes for a package, which is Go's own bound, are too few on a slow machine that does other things as well.
    go test -race -vet off -timeout 30m -exec "'$ROOT/scripts/seeded.sh'" ./...
    ;;
  fuzz) fuzz ;;
  e2e-build) go test -race -vet off -tags e2e -c -o /dev/null ./e2e/... ;;
  soak) go test -tags soak -count 1 -timeout 0 -run Soak -v ./daemon -args -minutes "${MINUTES:-60}" ;;
  *) die "checks.sh does not know «${1:-}»." "It knows lint, vet, unit, fuzz, e2e-build and soak." ;;
esac
