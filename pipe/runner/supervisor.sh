#!/usr/bin/env bash
# Runs one job for ProcessUnits: what systemd does in the VM, but that of what the job wrote only its output is synced.
# Arguments: lock file, script, log, result, timeout in seconds (0: none), folder.
lock=$1 script=$2 log=$3 result=$4 timeout=$5 work=$6
exec 9>>"$lock" || exit 1
flock -n 9 || exit 1
cd "$work" || exit 1
echo ready
exec </dev/null >/dev/null 2>&1 # what bash itself has to say is not the job's output

uptime_ns() {
  local up rest
  read -r up rest </proc/uptime
  echo "${up/./}0000000"
}

set -m # each job below is a process group of its own
"$BASH" "$script" >>"$log" 2>&1 &
job=$!
echo "$$ $job" >&9
watch=
if ((timeout > 0)); then
  (
    exec 9>&-
    sleep "$timeout"
    : >"$result.timeout"
    kill -TERM -- "-$job"
    sleep 2
    kill -KILL -- "-$job"
  ) >/dev/null 2>&1 &
  watch=$!
fi
wait "$job"
code=$?
[[ -n $watch ]] && kill -KILL -- "-$watch"

# The leftovers of the job's process group.
if kill -TERM -- "-$job" 2>/dev/null; then
  for _ in {1..20}; do
    kill -0 -- "-$job" 2>/dev/null || break
    sleep 0.1
  done
  kill -KILL -- "-$job"
fi

service=success how=exited status=$code
if ((code > 128)) && name=$(kill -l $((code - 128)) 2>/dev/null); then
  service=signal how=killed status=$name
elif ((code != 0)); then
  service=exit-code
fi
[[ -e $result.timeout ]] && service=timeout
printf '{"service_result":"%s","exit_code":"%s","exit_status":"%s","memory_peak":0,"uptime_ns":%s}\n' \
  "$service" "$how" "$status" "$(uptime_ns)" >"$result.part" &&
  sync "$log" "$result.part" && mv "$result.part" "$result"
