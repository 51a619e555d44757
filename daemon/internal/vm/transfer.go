package vm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"sync"
	"time"

	"osbuilder/pipe"

	"github.com/pkg/sftp"
	"go.uber.org/zap"
)

// tempPrefix begins the names of requests that aren't whole yet. The runner
// acts on no name but pipe_in.
const tempPrefix = "." + pipe.In + "."

// staleAfter is how old a temporary file must be before it counts as the
// remains of a crash.
const staleAfter = time.Hour

// Send writes a request to pipe_in: whole and synced under a temporary name,
// then renamed into place. Requests go one after the other.
//
// Without a link it returns ErrDown. After an error it isn't known whether
// the runner saw the request; to write the same bytes again is safe.
func (b *Builder) Send(ctx context.Context, request []byte) error {
	const what = "write request"
	l, err := b.connected()
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return l.do(ctx, what, func() error {
		// Held until the writing is over, even if ctx ends before: no older request may overtake a newer one.
		select {
		case b.sending <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-l.done:
			return l.reason()
		}
		defer func() { <-b.sending }()
		return noRoom(l.sftp, b.cfg.Dir, int64(len(request)), writeRequest(ctx, l.sftp, b.cfg.Dir, request))
	})
}

// writeRequest puts data into place. Once ctx has ended it takes no further
// step, and the rename above all.
func writeRequest(ctx context.Context, c *sftp.Client, dir string, data []byte) (err error) {
	var random [8]byte
	_, _ = rand.Read(random[:]) // never fails, since Go 1.24
	temp := path.Join(dir, tempPrefix+hex.EncodeToString(random[:]))
	f, err := create(c, temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL)
	if err != nil {
		return fmt.Errorf("create %s: %w", temp, err)
	}
	closed := false
	defer func() {
		if err == nil {
			return
		}
		if !closed {
			_ = f.Close()
		}
		// A rename that was answered with an error may have happened; then there is nothing to remove.
		if gone := remove(c, temp); gone != nil && !errors.Is(gone, os.ErrNotExist) && !connectionLost(gone) {
			err = errors.Join(err, fmt.Errorf("remove %s: %w", temp, gone))
		}
	}()
	steps := []struct {
		verb string
		do   func() error
	}{
		{"set the mode of", func() error { return f.Chmod(0o660) }}, // the server's umask takes the group's right away
		{"write", func() error { _, err := f.Write(data); return err }},
		{"sync", f.Sync},
		{"close", func() error { closed = true; return f.Close() }},
		{"rename to " + pipe.In + " the file", func() error { return rename(c, temp, path.Join(dir, pipe.In)) }},
	}
	for _, step := range steps {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := step.do(); err != nil {
			return fmt.Errorf("%s %s: %w", step.verb, temp, err)
		}
	}
	return nil
}

// clean removes what a crash in the middle of Send left behind. If it can't,
// nothing depends on it. Uploads are left to the runner, and to who goes on with them.
//
// What is old is told by the VM's clock alone, which may be another than ours:
// by the youngest file there.
func (b *Builder) clean(ctx context.Context, l *link) {
	err := l.do(ctx, "remove stale requests", func() error {
		list, err := l.sftp.ReadDir(b.cfg.Dir)
		if err != nil {
			return err
		}
		var youngest time.Time
		for _, info := range list {
			if info.ModTime().After(youngest) {
				youngest = info.ModTime()
			}
		}
		for _, info := range list {
			if !strings.HasPrefix(info.Name(), tempPrefix) || youngest.Sub(info.ModTime()) < staleAfter {
				continue
			}
			if err := remove(l.sftp, path.Join(b.cfg.Dir, info.Name())); err != nil {
				return fmt.Errorf("%s: %w", info.Name(), err)
			}
			b.log.Info("stale request removed", zap.String("file", info.Name()), zap.Time("written", info.ModTime()))
		}
		return nil
	})
	if err != nil && l.reason() == nil && ctx.Err() == nil {
		b.log.Warn("stale requests stay", zap.Error(err))
	}
}

