# shellcheck shell=bash
# What the sidecar is told of the VM from outside, in the folder STATUS_DIR: whether QEMU runs, and if not why, and the end
# of the VM's serial console. Without that folder nobody is told. Sourced; see daemon/internal/console for who reads it.

# osb_state WORD [TEXT]: running, off, image (there is none), unusable (it does not boot), paused, ended. Never a reason to stop.
osb_state() {
  [ -n "${STATUS_DIR:-}" ] || return 0
  { mkdir -p "$STATUS_DIR" && echo "$*" >"$STATUS_DIR/state.new" && mv "$STATUS_DIR/state.new" "$STATUS_DIR/state"; } 2>/dev/null || :
}

# osb_console: begins a file for the console, and sets console_log to what QEMU's chardev is to be told of it. QEMU appends
# to the file, so that watch-vm.sh can keep it short, and goes on if it can't.
# shellcheck disable=SC2034 # for whoever sources this
osb_console() {
  console_log=''
  [ -n "${STATUS_DIR:-}" ] || return 0
  if { mkdir -p "$STATUS_DIR" && : >"$STATUS_DIR/console"; } 2>/dev/null; then
    console_log=",logfile=$STATUS_DIR/console,logappend=on"
  fi
}

# osb_no_iso FILE: why FILE can't be booted from. An ISO has a boot record for CDs, or a boot sector for disks, or both.
osb_no_iso() {
  local at
  [ "$(head -c 32774 "$1" | tail -c 5 | tr -d '\0')" = CD001 ] || {
    echo "$1 is no ISO image"
    return
  }
  at=$(head -c 34848 "$1" | tail -c 25 | tr -d '\0')
  [ "$at" = "EL TORITO SPECIFICATION" ] || [ "$(head -c 512 "$1" | tail -c 2 | od -An -tx1 | tr -d ' ')" = 55aa ] ||
    echo "$1 has nothing to boot from: neither a boot record nor a boot sector"
}
