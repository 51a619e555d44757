# shellcheck shell=bash
# What the scripts share. Kept to Bash 3.2 and to what BSD's and GNU's tools have in common: it runs on people's own machines.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Everything that the scripts bring or make lies here, in the project's own folder.
OWN=$ROOT/.osbuilder
LOGS=$OWN/log
mkdir -p "$LOGS"

say() { printf '%s\n' "$*"; }
note() { printf '    %s\n' "$*"; }

# die WHAT [WHAT TO DO]…: says both and ends.
die() {
  printf '\nerror: %s\n' "$1" >&2
  shift
  local line
  for line in "$@"; do printf '       %s\n' "$line" >&2; done
  exit 1
}

# plain: what comes in, without what could move the cursor, colour or hide text on a terminal.
plain() {
  local LC_ALL=C esc
  export LC_ALL
  esc=$(printf '\033')
  tr -d '\000-\010\013-\032\034-\037\177' |
    sed -e "s/$esc\[[0-9;:?<=>]*[@-~]//g" -e "s/$(printf '\302')[$(printf '\200')-$(printf '\237')]//g" | tr -d '\033'
}

have() { command -v "$1" >/dev/null 2>&1; }

# step NAME WHAT COMMAND…: runs a long command with its output in a log file, and says what it does and how long it took.
# The seconds are appended to $LOGS/times for the table at the end. `set -e` does not hold inside: the commands say themselves
# where they end.
step() {
  local name=$1 what=$2 start rc=0 beat
  shift 2
  start=$(date +%s)
  say "==> $what"
  heartbeat "$LOGS/$name.log" "$start" &
  beat=$!
  "$@" >"$LOGS/$name.log" 2>&1 </dev/null || rc=$?
  kill "$beat" 2>/dev/null || true
  wait "$beat" 2>/dev/null || true
  local took=$(($(date +%s) - start))
  if [ "$rc" -ne 0 ]; then
    printf '%s\t%s\tfailed\n' "$name" "$took" >>"$LOGS/times"
    say "    failed after $took s. The end of .osbuilder/log/$name.log:"
    tail -n 40 "$LOGS/$name.log" | plain | sed 's/^/    | /'
    return "$rc"
  fi
  printf '%s\t%s\tok\n' "$name" "$took" >>"$LOGS/times"
  note "$took s"
}

# heartbeat LOG START: says every half minute that it still goes on, and with what. It waits without a process of its own,
# which would be left behind.
heartbeat() {
  local fifo=$OWN/.beat.$$ last
  # One that was ended at once may have left its own.
  rm -f "$fifo"
  mkfifo "$fifo" 2>/dev/null || return 0
  exec 9<>"$fifo"
  rm -f "$fifo"
  while ! read -r -t 30 <&9 && kill -0 $$ 2>/dev/null; do
    last=$(tail -n 1 "$1" 2>/dev/null | plain | cut -c 1-90)
    note "$(($(date +%s) - $2)) s so far: $last"
  done
}

# bounded SECONDS COMMAND…: like timeout(1), which macOS lacks. 124 when the time ran out.
bounded() {
  local seconds=$1 pid waited=0
  shift
  "$@" &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    if [ "$waited" -ge $((seconds * 5)) ]; then
      kill "$pid" 2>/dev/null
      wait "$pid" 2>/dev/null
      return 124
    fi
    sleep 0.2
    waited=$((waited + 1))
  done
  wait "$pid"
}

# killable COMMAND…: for what takes long. Bash heeds a signal only when the command in the foreground has ended; this one runs in
# a process group of its own, which end_killable ends with all that it started. The script says: trap end_killable EXIT
KILLABLE=
killable() {
  local rc=0 signalled=
  # One that comes before the group's number is known is heeded right after.
  trap signalled=yes INT TERM HUP
  set -m
  "$@" &
  KILLABLE=$!
  set +m
  trap 'exit 143' INT TERM HUP
  [ -z "$signalled" ] || exit 143
  wait "$KILLABLE" || rc=$?
  KILLABLE=
  return "$rc"
}

end_killable() {
  [ -n "$KILLABLE" ] || return 0
  kill -- "-$KILLABLE" 2>/dev/null || true
  wait "$KILLABLE" 2>/dev/null || true
  KILLABLE=
}

