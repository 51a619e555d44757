package vm

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/crypto/ssh"
)

// watchScript runs in the VM as long as the link lives. Each line that it
// reads arms one inotifywait, which says "x" at the first change and ends.
//
// Why not inotifywait -m: it outlives its client, and while nobody reads its
// words they pile up in the channel and wake us for long-read events. This
// way nothing is written while we are busy, and a script that waits in `read`
// sees the end of the link at once, whether we closed it or it broke.
//
// What inotifywait says on standard error comes back too: "Watches
// established." is a wake-up of its own, for what was written since our last
// read.
const watchScript = `export LC_ALL=C; p=
while read -r _; do
  [ -z "$p" ] || kill "$p" 2>/dev/null
  inotifywait -e modify,create,moved_to --format x %s 2>&1 &
  p=$!
done
[ -z "$p" ] || kill "$p" 2>/dev/null`

// A watcher wakes the follower when something changes in the pipe's
// directory. It is a convenience: without it the follower polls.
type watcher struct {
	wake chan struct{} // holds one wake-up

	log   *zap.Logger
	input io.WriteCloser // nil: there is no watcher
	ended chan struct{}  // closed when nothing of it is left in the VM, or the link is closed

	armed  atomic.Bool
	broken atomic.Bool
}

// watch starts a watcher. If that can't be, it says so once and returns one
// that never wakes anybody.
func watch(ctx context.Context, l *link, dir string, log *zap.Logger) *watcher {
	w := &watcher{wake: make(chan struct{}, 1), log: log, ended: make(chan struct{})}
	type ends struct {
		input  io.WriteCloser
		output io.Reader
	}
	session, err := call(ctx, l, l.t.Call, "start inotifywait", func() (e ends, err error) {
		session, err := opening(l, (*ssh.Client).NewSession)
		if err != nil {
			return e, sessionError(l.ssh, err)
		}
		if e.input, err = session.StdinPipe(); err != nil {
			return e, err
		}
		if e.output, err = session.StdoutPipe(); err != nil {
			return e, err
		}
		return e, session.Start(fmt.Sprintf(watchScript, shellQuote(dir)))
	})
	if err != nil {
		w.broken.Store(true)
		if l.reason() == nil && ctx.Err() == nil {
			fields := []zap.Field{zap.Error(err)}
			if refused(err) {
				fields = append(fields, zap.String("hint", moreSessions))
			}
			log.Warn("no wake-ups from the builder, polling instead", fields...)
		}
		return w
	}
	w.input = session.input
	l.start(func() { w.listen(session.output) })
	return w
}

func (w *watcher) listen(output io.Reader) {
	defer close(w.ended)
	defer w.broken.Store(true)
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		switch line := lines.Text(); line {
		case "Setting up watches.":
			continue
		case "x":
			w.armed.Store(false)
		case "Watches established.":
		default: // inotifywait's complaint, or the shell's
			if !w.broken.Swap(true) {
				w.log.Warn("no wake-ups from the builder, polling instead", zap.String("said", line))
			}
		}
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// arm makes sure that the next change wakes us, and reports whether it will.
func (w *watcher) arm() bool {
	if w.broken.Load() {
		return false
	}
	if w.armed.Swap(true) {
		return true
	}
	if _, err := io.WriteString(w.input, "\n"); err != nil {
		w.broken.Store(true)
		return false
	}
	return true
}

// doubt notes that a change came and no wake-up: the next arm starts anew.
func (w *watcher) doubt() { w.armed.Store(false) }

// stop ends the watcher in the VM. It waits a moment for its end, so that the
// link can be closed after.
func (w *watcher) stop(l *link) {
	if w.input == nil {
		return
	}
	// While this blocks the link is of no use anyway, and will be closed.
	l.start(func() { w.input.Close() })
	timer := time.NewTimer(stopBound)
	defer timer.Stop()
	select {
	case <-w.ended:
	case <-l.done: // the script sees the end of its input just as well
	case <-timer.C:
	}
}

// stopBound keeps a clean stop well below the container's grace period.
const stopBound = 2 * time.Second

// shellQuote makes one word of s for a shell.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
