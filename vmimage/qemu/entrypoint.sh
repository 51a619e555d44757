#!/bin/bash
# Boots the builder VM: /boot.iso or /storage/boot.iso, /storage/data.img as its
# data disk, SSH on port 22, the serial console on standard output.
# The variables are those of qemux/qemu; what concerns its viewer is ignored.
# One is our own, for tests: BOOT_MEDIA=cd, usb-cd or usb-disk says as what the
# ISO is attached. Empty: as qemux/qemu does, a hybrid ISO by USB, any other as
# a CD on SCSI.
# STATUS_DIR, if set, is a folder where the sidecar is told how it is with QEMU.
# SIGTERM presses the VM's power button; after TIMEOUT seconds QEMU is ended.
set -euo pipefail
shopt -s extglob

lib=$(dirname "${BASH_SOURCE[0]}")
run=${RUN_DIR:-/run/osbuilder} storage=${STORAGE:-/storage}
# shellcheck source=vmimage/qemu/status.sh
. "$lib/status.sh"
say() { echo "qemu: $*"; }
warn() { echo "qemu: warning: $*"; }
# die CODE MESSAGE [WORD]: WORD is for the sidecar
die() {
  echo "qemu: $2" >&2
  osb_state "${3:-ended}" "$2"
  exit "$1"
}

# bytes VALUE: 16G, 512M, 1.5T and GB, MB, TB in bytes. A bare number is in GiB,
# as in qemux/qemu.
bytes() {
  local v=${1^^}
  v=${v// /}
  v=${v%B}
  [[ $v != *[0-9] ]] || v+=G
  [[ $v =~ ^[0-9]+(\.[0-9]+)?[KMGT]$ ]] && numfmt --from=iec "$v"
}
mib() { echo "$(($1 >> 20)) MiB"; }

find_iso() {
  local f why
  case ${BOOT:-none} in
    none) ;;
    *) die 64 "BOOT=$BOOT: nothing is ever downloaded here; leave it at none, and the VM boots /storage/boot.iso" ;;
  esac
  for f in /boot.iso "$storage/boot.iso"; do
    [[ -e $f ]] || continue
    [[ -f $f && -s $f ]] || die 64 "$f is no file or empty: run the service that makes the VM's ISO again (docker compose up vmimage)" image
    why=$(osb_no_iso "$f")
    [[ -z $why ]] || die 64 "$why: remove it, then make it again (docker compose up vmimage)" unusable
    iso=$f
    return
  done
  die 64 "there is neither /boot.iso nor $storage/boot.iso: run the service that makes the VM's ISO (docker compose up vmimage)" image
}

set_cpus() {
  local host
  host=$(nproc)
  cpus=${CPU_CORES:-2}
  case ${cpus,,} in
    max) cpus=$host ;;
    half) cpus=$(((host + 1) / 2)) ;;
  esac
  [[ $cpus =~ ^[1-9][0-9]{0,3}$ ]] || die 64 "CPU_CORES=$CPU_CORES is no number of cores: 4, say, or half, or max"
  if ((cpus > host)); then
    warn "CPU_CORES=$cpus, but there are $host here: the VM gets $host"
    cpus=$host
  fi
}

# set_ram: RAM_SIZE, or less where the host or the container's limit has less.
set_ram() {
  local want free limit used key value _
  local spare=$((512 << 20)) least=$((512 << 20))
  while read -r key value _; do
    [[ $key == MemAvailable: ]] && free=$((value << 10))
  done </proc/meminfo
  if limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null) && [[ $limit != max ]]; then
    used=$(cat /sys/fs/cgroup/memory.current)
    ((limit - used >= free)) || free=$((limit - used))
  elif limit=$(cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null); then
    ((limit >= free)) || free=$limit
  fi
  RAM_SIZE=${RAM_SIZE:-2G}
  want=$RAM_SIZE
  case ${want,,} in
    max) want=$((free - spare)) ;;
    half) want=$((free / 2)) ;;
    *)
      # Of memory, from 130 on, in MiB.
      if [[ ${want// /} =~ ^([0-9]+)(\.[0-9]+)?$ ]] && ((${#BASH_REMATCH[1]} > 3 || 10#${BASH_REMATCH[1]} >= 130)); then want+=M; fi
      want=$(bytes "$want") || die 64 "RAM_SIZE=$RAM_SIZE is no amount of memory: 16G or 4096M, say, or half, or max"
      ;;
  esac
  ((want >= least)) || die 64 "RAM_SIZE=$RAM_SIZE is $(mib "$want"): the VM needs $(mib "$least") or more"
  if ((want + spare > free)) && [[ ${RAM_CHECK:-Y} != [Nn]* ]]; then
    ((free - spare >= least)) || die 64 "only $(mib "$free") of memory are free here: the VM needs $(mib "$least") and $(mib "$spare") beside it"
    warn "RAM_SIZE=$RAM_SIZE, but $(mib "$free") are free here: the VM gets $(mib $((free - spare)))"
    want=$((free - spare))
  fi
  ram=$((want >> 20))
}

# set_disk: made if absent, grown if DISK_SIZE grew, else left as it is.
set_disk() {
  local want is free
  disk=$storage/data.img
  DISK_SIZE=${DISK_SIZE:-64G}
  want=$(bytes "$DISK_SIZE") || die 64 "DISK_SIZE=$DISK_SIZE is no size: 128G, say"
  ((want >= 1 << 30)) || die 64 "DISK_SIZE=$DISK_SIZE: the VM needs 1G or more"
  [[ -w $storage ]] || die 64 "$storage is not writable: mount a volume there"
  if [[ ! -e $disk ]]; then
    truncate -s "$want" "$disk" || die 64 "cannot make $disk"
    say "data disk: made, $((want >> 30)) GiB, sparse"
  fi
  is=$(stat -c %s "$disk")
  if ((is < want)); then
    truncate -s "$want" "$disk" || die 64 "cannot grow $disk to DISK_SIZE=$DISK_SIZE"
    say "data disk: grown from $((is >> 30)) to $((want >> 30)) GiB"
    is=$want
  elif ((is > want)); then
    warn "DISK_SIZE=$DISK_SIZE is less than the data disk has, $((is >> 30)) GiB: a disk is never shrunk, it stays as it is"
  fi
  free=$(df --output=avail -B 1 "$storage" | tail -n 1)
  if ((is - $(stat -c %b "$disk") * 512 > free)); then
    warn "the data disk may grow to $((is >> 30)) GiB, but the host has $((free >> 30)) GiB free: when that is used up the VM stands still until there is room"
  fi
}

# set_arguments: ARGUMENTS is split at white space, as in qemux/qemu. A file
# that fw_cfg shall hand over must be readable and not empty: QEMU takes an
# empty one without a word, and the VM would be out of reach.
set_arguments() {
  local word file
  # No globbing: a * in a value is meant as it stands.
  read -r -d '' -a arguments <<<"${ARGUMENTS:-}" || :
  for word in "${arguments[@]}"; do
    [[ $word == name=opt/*,file=* ]] || continue
    file=${word#*,file=}
    [[ -r $file ]] || die 64 "cannot read $file, which ARGUMENTS hands to the VM: did the service that makes the keys run (docker compose up init)? Without the capability DAC_OVERRIDE it must belong to root"
    [[ -s $file ]] || die 64 "$file, which ARGUMENTS hands to the VM, is empty: remove it, then run the service that makes the keys (docker compose up init)"
  done
}

# set_media: how the ISO is attached. It has bootindex 0: else the firmware may
# try a blank data disk and hang. A hybrid ISO is one with a boot sector.
set_media() {
  local media=${BOOT_MEDIA:-cd}
  if [[ -z ${BOOT_MEDIA:-} && $(head -c 512 "$iso" | tail -c 2 | od -An -tx2) != *0000 ]]; then media=usb-cd; fi
  case $media in
    cd)
      boot_media=(
        -drive "file=$iso,if=none,id=cd,format=raw,media=cdrom,readonly=on"
        -device virtio-scsi-pci -device "scsi-cd,drive=cd,bootindex=0"
      )
      ;;
    usb-cd)
      boot_media=(
        -drive "file=$iso,if=none,id=cd,format=raw,media=cdrom,readonly=on"
        -device "qemu-xhci" -device "usb-storage,drive=cd,bootindex=0,removable=on"
      )
      ;;
    usb-disk)
      boot_media=(
        -drive "file=$iso,if=none,id=cd,format=raw,media=disk,readonly=on"
        -device "qemu-xhci" -device "usb-storage,drive=cd,bootindex=0,removable=on"
      )
      ;;
    *) die 64 "BOOT_MEDIA=$media is not understood: cd, usb-cd, usb-disk, or empty" ;;
  esac
  say "boot medium: $media"
}

# set_firmware: BIOS unless BOOT_MODE=uefi. UEFI's variables are made anew at
# each start: nothing that the VM needs is kept there.
set_firmware() {
  firmware=()
  case ${BOOT_MODE:-legacy} in
    legacy) ;;
    uefi)
      cp /usr/share/OVMF/OVMF_VARS_4M.fd "$run/uefi.vars"
      firmware=(
        -drive "if=pflash,unit=0,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"
        -drive "if=pflash,unit=1,format=raw,file=$run/uefi.vars"
      )
      say "firmware: UEFI"
      ;;
    *) die 64 "BOOT_MODE=$BOOT_MODE is not understood: legacy or uefi" ;;
  esac
}

press_power_button() {
  echo system_powerdown | socat -T 2 - "UNIX-CONNECT:$run/monitor.sock" >/dev/null 2>&1 || :
}

# stop_vm: SIGTERM. The button is pressed again now and then: a VM that is still
# booting does not hear the first time.
stop_vm() {
  local t
  trap '' TERM INT
  stopping=yes
  say "shutting the VM down (at most $timeout s)"
  for ((t = 0; t < timeout * 5; t++)); do
    ((t % 50)) || press_power_button
    kill -0 "$qemu" 2>/dev/null || return 0
    sleep 0.2
  done
  warn "the VM did not shut down within $timeout s: ended by force, as if its power had failed"
  forced=yes
  kill -KILL "$qemu" 2>/dev/null || :
}

find_iso
set_cpus
set_ram
set_disk
set_arguments
timeout=${TIMEOUT:-100}
[[ $timeout =~ ^[1-9][0-9]{0,4}$ ]] || die 64 "TIMEOUT=$timeout is no number of seconds"
ip=${IP:-10.0.2.15}
[[ $ip =~ ^10\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}$ && $ip != *.@(1|3) ]] || die 64 "IP=$ip: an address in 10.0.0.0/8 that does not end in .1 or .3, 10.0.2.15 for one"
net=${ip%.*}

OSB_LIB=$lib
# shellcheck source=vmimage/qemu/start-hook.sh
. "$lib/start-hook.sh"
if [[ $KVM == Y ]]; then
  accel=(-accel kvm -cpu host)
else
  accel=(-accel "tcg,thread=multi,tb-size=512" -cpu "max${CPU_FLAGS:+,$CPU_FLAGS}")
fi

mkdir -p "$run"
rm -f "$run"/*.sock
set_media
set_firmware
osb_console
command=(
  qemu-system-x86_64 -name builder -no-user-config -nodefaults -display none
  -machine pc "${firmware[@]}" "${accel[@]}" -smp "$cpus" -m "${ram}M"
  -chardev "stdio,id=console,signal=off$console_log" -serial chardev:console
  -monitor "unix:$run/monitor.sock,server=on,wait=off" -qmp "unix:$run/qmp.sock,server=on,wait=off"
  "${boot_media[@]}"
  -drive "file=$disk,if=none,id=data,format=raw,cache=writeback,discard=unmap,detect-zeroes=unmap"
  -device "virtio-blk-pci,drive=data,serial=builderdata"
  -netdev "user,id=net,net=$net.0/24,host=$net.1,dns=$net.3,dhcpstart=$ip,hostfwd=tcp::22-$ip:22"
  -device "virtio-net-pci,netdev=net,romfile="
  -device virtio-rng-pci -device "virtio-balloon-pci,free-page-reporting=on"
  -sandbox "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
  "${arguments[@]}"
)
say "booting $iso with $cpus cores, $ram MiB of memory"
stopping='' forced=''
osb_state running
"${command[@]}" </dev/null &
qemu=$!
trap stop_vm TERM INT
"$lib/watch-vm.sh" "$run/monitor.sock" "$storage" </dev/null & # ends with the container

# wait returns early when a signal came; what counts is QEMU's own end.
# (Bash would report a killed one in words of its own.)
exec 3>&2 2>/dev/null
status=0
wait "$qemu" || status=$?
if [[ -n $stopping ]]; then
  status=0
  wait "$qemu" || status=$?
fi
exec 2>&3
if [[ -n $forced ]]; then
  osb_state off
  exit 143
elif ((status != 0)); then
  die "$status" "QEMU ended with status $status: its message is above"
fi
say "the VM is off"
osb_state off