# at_least HAVE WANT: compares versions of up to three numbers. What follows the numbers doesn't count.
at_least() {
  local have=${1#v} want=$2 i h w
  for i in 1 2 3; do
    h=$(printf '%s' "$have" | cut -d. -f$i | sed 's/[^0-9].*//')
    w=$(printf '%s' "$want" | cut -d. -f$i)
    [ "${h:-0}" -gt "${w:-0}" ] && return 0
    [ "${h:-0}" -lt "${w:-0}" ] && return 1
  done
  return 0
}

# demos_env: whether .env is what make demo wrote, to the letter: then nothing in it is the user's choice.
demos_env() { cmp -s "$ROOT/.env" "$OWN/demo.env"; }

# setting NAME: what the user chose, in the environment or in .env; empty if nothing. Read as Compose reads it: in quotes a
# value may have several lines, and in double ones \", \\, \$ and \n stand for a character. Outside of single ones $NAME and
# ${NAME} are put in.
setting() {
  local value program
  eval "value=\${$1:-}"
  # shellcheck disable=SC2016 # awk's own variables
  program='
    # read_on TEXT: adds to the value that is in quotes, up to the closing one. Without one in it the next line goes on.
    function read_on(text, i, c) {
      for (i = 1; i <= length(text); i++) {
        c = substr(text, i, 1)
        if (c == quote) { keep(); quote = ""; return }
        if (c == "\\" && quote == "\"") {
          c = substr(text, ++i, 1)
          if (c == "n") c = "\n"
          else if (c == "$") c = "$$"
          else if (c !~ /^["\\]$/) c = "\\" c
        }
        value = value c
      }
      value = value "\n"
    }
    function keep() { known[key] = quote == "\047" ? value : put_in(value) }
    # put_in TEXT: with the variables in it replaced; $$ is a dollar.
    function put_in(text, out, var) {
      while (match(text, /[$]([$]|[A-Za-z_][A-Za-z0-9_]*|[{][A-Za-z_][A-Za-z0-9_]*[}])/)) {
        var = substr(text, RSTART + 1, RLENGTH - 1)
        gsub(/[{}]/, "", var)
        out = out substr(text, 1, RSTART - 1) (var == "$" ? "$" : var in ENVIRON ? ENVIRON[var] : known[var])
        text = substr(text, RSTART + RLENGTH)
      }
      return out text
    }
    quote != "" { read_on($0); next }
    /^[[:space:]]*(export[[:space:]]+)?[A-Za-z_][A-Za-z0-9_]*[[:space:]]*=/ {
      key = text = $0
      sub(/[[:space:]]*=.*/, "", key)
      sub(/.*[[:space:]]/, "", key)
      sub(/^[^=]*=[[:space:]]*/, "", text)
      value = ""
      quote = substr(text, 1, 1)
      if (quote == "\"" || quote == "\047") { read_on(substr(text, 2)); next }
      quote = ""
      sub(/[[:space:]]#.*/, "", text)
      sub(/[[:space:]]*$/, "", text)
      value = text
      keep()
    }
    END { printf "%s", known[name] }'
  if [ -z "$value" ] && [ -f "$ROOT/.env" ] && ! demos_env; then value=$(awk -v name="$1" "$program" "$ROOT/.env"); fi
  printf '%s' "$value"
}

# folder NAME DEFAULT: the path that a setting names, with ~ as Compose takes it.
folder() {
  local path
  path=$(setting "$1")
  path=${path:-$2}
  # shellcheck disable=SC2016 # as it is written in .env
  case $path in
    *'${'*) die "$1=$path can't be read by the scripts: they know no more than \$NAME and \${NAME}." "Write the path out in .env." ;;
    [~]/*) path=${HOME-}${path#?} ;;
    [~]*) path=${HOME-}/${path#?} ;;
  esac
  printf '%s' "$path"
}

# is_running PID SCRIPT: whether that process still is what wrote the number down, and not one that got it since.
is_running() {
  local command
  kill -0 "$1" 2>/dev/null || [ -d "/proc/$1" ] || return 1
  if [ -r "/proc/$1/cmdline" ]; then
    command=$(tr '\0' ' ' <"/proc/$1/cmdline")
  else
    command=$(ps -p "$1" -o args= 2>/dev/null) || return 1
  fi
  case " $command " in *[\ /]"$2 "*) return 0 ;; *) return 1 ;; esac
}

# lock NAME: one at a time in this folder, since they share images, tools and logs. The lock is a link that names its owner:
# it is made with its contents or not at all, so that nobody can read it half made.
lock() {
  local link=$OWN/running mine="$$ ${0##*/} $1" other pid script name
  if ! ln -s "$mine" "$link" 2>/dev/null; then
    other=$(readlink "$link" 2>/dev/null) || other=
    read -r pid script name <<<"$other"
    if [ -n "$pid" ] && is_running "$pid" "$script"; then
      die "$name is running in this folder (process $pid)." "Wait until it has ended, or stop it: kill $pid"
    fi
    # Its owner is gone without having tidied up. Of several that find this out one takes the stale lock away: whoever makes
    # the folder named after its owner, and then still finds that lock.
    if [ -n "$pid" ] && mkdir "$link.$pid" 2>/dev/null; then
      [ "$(readlink "$link" 2>/dev/null)" != "$other" ] || rm -f "$link"
      rmdir "$link.$pid"
    fi
    ln -s "$mine" "$link" 2>/dev/null ||
      die "another make took the lock of this folder just now." "Try again when it has ended. If nothing runs: rm -r .osbuilder/running*"
  fi
}

unlock() {
  case $(readlink "$OWN/running" 2>/dev/null) in "$$ "*) rm -f "$OWN/running" ;; esac
}

# ask QUESTION: yes without asking when nobody is there to answer.
ask() {
  [ -t 0 ] && [ -t 1 ] || return 0
  local answer
  printf '%s [Y/n] ' "$1"
  read -r answer || return 1
  case $answer in "" | y | Y | yes) return 0 ;; *) return 1 ;; esac
}

sha256() {
  if have sha256sum; then sha256sum "$1" | cut -d' ' -f1; else shasum -a 256 "$1" | cut -d' ' -f1; fi
}

# megabytes_free PATH
megabytes_free() { df -Pk "$1" 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }'; }

human_size() {
  awk -v b="$1" 'BEGIN { split("bytes KiB MiB GiB TiB", u, " "); i = 1; while (b >= 1024 && i < 5) { b /= 1024; i++ }
    printf (i == 1 ? "%d %s" : "%.1f %s"), b, u[i] }'
}

go_is_new_enough() {
  local version
  # Not in this folder: an older Go fails at the go.mod of a newer one.
  version=$(cd / && GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) && at_least "${version#go}" 1.21
}

# need_go: 1.21 is the first that fetches the version in go.mod by itself.
need_go() {
  go_is_new_enough || die "Go 1.21 or later is not installed." "Install it: https://go.dev/doc/install" \
    "Debian 12's own package, golang, is too old."
}

# Where Go's instructions put it: seldom in root's PATH, and newer than a Debian package that is.
if [ -x /usr/local/go/bin/go ] && ! go_is_new_enough; then export PATH=/usr/local/go/bin:$PATH; fi
