#!/bin/bash
# The naive loop, in place of the runner: whatever lies in pipe_in runs when it changes, and then pipe_out is told what came of
# it. Nothing is on disk before, nothing is compared with what ran already. It is the test's control: what holds with the runner
# must be seen to break with this.
pipe=/nexus_bootstrap
seq=0
number=$(sed -n '1s/.*"generation":"\([0-9]*\)-.*/\1/p' "$pipe/pipe_out" 2>/dev/null)
old=$(sed -n '1s/.*"generation":"\([^"]*\)".*/\1/p' "$pipe/pipe_out" 2>/dev/null)

# say TYPE FIELDS PAYLOAD
say() {
  seq=$((seq + 1))
  printf '{"seq":%d,"time":"%s","type":"%s"%s,"%s":%s}\n' "$seq" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$1" "$2" "$1" "$3" >>"$pipe/pipe_out"
}

field() { sed -n "2s/.*\"$1\":\"\\{0,1\\}\\([^\",}]*\\).*/\\1/p" "$script"; }

[ -z "$old" ] || mv "$pipe/pipe_out" "$pipe/pipe_out.$old"
: >"$pipe/pipe_out"
chmod 644 "$pipe/pipe_out"
say hello "" "{\"generation\":\"$((${number:-0} + 1))-00000000\",\"protocol\":1,\"runner\":\"naive\",\"image\":\"naive\",\"slots\":1,\"systems\":[\"x86_64-linux\"],\"free\":1073741824}"

while inotifywait -qq -e modify -e moved_to --include '/pipe_in$' "$pipe/"; do
  script=$pipe/pipe_in
  kind=$(field kind) job=$(field job) attempt=$(field attempt) owner=$(field owner)
  case $kind in
    job) ;;
    acknowledge | cancel)
      say accepted "" "{\"request\":\"$kind/$job/$attempt\"}"
      continue
      ;;
    take-over | consume | repeat)
      say accepted "" "{\"request\":\"$kind/$owner\"}"
      continue
      ;;
    *) continue ;;
  esac
  about=",\"job\":\"$job\",\"attempt\":$attempt"
  work=$(mktemp -d)
  mkdir "$work/out"
  export JOB_ID=$job JOB_ATTEMPT=$attempt OUT=$work/out
  bash "$script" >"$work/log" 2>&1
  code=$?
  say accepted "" "{\"request\":\"job/$job/$attempt\"}"
  say started "$about" "{\"name\":\"$job\",\"slot\":1,\"unit\":\"none\",\"user\":\"root\"}"
  say log "$about" "{\"offset\":0,\"base64\":\"$(base64 -w 0 "$work/log")\"}"
  status=succeeded
  [ "$code" = 0 ] || status=failed
  say finished "$about" "{\"status\":\"$status\",\"exit_code\":$code,\"duration_ms\":1,\"log_length\":$(stat -c %s "$work/log")}"
done
