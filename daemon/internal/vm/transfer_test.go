package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"
)

func TestSend(t *testing.T) {
	r, _ := up(t, quick)
	in := filepath.Join(r.srv.Dir(), pipe.In)
	for _, size := range []int{0, 1, 261120, 261121, pipe.MaxRequest} {
		want := bytes.Repeat([]byte("x"), size)
		if err := r.b.Send(t.Context(), want); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(in)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes arrived as %d: %v", len(want), len(got), err)
		}
	}
	info, err := os.Stat(in)
	if err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if r.srv.Requests("fsync@openssh.com") != 5 || r.srv.Requests("posix-rename@openssh.com") != 5 {
		t.Error("not each was synced and renamed")
	}
}

func TestSendFailsWhole(t *testing.T) {
	for name, test := range map[string]struct {
		harm    func(*vmtest.Faults)
		renames int
		says    string
	}{
		"write":  {func(f *vmtest.Faults) { f.FailWrite = true }, 0, "write "},
		"full":   {func(f *vmtest.Faults) { f.Full = true }, 0, "no room on the VM's data disk: 9 bytes are needed, 0 bytes are free (write "},
		"sync":   {func(f *vmtest.Faults) { f.FailFsync = true }, 0, "sync "},
		"rename": {func(f *vmtest.Faults) { f.FailRename = true }, 1, "rename "},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := up(t, quick)
			if err := r.b.Send(t.Context(), []byte("before")); err != nil {
				t.Fatal(err)
			}
			r.srv.Set(test.harm)
			err := r.b.Send(t.Context(), []byte("a request"))
			if err == nil || errors.Is(err, vm.ErrDown) || !strings.Contains(err.Error(), test.says) || errors.Is(err, vm.ErrFull) != (name == "full") {
				t.Errorf("Send: %v", err)
			}
			if n := r.srv.Requests("posix-rename@openssh.com"); n != 1+test.renames {
				t.Errorf("%d renames", n-1)
			}
			if got, _ := os.ReadFile(filepath.Join(r.srv.Dir(), pipe.In)); string(got) != "before" {
				t.Errorf("pipe_in holds %q", got)
			}
			if left, _ := filepath.Glob(filepath.Join(r.srv.Dir(), ".pipe_in.*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
			r.srv.Set(func(f *vmtest.Faults) { *f = vmtest.Faults{} })
			if err := r.b.Send(t.Context(), []byte("again")); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestSendAfterContextEnded(t *testing.T) {
	r, _ := up(t, quick)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.b.Send(ctx, []byte("too late")); !errors.Is(err, context.Canceled) {
		t.Errorf("Send: %v", err)
	}
	if err := r.b.Send(t.Context(), []byte("in time")); err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(filepath.Join(r.srv.Dir(), pipe.In)); string(got) != "in time" {
		t.Errorf("pipe_in holds %q", got)
	}
}

func TestSendSideBySide(t *testing.T) {
	r, _ := up(t, quick)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if err := r.b.Send(t.Context(), []byte(fmt.Sprint(i))); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := r.srv.Requests("posix-rename@openssh.com"); n != 20 {
		t.Errorf("%d renames", n)
	}
}

// What is old is for the VM's clock to say, wherever ours stands. An upload is
// never too old to go on with.
func TestStaleRequestsAreRemoved(t *testing.T) {
	for name, behind := range map[string]time.Duration{"as ours": 0, "behind": 2 * time.Hour, "ahead": -2 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			vmtest.NewPipe(t, srv.Dir())
			now := time.Now().Add(-behind)
			for file, age := range map[string]time.Duration{
				pipe.Out: 0, ".pipe_in.old": 90 * time.Minute, ".pipe_in.fresh": time.Minute,
				".inputs-old": 90 * time.Minute, ".inputs-fresh": time.Minute,
			} {
				file = filepath.Join(srv.Dir(), file)
				f, err := os.OpenFile(file, os.O_CREATE|os.O_WRONLY, 0o600)
				if err != nil {
					t.Fatal(err)
				}
				f.Close()
				if err := os.Chtimes(file, now.Add(-age), now.Add(-age)); err != nil {
					t.Fatal(err)
				}
			}
			r := start(t, srv, newSink(pipe.Position{}), quick)
			r.sink.untilUp(t, 1)
			for file, stays := range map[string]bool{".pipe_in.old": false, ".pipe_in.fresh": true, ".inputs-old": true, ".inputs-fresh": true} {
				if _, err := os.Stat(filepath.Join(srv.Dir(), file)); err != nil == stays {
					t.Errorf("%s: %v", file, err)
				}
			}
		})
	}
}

func artifact(t *testing.T, srv *vmtest.Server, size int) (string, []byte) {
	t.Helper()
	data := make([]byte, size)
	source := rand.NewChaCha8([32]byte{1})
	_, _ = source.Read(data)
	name := filepath.Join(srv.Dir(), "image.iso")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return name, data
}

func TestCopy(t *testing.T) {
	for _, size := range []int{0, 1, 261119, 261120, 261121, 522240, 20_000_001} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r, _ := up(t, quick)
			name, data := artifact(t, r.srv, size)
			for _, offset := range []int{0, 1, size / 2, size} {
				if offset > size {
					continue
				}
				var got bytes.Buffer
				n, err := r.b.Copy(t.Context(), name, int64(offset), &got)
				if err != nil || n != int64(got.Len()) || !bytes.Equal(got.Bytes(), data[offset:]) {
					t.Errorf("from %d: %d bytes, %v, same: %v", offset, n, err, bytes.Equal(got.Bytes(), data[offset:]))
				}
			}
		})
	}
}

