#!/usr/bin/env bash
# Runs one job for ProcessUnits: what systemd does in the VM, but that of what
# the job wrote only its output is synced.
# Arguments: lock file, script, log, result, timeout in seconds (0: none),
# grace in milliseconds, folder. Descriptor 3 is the lock file, locked. SIGUSR1
# ends the job.
lock=$1 script=$2 log=$3 result=$4 timeout=$5 grace=$6 work=$7
exec 9>&3 3>&- || exit 1
cd "$work" || exit 1

uptime_ns() {
  local up rest
  read -r up rest </proc/uptime
  echo "${up/./}0000000"
}

# Every process of the job has this in its environment, also one that left the
# process group. Only on its way into another program a process has none, so
# the script itself is known by its number.
mark=PROCESS_UNIT=$lock
members() {
  grep -lszxF "$mark" /proc/[0-9]*/environ | cut -d/ -f3 | grep -vx "${job:-0}"
  [[ -z $job ]] || ! kill -0 "$job" || echo "$job"
} 2>/dev/null
signal() {
  local pids
  mapfile -t pids < <(members)
  ((${#pids[@]})) && kill "$@" -- "${pids[@]}"
} 2>/dev/null

# All of the job: SIGTERM, the grace, SIGKILL.
terminate() {
  local i
  signal -TERM || return 0
  signal -CONT
  for ((i = 0; i < grace; i += 50)); do
    [[ $(members) ]] || return 0
    sleep 0.05
  done
  for ((i = 0; i < 100; i++)); do
    signal -KILL || return 0
    sleep 0.05
  done
}

why='' job=''
end() {
  trap '' USR1 USR2
  why=$1
  terminate
}

# Whoever started it may be gone, and with it the reader of what bash says of a
# script that ends at once. A trap, not '': the job must not inherit it.
trap : PIPE
set -m # each job below is a process group of its own
env "$mark" "$BASH" "$script" </dev/null >>"$log" 2>&1 &
job=$!
trap 'end success' USR1
trap 'end timeout' USR2
echo "$$ $job" >&9
if ((timeout > 0)); then
  (
    exec 9>&-
    trap - USR1 USR2
    sleep "$timeout"
    kill -USR2 "$$"
  ) </dev/null >/dev/null 2>&1 &
  watch=$!
fi
(echo ready)                    # whoever started it may be gone, and SIGPIPE must not end it
exec </dev/null >/dev/null 2>&1 # what bash itself has to say is not the job's output

wait "$job"
code=$?
if [[ $why ]]; then # the first one may have been the signal's
  wait "$job"
  code=$?
fi
trap '' USR1 USR2
job=''
[[ ${watch-} ]] && kill -KILL -- "-$watch"
terminate # what the script left behind

service=success how=exited status=$code
if ((code > 128)) && name=$(kill -l $((code - 128)) 2>/dev/null); then
  service=signal how=killed status=$name
elif ((code != 0)); then
  service=exit-code
fi
[[ $why ]] && service=$why
full=false
read -r blocks size < <(stat -f -c '%a %S' "$log") && ((blocks * size < 1 << 20)) && full=true
printf '{"service_result":"%s","exit_code":"%s","exit_status":"%s","memory_peak":0,"uptime_ns":%s,"disk_full":%s}\n' \
  "$service" "$how" "$status" "$(uptime_ns)" "$full" >"$result.part" &&
  sync "$log" "$result.part" && mv "$result.part" "$result"
