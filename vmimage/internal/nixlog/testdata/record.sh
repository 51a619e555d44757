#!/bin/bash
# Records what Nix itself says, for the tests of nixlog and explain: each class
# of failure and some successes, by the Nix of three Debian suites, as root on
# the store and as an unprivileged user through the daemon.
#
#   record.sh [SUITE...]
#
# Needs Docker, mmdebstrap and Debian's mirror. Module errors are those of a
# real nixpkgs where NIXPKGS names a tree. One file a version and way, its
# sections told apart by "-- NAME EXIT --" lines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

suites=("$@")
[ ${#suites[@]} -gt 0 ] || suites=(bookworm trixie forky)

make_image() {
  local suite=$1 image=$2 mirror tar
  # shellcheck disable=SC2016 # apt's own placeholders
  mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null | head -n 1)
  tar=$(mktemp --suffix=.tar)
  # A suite that moves may be served from a mirror that stands still.
  mmdebstrap --quiet --variant=minbase --include=nix-bin,ca-certificates,procps \
    --aptopt='Acquire::Check-Valid-Until "false"' "$suite" "$tar" "deb ${mirror:-http://deb.debian.org/debian} $suite main"
  docker import "$tar" "$image" >/dev/null
  rm "$tar"
}

# trim leaves out of a recording what evaluation says of each file that it hashes, and of the
# numbers those that say what the last line of their kind did.
trim() {
  awk '
    match($0, /"id":[0-9]+/) { id = substr($0, RSTART, RLENGTH) }
    /"action":"start"/ && /"text":"(hashing|copying) .*"type":0/ { quiet[id] = 1 }
    /"action":"(start|stop)"/ && id in quiet { next }
    /"action":"result"/ && /"type":10[56]}/ {
      key = id substr($0, length($0) - 4)
      if (/"type":106/) { split($0, field, /[\[,]/); key = key field[3] }
      if (last[key] == $0) next
      last[key] = $0
    }
    { print }
  ' "$1" | perl -pe '
    # Of a long trace, its ends, without the source beside each frame.
    my @frames = split /(?=\\n\\n? *(?:\\u2026|…) )/;
    $_ = join "", @frames[0, 1], @frames[-6 .. -1] if @frames > 8;
    s/,"trace":\[.*\](?=[,}])//; # the same once more, in another form
    s/\\n +\d*\|(?:(?!\\n)[^"])*(?=\\n)//g if length > 3000;
  '
}

for suite in "${suites[@]}"; do
  image=osbuilder-record/nix:$suite
  docker image inspect "$image" >/dev/null 2>&1 || make_image "$suite" "$image"
  for way in direct daemon; do
    echo "recording $suite, $way"
    rm -rf recorded
    mkdir recorded
    run() {
      docker run --rm --network none -e WAY="$way" ${NIXPKGS:+-v "$NIXPKGS:/nixpkgs:ro"} \
        -v "$PWD/cases:/cases:ro" -v "$PWD/recorded:/recorded" "$@"
    }
    run "$image" bash /cases/run.sh ordinary
    run --memory 400m --memory-swap 400m "$image" bash /cases/run.sh memory
    run --tmpfs /nix:size=48m,exec,mode=755 "$image" bash /cases/run.sh disk
    version=$(docker run --rm "$image" nix --version | sed 's/.* \([0-9]*\.[0-9]*\).*/\1/')
    for file in recorded/*.log; do
      name=$(basename "$file" .log)
      printf -- '-- %s %s --\n' "$name" "$(cat "recorded/$name.exit")"
      trim "$file"
    done >"nix-$version-$way.txt"
    rm -r recorded
  done
done
