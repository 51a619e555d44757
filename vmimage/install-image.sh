# shellcheck shell=sh
# How an ISO comes into the VM's storage, for every flavour. Sourced by sh and by Bash; coreutils only.
#
# The old ISO stays until the new one is whole, whenever this is interrupted: the new one is written under another name in
# the same folder, synced, and renamed. A note beside it holds its sha256, size, time, and the key: one line that names
# what it was made from. A running VM keeps what it has open; a restart takes the new one.
storage=${STORAGE:-/storage}
image=$storage/boot.iso
note=$image.sha256
run=$(cat /proc/sys/kernel/random/uuid)
new=$storage/.boot.iso.new.$run
given=${GIVEN_ISO:-/given/boot.iso}

say() { echo "vmimage: $*"; }

# status WORD [TEXT]: making, ready or failed, for the sidecar, which says it while drops wait. Never a reason to stop.
status_dir=${STATUS_DIR:-/status}
status() {
  [ -d "$status_dir" ] || return 0
  { echo "$*" >"$status_dir/image.new" && mv "$status_dir/image.new" "$status_dir/image"; } 2>/dev/null || :
}

# fail TEXT: of a renewal, which whoever calls this says in the variable renewal, the VM doesn't wait: it goes on with the
# ISO that is there.
fail() {
  if [ -n "${renewal:-}" ] && [ -s "$image" ]; then status ready; else status failed "$*"; fi
  rm -f "$new" "$note.new.$run"
  echo "vmimage: $*" >&2
  exit 1
}

need_storage() {
  [ -d "$storage" ] || fail "$storage is not mounted: give this service the VM's storage volume"
  if command -v flock >/dev/null; then
    # Held until this shell and what it started have ended.
    exec 9<"$storage"
    flock -n 9 || {
      # Anything but 1: a file system that can't lock.
      if [ $? = 1 ]; then
        say "waiting for another one, which works in $storage"
        flock 9
      fi
    }
  fi
  rm -f "$storage"/.boot.iso.new* "$note".new* # left by one that was killed
}

mebibytes() { echo $((($1 + 1048575) / 1048576)); }

# free_mebibytes FOLDER
free_mebibytes() { df --output=avail -B 1M "$1" | tail -n 1 | tr -d ' '; }

# read_note: what the note says of the ISO that is there, in had, sum and key. It counts only if the file is still the one
# it was written for: same size, same time. Reading it all each time would be slow.
read_note() {
  had='' sum='' key=''
  had=$(stat -c '%s %Y' "$image" 2>/dev/null) || return 1
  read -r sum size time key 2>/dev/null <"$note" || return 1
  [ "$size $time" = "$had" ] || { sum='' key='' && return 1; }
}

# image_is KEY: whether the ISO that is there was made from KEY. Its digest is in sum.
image_is() { read_note && [ "$key" = "$1" ] && status ready; }

# digest FILE
digest() {
  digest=$(sha256sum <"$1") || return 1
  echo "${digest%% *}"
}

# is_iso FILE
is_iso() { [ "$(head -c 32774 "$1" | tail -c 5 | tr -d '\0')" = CD001 ]; }

# put_image KEY FILE [SHA256]: puts a copy of FILE in its place, having read it back.
put_image() {
  read_note || :
  size=$(stat -L -c %s "$2") || fail "cannot read $2"
  want=${3:-}
  [ -n "$want" ] || want=$(digest "$2") || fail "cannot read $2"
  err=$(cp "$2" "$new" 2>&1 && sync "$new" 2>&1) ||
    fail "cannot write the VM's ISO ($(mebibytes "$size") MiB) into $storage, $(free_mebibytes "$storage") MiB free: $err"
  # Of the very file that is read back: what has the ISO's name later may be another one's.
  is=$(stat -c '%s %Y' "$new") || fail "cannot read back $new"
  got=$(digest "$new") || fail "cannot read back $new"
  if [ "${is% *}" != "$size" ] || [ "$got" != "$want" ]; then
    fail "what was written to $storage is not what was read: look at the host's disk"
  fi

  # First the ISO, then the note: between the two the note is wrong at worst, and the next run does it once more.
  mv "$new" "$image" || fail "cannot put the ISO in its place in $storage"
  if ! echo "$got $is $1" >"$note.new.$run" || ! mv "$note.new.$run" "$note"; then
    fail "the ISO is in place, but its note cannot be written into $storage (disk full?)"
  fi
  sync "$storage"
  status ready
  if [ -z "$had" ]; then
    say "the VM's ISO was put into its storage (sha256 $got)"
  elif [ "$sum" = "$got" ]; then
    say "the VM's ISO was made anew and is the same (sha256 $got)"
  else
    say "the VM's ISO was replaced (sha256 $got); it counts from the VM's next start"
    say "to switch: docker compose restart vm (running jobs are interrupted and run again)"
  fi
}

# put_given: if the user gave an ISO of his own, it is taken, and 0 returned. A device, /dev/null, says that there is none.
put_given() {
  [ -e "$given" ] && [ ! -c "$given" ] || return 1
  [ ! -d "$given" ] || fail "BOOT_ISO names a folder: name the ISO in it"
  if [ ! -f "$given" ] || [ ! -s "$given" ]; then fail "BOOT_ISO names no file, or an empty one"; fi
  is_iso "$given" || fail "BOOT_ISO names a file that is no ISO image"
  from="given $(stat -c '%s %Y' "$given")"
  if image_is "$from"; then
    say "the ISO that BOOT_ISO names is in place (sha256 $sum)"
    return 0
  fi
  say "the ISO that BOOT_ISO names is taken; none is made"
  put_image "$from" "$given"
}
