package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"

	"github.com/pkg/sftp"

	"osbuilder/pipe"
)

// Upload puts a job's inputs, size bytes that write writes, where the runner
// looks for those of that SHA-256: under a temporary name, synced, checked
// for its size, then renamed. What is there already is not written again, and
// an upload that broke off goes on where it stopped, unless fresh is set:
// then all begins anew, because the runner found other bytes than it should.
//
// write must write the same bytes each time that it is called. Upload returns
// soon after ctx ends; write then gets an error from its writer. After an
// error, Upload may be called again.
func (b *Builder) Upload(ctx context.Context, sha256 string, size int64, fresh bool, write func(io.Writer) error) error {
	what := "upload inputs-" + sha256
	l, err := b.connected()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	u := &upload{
		size: size, fresh: fresh, write: write, progress: make(progress, 1), stop: make(chan struct{}),
		name: path.Join(b.cfg.Dir, pipe.InputsFile(sha256)), temp: path.Join(b.cfg.Dir, pipe.InputsTempPrefix+sha256),
	}
	defer close(u.stop)
	return l.transfer(ctx, what, u.progress, func(c *sftp.Client) error {
		err := u.run(c)
		return noRoom(c, b.cfg.Dir, u.size-u.at, err)
	})
}

// An upload is one call of Upload, as its goroutine sees it.
type upload struct {
	name, temp string
	size       int64
	at         int64 // how much of it is there
	fresh      bool
	write      func(io.Writer) error
	progress   progress
	stop       chan struct{} // closed when nobody waits any more
}

func (u *upload) run(c *sftp.Client) error {
	if u.fresh {
		for _, name := range []string{u.name, u.temp} {
			// A later upload may be at work there.
			if err := u.stopped(); err != nil {
				return err
			}
			if err := remove(c, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("remove %s: %w", name, err)
			}
		}
	}
	if info, err := c.Lstat(u.name); err == nil && info.Mode().IsRegular() && info.Size() == u.size {
		return nil // it came before; whether it is right is for the runner to say
	}
	if err := u.fill(c); err != nil {
		return err
	}
	if err := u.stopped(); err != nil {
		return err
	}
	if err := rename(c, u.temp, u.name); err != nil {
		return fmt.Errorf("rename %s: %w", u.temp, err)
	}
	return nil
}

// fill writes what the temporary file lacks.
func (u *upload) fill(c *sftp.Client) error {
	if err := u.stopped(); err != nil {
		return err
	}
	f, err := create(c, u.temp, os.O_WRONLY|os.O_CREATE)
	if err != nil {
		return fmt.Errorf("create %s: %w", u.temp, err)
	}
	closed := false
	defer func() {
		if !closed {
			_ = f.Close()
		}
	}()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("look at %s: %w", u.temp, err)
	}
	have := info.Size()
	if have > u.size {
		have = 0
		if err := f.Truncate(0); err != nil {
			return fmt.Errorf("empty %s: %w", u.temp, err)
		}
	}
	if _, err := f.Seek(have, io.SeekStart); err != nil {
		return fmt.Errorf("go on in %s: %w", u.temp, err)
	}
	// One write at a time: with several at once, a broken one leaves a hole
	// before the others, and the size would not say how much there is.
	u.at = have
	out := bufio.NewWriterSize(u.guard(f), maxPacket)
	if err := u.write(&skipper{w: out, skip: have, moved: u.progress.moved}); err != nil {
		return err
	}
	if err := out.Flush(); err != nil {
		return err
	}
	if err := u.sync(f); err != nil {
		return err
	}
	if info, err = f.Stat(); err != nil {
		return fmt.Errorf("look at %s: %w", u.temp, err)
	}
	if info.Size() != u.size {
		return fmt.Errorf("%w: %s has %d bytes, want %d", ErrShort, u.temp, info.Size(), u.size)
	}
	closed = true
	if err := f.Close(); err != nil {
		return fmt.Errorf("close %s: %w", u.temp, err)
	}
	return nil
}

// stopped is an error once nobody waits any more.
func (u *upload) stopped() error {
	select {
	case <-u.stop:
		return errShut
	default:
		return nil
	}
}

// syncEvery bounds what one sync has to write: all at the end could take longer
// than a stall.
const syncEvery = 64 << 20

func (u *upload) sync(f *remoteFile) error {
	u.progress.moved()
	defer u.progress.moved()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", u.temp, err)
	}
	return nil
}

// guard passes writes on until nobody waits for them, and says that they are
// made.
func (u *upload) guard(f *remoteFile) io.Writer {
	return writerFunc(func(p []byte) (int, error) {
		if err := u.stopped(); err != nil {
			return 0, err
		}
		n, err := f.Write(p)
		u.progress.moved()
		if err != nil {
			return n, fmt.Errorf("write %s: %w", u.temp, err)
		}
		before := u.at
		u.at += int64(n)
		if before/syncEvery == u.at/syncEvery {
			return n, nil
		}
		return n, u.sync(f)
	})
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A skipper drops the first bytes: those that are there.
type skipper struct {
	w     io.Writer
	skip  int64
	moved func()
}

func (s *skipper) Write(p []byte) (int, error) {
	n := int(min(s.skip, int64(len(p))))
	s.skip -= int64(n)
	s.moved()
	if n == len(p) {
		return n, nil
	}
	k, err := s.w.Write(p[n:])
	return n + k, err
}
