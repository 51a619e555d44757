package runner

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A watcher is one inotify instance, for one goroutine.
type watcher struct {
	fd   int
	stop func() bool // no longer ends with the context
	file *os.File    // of fd, known to Go's poller: reads can be given a deadline and be ended by close
	buf  [64 << 10]byte
}

// A notice is one event of inotify(7).
type notice struct {
	watch int
	mask  uint32
	name  string
}

// newWatcher returns a watcher that ends, at the latest, with ctx.
func newWatcher(ctx context.Context) (*watcher, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("begin to watch: %w", err)
	}
	w := &watcher{fd: fd, file: os.NewFile(uintptr(fd), "inotify")}
	w.stop = context.AfterFunc(ctx, func() { _ = w.file.Close() })
	return w, nil
}

func (w *watcher) close() {
	w.stop()
	_ = w.file.Close() // twice is harmless
}

func (w *watcher) add(path string, mask uint32) (int, error) {
	watch, err := unix.InotifyAddWatch(w.fd, path, mask)
	if err != nil {
		return 0, fmt.Errorf("watch %s: %w", path, err)
	}
	return watch, nil
}

// read waits for the next notices, for as long as timeout says; 0 is for
// ever. Nothing and no error means that the time was up.
func (w *watcher) read(timeout time.Duration) ([]notice, error) {
	var deadline time.Time
	if timeout > 0 {
		deadline = time.Now().Add(timeout)
	}
	if err := w.file.SetReadDeadline(deadline); err != nil {
		return nil, fmt.Errorf("read notices: %w", err)
	}
	n, err := w.file.Read(w.buf[:])
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read notices: %w", err)
	}
	return parseNotices(w.buf[:n]), nil
}

// parseNotices cuts what the kernel wrote. It never cuts one in two.
func parseNotices(data []byte) []notice {
	var all []notice
	for len(data) >= unix.SizeofInotifyEvent {
		length := int(binary.NativeEndian.Uint32(data[12:]))
		if length < 0 || length > len(data)-unix.SizeofInotifyEvent {
			break
		}
		name := data[unix.SizeofInotifyEvent : unix.SizeofInotifyEvent+length]
		all = append(all, notice{
			watch: int(int32(binary.NativeEndian.Uint32(data))),
			mask:  binary.NativeEndian.Uint32(data[4:]),
			name:  string(bytes.TrimRight(name, "\x00")),
		})
		data = data[unix.SizeofInotifyEvent+length:]
	}
	return all
}

// pause waits, and reports whether the time passed before ctx ended.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
