#!/usr/bin/env bash
# seeded.sh TEST-BINARY ARGUMENT…: go test -exec runs a package's tests by it. A fuzz test that has lost its seeds still passes, and
# tests next to nothing. So where all passed, the fuzz tests run once more, and each must have been given some, by f.Add or as files
# in testdata/fuzz: that there is a line with f.Add says nothing, its loop may find no files any more. Here, since go test links a
# binary that it does not run at once a second time.
set -euo pipefail

"$@" || exit
grep -q '^func Fuzz' ./*_test.go 2>/dev/null || exit 0
out=$("$@" -test.v -test.run '^Fuzz' 2>&1) || {
  printf '%s\n' "$out"
  exit 1
}
# shellcheck disable=SC2016 # awk's own variables
printf '%s\n' "$out" | awk '
  $1 == "===" && $2 == "RUN" && $3 !~ /\// { if (!($3 in seeds)) seeds[$3] = 0 }
  $1 == "===" && $2 == "RUN" && $3 ~ /\// { sub(/\/.*/, "", $3); seeds[$3]++ }
  END {
    for (name in seeds) if (!seeds[name]) { print name " has no seeds. Add some with f.Add, or as files in testdata/fuzz/" name "."; bare = 1 }
    exit bare
  }'