// Copy writes the remote file from offset to its end to w, and returns how
// many bytes w took. They are always a prefix of what was asked for, so that
// a later Copy can go on behind them; whether they are the right bytes is for
// a digest to say. nil means that w has all of the file.
//
// It returns soon after ctx ends, and doesn't write to w after it returned.
func (b *Builder) Copy(ctx context.Context, name string, offset int64, w io.Writer) (int64, error) {
	what := "download " + name
	l, err := b.connected()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	g := &gate{w: w, progress: make(progress, 1)}
	err = l.transfer(ctx, what, g.progress, func(c *sftp.Client) error { return download(c, name, offset, g) })
	return g.shut(), err
}

// progress says that a transfer goes on.
type progress chan struct{}

func (p progress) moved() {
	select {
	case p <- struct{}{}:
	default:
	}
}

// transfer runs f, which says through p that it goes on, and returns when f
// does, when ctx ends, when f stalls, or when the link dies. In all but the
// first case f may go on for a while, as in call.
func (l *link) transfer(ctx context.Context, what string, p progress, f func(*sftp.Client) error) error {
	if !l.begin() {
		return l.down(what)
	}
	result := make(chan error, 1)
	opened := make(chan *sftp.Client, 1)
	go func() {
		defer l.wg.Done()
		// A session of its own: what is under way with a large file would delay the events by as much.
		c, err := opening(l, newSFTP)
		switch {
		case err == nil:
			opened <- c
			err = f(c)
			l.start(func() { _ = c.Close() }) // waits for the server
		case refused(err): // the server allows few sessions
			err = f(l.sftp)
		}
		result <- err
	}()
	stall := time.NewTimer(l.t.Stall)
	defer stall.Stop()
	var err error
	for err == nil {
		select {
		case err := <-result:
			return l.explain(what, err)
		case <-p:
			stall.Reset(l.t.Stall)
		case <-l.done:
			return l.down(what)
		case <-ctx.Done():
			err = context.Cause(ctx)
		case <-stall.C:
			err = fmt.Errorf("%w: not a byte for %s", ErrStalled, l.t.Stall)
		}
	}
	// Ends what is under way, if the server still answers; else that ends with the link.
	select {
	case c := <-opened:
		l.start(func() { _ = c.Close() })
	default:
	}
	return fmt.Errorf("%s: %w", what, err)
}

func download(c *sftp.Client, name string, offset int64, g *gate) error {
	f, err := c.Open(name)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if offset > info.Size() {
		return fmt.Errorf("%w: from %d on, it has %d bytes", ErrShort, offset, info.Size())
	}
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return err
	}
	n, err := f.WriteTo(g)
	if err != nil {
		return err
	}
	if n != info.Size()-offset {
		return fmt.Errorf("%w: %d bytes from %d on, it has %d", ErrShort, n, offset, info.Size())
	}
	return nil
}

// A gate stands between the goroutine that reads from the VM and the caller's
// writer, which it may not touch once Copy has returned.
type gate struct {
	progress progress

	mu    sync.Mutex // guards what follows, and is held while w is written to
	w     io.Writer
	n     int64
	short bool // a read came back shorter than asked for
}

var errShut = errors.New("the download was given up")

// Write implements io.Writer. pkg/sftp reads chunks of maxPacket side by side
// and takes a shorter one for the last. If another follows, a piece between
// the two is missing, and it would not say so.
func (g *gate) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.w == nil {
		return 0, errShut
	}
	if g.short {
		return 0, fmt.Errorf("%w: the server sends less than the %d bytes that were asked for at once", ErrShort, maxPacket)
	}
	g.short = len(p) < maxPacket
	n, err := g.w.Write(p)
	g.n += int64(n)
	g.progress.moved()
	if err != nil {
		return n, &localError{err}
	}
	return n, nil
}

// shut takes the writer away and returns how much it got.
func (g *gate) shut() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.w = nil
	return g.n
}

// localError is an error of the caller's writer. Whatever it is, it says
// nothing about the link.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }
