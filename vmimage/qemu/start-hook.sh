#!/usr/bin/env bash
# Decides whether the VM gets KVM, and says so in one line. Sourced, not run:
# compose.yaml binds it over /run/start.sh, the hook file of qemux/qemu, which
# its entry script sources first of all; the entry point of vmimage/qemu sources
# it too. KVM in the environment: empty means find out, Y and N override.
# Afterwards KVM is Y or N. In qemux/qemu it also sees to it that the sidecar is
# told what it can't see: see status.sh.
#
# A device file proves little. Without /dev/kvm in the container the node is
# made here (compose cannot name a device that some hosts lack; it gives
# device_cgroup_rules for 10:232 instead), and there are hosts whose /dev/kvm
# opens but on which a guest's kernel hangs: so the VM's own kernel is tried.

# osb_kvm_open: makes the node if it is absent and opens it; says why not.
osb_kvm_open() {
  local err device=${OSB_KVM:-/dev/kvm}
  if [ ! -e "$device" ] && ! mknod -m 0600 "$device" c 10 232 2>/dev/null; then
    echo "the container has no /dev/kvm and may not make it (give it the device, or the capability MKNOD)"
    return 1
  fi
  err=$( (: <>"$device") 2>&1) && return 0
  case $err in
    *"No such device"*) echo "this host offers no KVM (switched off in its firmware, or a VM without nested virtualisation)" ;;
    *"ermission denied"* | *"not permitted"*) echo "Docker does not let the container open /dev/kvm (give it device_cgroup_rules \"c 10:232 rwm\")" ;;
    *) echo "/dev/kvm does not open: ${err##*: }" ;;
  esac
  return 1
}

# osb_kvm_try: boots the kernel of the VM's ISO under KVM, without a root file
# system: it runs until it finds none, which takes about a second, and QEMU
# ends. Bounded. Says why not.
osb_kvm_try() {
  local dir=$1 iso='' f kernel='' log=$1/serial cpus=1 console=ttyS0
  local emulator=(qemu-system-x86_64)
  if [ "$(uname -m)" = aarch64 ]; then emulator=(qemu-system-aarch64 -machine virt) console=ttyAMA0; fi
  for f in /boot.iso "${STORAGE:-/storage}/boot.iso"; do
    if [ -s "$f" ]; then iso=$f && break; fi
  done
  if [ -n "$iso" ]; then
    kernel=$(xorriso -indev "$iso" -find / -type f -name 'vmlinuz*' -or -type f -name 'bzImage*' -or -type f -name Image 2>/dev/null | head -n 1)
    kernel=${kernel//\'/}
  fi
  if [ -z "$kernel" ] || ! xorriso -osirrox on -indev "$iso" -extract "$kernel" "$dir/kernel" >/dev/null 2>&1; then
    echo "there is no kernel in ${iso:-the missing boot.iso} to try it with"
    return 1
  fi
  [ "$(nproc)" = 1 ] || cpus=2
  ulimit -c 0 # QEMU aborts on some hosts; this is a subshell
  timeout -k 1 20 "${emulator[@]}" -accel kvm -cpu host -m 384 -smp "$cpus" \
    -no-user-config -nodefaults -display none -no-reboot -serial "file:$log" -kernel "$dir/kernel" \
    -append "console=$console earlyprintk=serial,ttyS0 panic=-1 root=none" </dev/null >/dev/null 2>"$dir/err" || :
  if grep -aq 'Unable to mount root fs' "$log" 2>/dev/null; then
    return 0
  fi
  if [ -s "$dir/err" ] && ! grep -q 'terminating on signal' "$dir/err"; then
    echo "QEMU cannot use it: $(head -n 1 "$dir/err")"
  else
    echo "this host has /dev/kvm, but a Linux kernel does not start under it (tried for 20 seconds)"
  fi
  return 1
}

osb_kvm() {
  local why='' dir
  case ${KVM:-} in
    [Nn] | [Nn][Oo] | 0 | [Ff]alse | [Oo]ff)
      KVM=N
      why="KVM=N is set"
      ;;
    [Yy] | [Yy][Ee][Ss] | 1 | [Tt]rue | [Oo]n)
      KVM=Y
      if ! why=$(osb_kvm_open); then
        osb_tell ended "KVM is not usable, but KVM=Y is set: $why"
        echo "KVM: not usable, but KVM=Y is set: $why. Leave KVM empty to do without." >&2
        exit 88
      fi
      echo "KVM: yes (KVM=Y is set; not tried)"
      return 0
      ;;
    '')
      KVM=N
      if [ "$(uname -m)" = aarch64 ] && ! command -v qemu-system-aarch64 >/dev/null; then
        why="this host is an arm64 one and the VM is not; compose.arm64.yaml runs an arm64 VM"
      elif why=$(osb_kvm_open); then
        # qemux/qemu refuses KVM on a CPU without these flags, whatever opens.
        if [ -f "${OSB_PROC:-/run/proc.sh}" ] && [ "$(uname -m)" = x86_64 ] && ! grep -qwE 'vmx|svm' "${OSB_CPUINFO:-/proc/cpuinfo}"; then
          why="the CPU shows neither vmx nor svm"
        else
          dir=$(mktemp -d)
          ! why=$(osb_kvm_try "$dir") || KVM=Y
          rm -rf "$dir"
        fi
      fi
      ;;
    *)
      osb_tell ended "KVM=$KVM is not understood: Y, N, or empty to find out"
      echo "KVM=$KVM is not understood: Y, N, or empty to find out" >&2
      exit 64
      ;;
  esac
  if [ "$KVM" = Y ]; then echo "KVM: yes"; else echo "KVM: no, the VM will be slow: $why"; fi
}