// However the server misbehaves, what was written is a prefix, and an end
// before the end is an error.
func TestCopyNeverLosesBytesInSilence(t *testing.T) {
	for name, test := range map[string]struct {
		harm func(*vmtest.Faults)
		want error
	}{
		"clips reads":   {func(f *vmtest.Faults) { f.MaxRead = 100_000 }, vm.ErrShort},
		"short file":    {func(f *vmtest.Faults) { f.ShortReads = "image.iso" }, vm.ErrShort},
		"one session":   {func(f *vmtest.Faults) { f.MaxSessions = 2 }, nil}, // events and watcher; so over the events' one
		"stalls":        {func(f *vmtest.Faults) { f.StallReads = "image.iso" }, vm.ErrStalled},
		"offset beyond": {nil, vm.ErrShort},
		"no such file":  {nil, os.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			timings := quick
			if test.want == vm.ErrStalled { //nolint:errorlint // it is the table's
				timings.Stall = 300 * time.Millisecond
			}
			r, _ := up(t, timings)
			r.srv.AwaitWatcher(t, 1)
			file, data := artifact(t, r.srv, 3_000_000)
			var offset int64
			switch {
			case test.harm != nil:
				r.srv.Set(test.harm)
			case errors.Is(test.want, os.ErrNotExist):
				file += "-not"
			default:
				offset = int64(len(data)) + 1
			}
			var got bytes.Buffer
			n, err := r.b.Copy(t.Context(), file, offset, &got)
			if !errors.Is(err, test.want) || errors.Is(err, vm.ErrDown) {
				t.Errorf("Copy: %v, want %v", err, test.want)
			}
			if n != int64(got.Len()) || !bytes.HasPrefix(data, got.Bytes()) {
				t.Errorf("%d bytes reported, %d written, a prefix: %v", n, got.Len(), bytes.HasPrefix(data, got.Bytes()))
			}
		})
	}
}

