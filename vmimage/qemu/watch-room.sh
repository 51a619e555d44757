#!/bin/bash
# watch-room.sh MONITOR STORAGE: QEMU stops the VM when its disk can't grow
# because the host's is full, and leaves it stopped. This says so, and lets the
# VM go on once there is room: what it wanted to write is written then.
# MONITOR is the socket of QEMU's monitor, STORAGE where the disk lies.
set -euo pipefail

monitor=$1 storage=$2
enough=$((512 << 20)) # bytes: with less it would stop again at once
said=''

mib() { echo "$(($1 >> 20)) MiB"; }

# ask COMMAND: what QEMU answers. It has one listener at a time: nothing, if
# that is another.
ask() { echo "$1" | socat -t 2 -T 2 - "UNIX-CONNECT:$monitor" 2>/dev/null || :; }

while sleep "${WATCH_EVERY:-10}"; do
  if [[ $(ask 'info status') != *'paused (io-error)'* ]]; then
    said=''
    continue
  fi
  free=$(df --output=avail -B 1 "$storage" | tail -n 1)
  if ((free >= enough)); then
    ask cont >/dev/null
    echo "qemu: the host has $(mib "$free") free again: the VM goes on"
    said=''
  elif [[ -z $said ]]; then
    echo "qemu: warning: the VM stands still: its disk could not grow, the host has $(mib "$free") free for it. It goes on by itself when there are $(mib "$enough")"
    said=yes
  fi
done