# osb_cpu_flags: without KVM the VM's processor must not claim that `rep movsb` is fast: QEMU translates it to a loop over
# single bytes, and the guest's kernel and C library would copy and clear all memory with it.
osb_cpu_flags() {
  if [ "$KVM" = N ] && [ "$(uname -m)" = x86_64 ]; then
    export CPU_FLAGS="erms=off,fsrm=off${CPU_FLAGS:+,$CPU_FLAGS}"
  fi
}

# osb_tell WORD TEXT: as osb_state, which is absent where nothing but this file
# was given to the container.
osb_tell() { if [ -n "${osb_lib:-}" ]; then osb_state "$@"; fi; }

# osb_qemux: in qemux/qemu, what our own entry point does by itself. Its entry
# script has the image's absence end in an error of its own, as BOOT=none wants.
osb_qemux() {
  local iso='' f why='' console_log
  local monitor=${OSB_MONITOR:-/run/osbuilder-monitor.sock}
  for f in /boot.iso "${STORAGE:-/storage}/boot.iso"; do
    if [ -s "$f" ] && [ -f "$f" ]; then iso=$f && break; fi
  done
  if [ -z "$iso" ]; then
    osb_state image "there is neither /boot.iso nor ${STORAGE:-/storage}/boot.iso"
    return
  fi
  why=$(osb_no_iso "$iso")
  if [ -n "$why" ]; then
    echo "$why: remove it, then make it again (docker compose up vmimage)" >&2
    osb_state unusable "$why"
    return
  fi
  osb_state running
  trap 'osb_qemux_end $?' EXIT
  # Unless somebody sits at it: then the console is a socket of qemux/qemu's.
  if [ -z "${SERIAL:-}" ] && [ ! -t 0 ]; then
    osb_console
    if [ -n "$console_log" ]; then
      export SERIAL=chardev:osbconsole
      ARGUMENTS="-chardev stdio,id=osbconsole,signal=off$console_log ${ARGUMENTS:-}"
    fi
  fi
  export ARGUMENTS="-monitor unix:$monitor,server=on,wait=off ${ARGUMENTS:-}"
  bash "$osb_lib/watch-vm.sh" "$monitor" "${STORAGE:-/storage}" </dev/null & # ends with the container
}

# osb_qemux_end STATUS: the end of qemux/qemu's entry script.
osb_qemux_end() {
  case $1 in
    0 | 129 | 130 | 143) osb_state off ;; # powered off, or told to
    *) osb_state ended "its container ended with status $1" ;;
  esac
}

osb_lib=${OSB_LIB:-/usr/lib/osbuilder}
if [ -f "$osb_lib/status.sh" ]; then
  # shellcheck source=vmimage/qemu/status.sh
  . "$osb_lib/status.sh"
else
  osb_lib=''
fi
osb_kvm
osb_cpu_flags
if [ -n "$osb_lib" ] && [ -n "${STATUS_DIR:-}" ] && [ -f "${OSB_PROC:-/run/proc.sh}" ]; then osb_qemux; fi
unset -f osb_cpu_flags osb_kvm osb_kvm_open osb_kvm_try osb_tell osb_qemux
export KVM
