#!/bin/bash
# watch-vm.sh MONITOR STORAGE: QEMU stops the VM when its disk can't grow
# because the host's is full, and leaves it stopped. This says so, and lets the
# VM go on once there is room: what it wanted to write is written then. It also
# keeps the file that QEMU writes the console to short.
# MONITOR is the socket of QEMU's monitor, STORAGE where the disk lies;
# STATUS_DIR, if set, is where the sidecar is told.
set -euo pipefail
# shellcheck source=vmimage/qemu/status.sh
. "$(dirname "${BASH_SOURCE[0]}")/status.sh"

monitor=$1 storage=$2
enough=$((512 << 20))                  # bytes: with less it would stop again at once
most=$((256 << 10)) keep=$((64 << 10)) # bytes of console
said=''

mib() { echo "$(($1 >> 20)) MiB"; }

# ask COMMAND: what QEMU answers. It has one listener at a time: nothing, if
# that is another.
ask() {
  if command -v socat >/dev/null; then
    echo "$1" | socat -t 2 -T 2 - "UNIX-CONNECT:$monitor" 2>/dev/null || :
  else # as in qemux/qemu
    echo "$1" | nc -N -w 2 -U "$monitor" 2>/dev/null || :
  fi
}

# shorten: what comes in between the two is lost, and the console on standard
# output has it.
shorten() {
  local console=${STATUS_DIR:-}/console size
  size=$(stat -c %s "$console" 2>/dev/null) || return 0
  ((size > most)) || return 0
  { tail -c "$keep" "$console" >"$console.new" && cat "$console.new" >"$console"; } 2>/dev/null || : >"$console"
  rm -f "$console.new"
}

# goes_on: it stands still no more.
goes_on() {
  [[ -z $said ]] || osb_state running
  said=''
}

while sleep "${WATCH_EVERY:-10}"; do
  shorten
  case $(ask 'info status') in
    *'VM status: paused (io-error)'*) ;;
    *'VM status: '*)
      goes_on
      continue
      ;;
    *) continue ;; # not known: another has the monitor
  esac
  free=$(df --output=avail -B 1 "$storage" | tail -n 1)
  if ((free >= enough)); then
    ask cont >/dev/null
    echo "qemu: the host has $(mib "$free") free again: the VM goes on"
    goes_on
  elif [[ -z $said ]]; then
    echo "qemu: warning: the VM stands still: its disk could not grow, the host has $(mib "$free") free for it. It goes on by itself when there are $(mib "$enough")"
    osb_state paused "the host has $(mib "$free") free for it, and it goes on when there are $(mib "$enough")"
    said=yes
  fi
done