func TestCopyOverACutIsResumed(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	name, data := artifact(t, srv, 12_000_000)
	srv.Set(func(f *vmtest.Faults) { f.CutAfter = 5_000_000 })
	r := start(t, srv, newSink(pipe.Position{}), quick)
	var got bytes.Buffer
	for cuts := 0; ; cuts++ {
		r.sink.untilUp(t, cuts+1)
		_, err := r.b.Copy(t.Context(), name, int64(got.Len()), &got)
		if err == nil {
			if cuts < 2 {
				t.Errorf("only %d cuts", cuts)
			}
			break
		}
		if !errors.Is(err, vm.ErrDown) || cuts > 50 {
			t.Fatalf("after %d cuts: %v", cuts, err)
		}
	}
	if !bytes.Equal(got.Bytes(), data) {
		t.Error("not the same bytes")
	}
}

// blockedWriter blocks its first write until told.
type blockedWriter struct {
	entered, leave chan struct{}
	once           sync.Once
	err            error
}

func (w *blockedWriter) Write(p []byte) (int, error) {
	w.once.Do(func() { close(w.entered) })
	<-w.leave
	return len(p), w.err
}

func TestCopyEndsWithContext(t *testing.T) {
	r, _ := up(t, quick)
	name, _ := artifact(t, r.srv, 3_000_000)
	r.srv.Set(func(f *vmtest.Faults) { f.StallReads = "image.iso" })
	ctx, cancel := context.WithCancel(t.Context())
	opened := make(chan error, 1)
	go func() {
		_, err := r.b.Copy(ctx, name, 0, &bytes.Buffer{})
		opened <- err
	}()
	cancel()
	if err := <-opened; !errors.Is(err, context.Canceled) {
		t.Errorf("Copy: %v", err)
	}
	r.srv.Set(func(f *vmtest.Faults) { f.StallReads = "" })
	if _, err := r.b.Copy(t.Context(), name, 0, &bytes.Buffer{}); err != nil { // the link is as good as before
		t.Error(err)
	}
}

func TestCopyWhenTheLinkDies(t *testing.T) {
	r, _ := up(t, quick)
	name, _ := artifact(t, r.srv, 30_000_000)
	w := &blockedWriter{entered: make(chan struct{}), leave: make(chan struct{})}
	done := make(chan error, 1)
	go func() {
		_, err := r.b.Copy(t.Context(), name, 0, w)
		done <- err
	}()
	<-w.entered
	r.srv.Cut()
	close(w.leave)
	if err := <-done; !errors.Is(err, vm.ErrDown) {
		t.Errorf("Copy: %v", err)
	}
	r.sink.untilUp(t, 2)
}

func TestCopyReportsItsWritersError(t *testing.T) {
	r, p := up(t, quick)
	name, _ := artifact(t, r.srv, 3_000_000)
	full := errors.New("no space left on device")
	w := &blockedWriter{entered: make(chan struct{}), leave: make(chan struct{}), err: full}
	close(w.leave)
	if _, err := r.b.Copy(t.Context(), name, 0, w); !errors.Is(err, full) || errors.Is(err, vm.ErrDown) {
		t.Errorf("Copy: %v", err)
	}
	p.Append(lines(1)...)
	r.sink.untilAt(t, p.End())
	r.sink.until(t, "one link", func(s *sink) bool { return s.ups == 1 })
}

// A download doesn't hold up the events.
func TestEventsComeDuringADownload(t *testing.T) {
	r, p := up(t, quick)
	name, _ := artifact(t, r.srv, 30_000_000)
	w := &blockedWriter{entered: make(chan struct{}), leave: make(chan struct{})}
	done := make(chan error, 1)
	go func() {
		_, err := r.b.Copy(t.Context(), name, 0, w)
		done <- err
	}()
	<-w.entered
	for range 10 {
		p.Append(lines(1)...)
		r.sink.untilAt(t, p.End())
	}
	if err := r.b.Send(t.Context(), []byte("and requests go out")); err != nil {
		t.Error(err)
	}
	close(w.leave)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
