package inbox

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
)

// A watcher wakes the inbox when something happens in the folder. Its notes
// are hints: without any the rescan remains. One thing only they tell: that a
// file was moved in, and so is whole.
type watcher struct {
	file    *os.File // inotify(7); nil: deaf
	broken  error    // why it is deaf
	notes   chan note
	done    chan struct{} // closed when nobody listens any more
	dir     int           // the watch of the folder; 0: none
	watched os.FileInfo   // the folder as it was when the watch began
	from    note          // the last file that was moved away
	whole   map[string]bool
	log     *zap.Logger
}

// A note is one event of inotify(7).
type note struct {
	watch  int
	mask   uint32
	cookie uint32 // ties the two events of a rename together
	name   string
}

// What is of interest: names that come and go, and who has finished writing.
// What is being written is looked at again anyway.
const interest = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_CLOSE_WRITE | unix.IN_ATTRIB |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

func (b *Inbox) newWatcher() *watcher {
	w := &watcher{log: b.log, notes: make(chan note), done: make(chan struct{}), whole: make(map[string]bool)}
	if b.deaf {
		return w
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		w.broken = hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify instances: sysctl fs.inotify.max_user_instances")
		return w
	}
	w.file = os.NewFile(uintptr(fd), "inotify") // known to Go's poller, so that close ends a read
	return w
}

// read hands out notes until the watcher is closed.
func (w *watcher) read() {
	if w.file == nil {
		return
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			if !errors.Is(err, os.ErrClosed) {
				w.log.Debug("no more events come", zap.Error(err))
			}
			return
		}
		for _, e := range parseNotes(buf[:n]) {
			select {
			case w.notes <- e:
			case <-w.done:
				return
			}
		}
	}
}

// parseNotes cuts what the kernel wrote. It never cuts one in two.
func parseNotes(data []byte) []note {
	var all []note
	for len(data) >= unix.SizeofInotifyEvent {
		length := int(binary.NativeEndian.Uint32(data[12:]))
		if length > len(data)-unix.SizeofInotifyEvent {
			break
		}
		name := data[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+length]
		all = append(all, note{
			watch:  int(int32(binary.NativeEndian.Uint32(data))),
			mask:   binary.NativeEndian.Uint32(data[4:]),
			cookie: binary.NativeEndian.Uint32(data[8:]),
			name:   string(bytes.TrimRight(name, "\x00")),
		})
		data = data[unix.SizeofInotifyEvent+length:]
	}
	return all
}

func (w *watcher) close() {
	close(w.done)
	if w.file != nil {
		_ = w.file.Close() // there is nothing that it could still lose
	}
}

// note takes from an event whether the folder itself went away, and which file
// is whole.
func (w *watcher) note(n note) {
	switch {
	case n.mask&unix.IN_Q_OVERFLOW != 0:
		// A look at everything makes good for it, and one follows.
		w.log.Debug("events were lost")
	case n.watch != w.dir:
	case n.mask&(unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_IGNORED|unix.IN_UNMOUNT) != 0:
		w.watched = nil
	case n.mask&unix.IN_MOVED_FROM != 0:
		w.from = n
	case n.mask&unix.IN_MOVED_TO != 0:
		// From outside, or from a name under which it was being made. Another
		// name in the folder says nothing about the file.
		inside := w.from.mask != 0 && w.from.cookie == n.cookie
		if !inside || ignored(w.from.name) {
			w.whole[n.name] = true
		}
		w.from = note{}
	case n.mask&unix.IN_CREATE != 0:
		delete(w.whole, n.name) // another file, which begins to grow
	}
}

// takeWhole returns the names of files that were moved in since it was last
// asked.
func (w *watcher) takeWhole() map[string]bool {
	whole := w.whole
	w.whole = make(map[string]bool)
	return whole
}

// gather takes events for a while. It reports whether ctx still lasts.
func (w *watcher) gather(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case n := <-w.notes:
			w.note(n)
		}
	}
}

// watch sees to it that the folder that is at dir now is watched: it may have
// been removed, or another put in its place.
func (w *watcher) watch(dir string) error {
	if w.file == nil {
		return w.broken
	}
	now, err := os.Stat(dir)
	if err != nil {
		w.watched = nil
		return err
	}
	if w.watched != nil && os.SameFile(w.watched, now) {
		return nil
	}
	conn, err := w.file.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch jobs folder: %w", err)
	}
	w.watched = nil
	var added error
	err = conn.Control(func(fd uintptr) {
		if w.dir != 0 {
			_, _ = unix.InotifyRmWatch(int(fd), uint32(w.dir)) // of the folder that was there; as a rule it ended by itself
		}
		w.dir, added = unix.InotifyAddWatch(int(fd), dir, interest)
	})
	if err := errors.Join(err, added); err != nil {
		w.dir = 0
		return hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify watches: sysctl fs.inotify.max_user_watches")
	}
	w.watched = now
	return nil
}
