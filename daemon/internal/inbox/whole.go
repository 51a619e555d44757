package inbox

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// wholes tells what fsnotify can't: which files were moved in, and so are
// whole, while others of that name begin to grow (both are its Create); and
// when who wrote a file has closed it.
type wholes struct {
	file  *os.File // inotify(7)
	notes chan note
	done  chan struct{} // closed when nobody listens any more
	dir   int           // the watch of the folder; 0: none
	from  note          // the last file that was moved away
	names map[string]bool
	log   *zap.Logger
}

// A note is one event of inotify(7).
type note struct {
	watch  int
	mask   uint32
	cookie uint32 // ties the two events of a rename together
	name   string
}

const interest = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_CLOSE_WRITE | unix.IN_ONLYDIR

func newWholes(log *zap.Logger) (*wholes, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return &wholes{
		file:  os.NewFile(uintptr(fd), "inotify"), // known to Go's poller, so that close ends a read
		notes: make(chan note), done: make(chan struct{}), names: make(map[string]bool), log: log,
	}, nil
}

// read hands out notes until it is closed.
func (w *wholes) read() {
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

func (w *wholes) close() {
	close(w.done)
	_ = w.file.Close() // there is nothing that it could still lose
}

// note takes from an event which file is whole. It reports whether the folder
// that was watched is gone.
func (w *wholes) note(n note) (gone bool) {
	switch {
	case n.mask&unix.IN_Q_OVERFLOW != 0:
		// A look at everything makes good for it, and one follows.
		w.log.Debug("events were lost")
	case n.watch != w.dir:
	case n.mask&(unix.IN_IGNORED|unix.IN_UNMOUNT) != 0:
		return true
	case n.mask&unix.IN_MOVED_FROM != 0:
		w.from = n
	case n.mask&unix.IN_MOVED_TO != 0:
		// From outside, or from a name under which it was being made. Another
		// name in the folder says nothing about the file.
		inside := w.from.mask != 0 && w.from.cookie == n.cookie
		if !inside || ignored(w.from.name) {
			w.names[n.name] = true
		}
		w.from = note{}
	case n.mask&unix.IN_CREATE != 0:
		delete(w.names, n.name) // another file, which begins to grow
	}
	return false
}

// take returns the names of files that were moved in since it was last asked.
func (w *wholes) take() map[string]bool {
	names := w.names
	w.names = make(map[string]bool)
	return names
}

// watch watches the folder that is at dir now.
func (w *wholes) watch(dir string) error {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return err
	}
	var added error
	err = conn.Control(func(fd uintptr) {
		if w.dir != 0 {
			_, _ = unix.InotifyRmWatch(int(fd), uint32(w.dir)) // of the folder that was there; as a rule it ended by itself
		}
		w.dir, added = unix.InotifyAddWatch(int(fd), dir, interest)
	})
	if err := errors.Join(err, added); err != nil {
		w.dir = 0
		return fmt.Errorf("watch for files that are moved in: %w", err)
	}
	return nil
}
