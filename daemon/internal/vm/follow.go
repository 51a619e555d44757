package vm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"osbuilder/pipe"

	"github.com/pkg/sftp"
	"go.uber.org/zap"
)

// A follower reads the generations of one pipe_out in their order and hands
// the events to the Sink. It lives as long as one link.
//
// When to look is separate from what is read: a wake-up, a tick and a poll
// all mean no more than that it is time to read on.
type follower struct {
	link    *link
	sink    Sink
	builder string
	dir     string
	t       Timings
	log     *zap.Logger
	onHello func(pipe.Hello)
	noted   map[string]bool // what was complained about on this link
	buf     []byte          // of the last read, if nobody writes to it any more
}

// A generation is one file of events, open.
type generation struct {
	file  *sftp.File
	path  string
	id    pipe.Generation
	hello pipe.Hello // of the current one only
	final bool       // nothing will be appended
}

// open opens the current generation and reads its hello.
func (f *follower) open(ctx context.Context) (*generation, error) {
	g := &generation{path: path.Join(f.dir, pipe.Out)}
	if err := f.openFile(ctx, g); err != nil {
		if errors.Is(err, ErrDown) {
			return nil, err
		}
		return nil, &RungError{RungPipe, err}
	}
	hello, err := f.readHello(ctx, g)
	switch {
	case errors.Is(err, ErrDown):
		return nil, err
	case err != nil:
		f.closeFile(ctx, g)
		return nil, &RungError{RungPipe, fmt.Errorf("%s: %w", g.path, err)}
	case hello.Protocol != pipe.Version:
		f.closeFile(ctx, g)
		return nil, &RungError{RungProtocol, fmt.Errorf("runner %s in image %s speaks version %d of the pipe's protocol, this sidecar version %d",
			hello.Runner, hello.Image, hello.Protocol, pipe.Version)}
	}
	g.id, g.hello = hello.Generation, hello
	f.onHello(hello)
	return g, nil
}

func (f *follower) openFile(ctx context.Context, g *generation) (err error) {
	g.file, err = call(ctx, f.link, f.t.Call, "open "+g.path, func() (*sftp.File, error) { return f.link.sftp.Open(g.path) })
	return err
}

// closeFile tells the server that we are done with the file. It matters only
// while the link lives, so an error matters to nobody.
func (f *follower) closeFile(ctx context.Context, g *generation) {
	_ = f.link.do(ctx, "close "+g.path, g.file.Close)
}

// errNoHello: the runner has made the file and not yet written its first line.
var errNoHello = errors.New("no hello in it yet")

func (f *follower) readHello(ctx context.Context, g *generation) (pipe.Hello, error) {
	// As a rule it is a few hundred bytes; it can be longer, since it lists jobs.
	for size := 4 << 10; ; size = min(16*size, pipe.MaxLine) {
		head, _, err := f.read(ctx, g, size, 0)
		if err != nil {
			return pipe.Hello{}, err
		}
		line, _, whole := bytes.Cut(head, []byte("\n"))
		switch {
		case len(head) > 0 && head[0] == 0:
			return pipe.Hello{}, fmt.Errorf("read hello: %w", pipe.ErrPunched)
		case !whole && len(head) == pipe.MaxLine:
			return pipe.Hello{}, fmt.Errorf("read hello: %w", pipe.ErrLineTooLong)
		case !whole && len(head) == size:
			continue
		case !whole:
			return pipe.Hello{}, errNoHello
		}
		e, err := pipe.ParseEvent(line)
		if err != nil {
			return pipe.Hello{}, fmt.Errorf("read hello: %w", err)
		}
		if e.Type != pipe.TypeHello {
			return pipe.Hello{}, fmt.Errorf("read hello: its first event is %q", e.Type)
		}
		return *e.Hello, nil
	}
}

// read reads up to size bytes from offset, as far as there is data, and
// reports whether it met the end. The data is valid until the next read.
func (f *follower) read(ctx context.Context, g *generation, size int, offset int64) (data []byte, end bool, err error) {
	buf := f.buf
	f.buf = nil // a read that is given up may still fill it
	if cap(buf) < size {
		buf = make([]byte, size)
	}
	buf = buf[:size]
	data, err = call(ctx, f.link, f.t.Call, "read "+g.path, func() ([]byte, error) {
		n, err := g.file.ReadAt(buf, offset)
		if errors.Is(err, io.EOF) { // the server's answer to this read; a lost connection has its own error
			err = nil
		}
		return buf[:n], err
	})
	if err == nil {
		f.buf = buf
	}
	return data, len(data) < size, err
}

// run follows from position until the link dies or the Sink has enough. It
// never returns nil.
func (f *follower) run(ctx context.Context, current *generation, position pipe.Position, w *watcher) error {
	finished := false // position is the end of its generation
	for {
		old, err := f.missed(ctx, current, &position, finished)
		if err != nil {
			return err
		}
		for _, g := range append(old, current) {
			if position.Generation != g.id {
				position = pipe.Position{Generation: g.id}
			}
			if g.file == nil {
				if err := f.openFile(ctx, g); err != nil {
					return err
				}
			}
			if err := f.follow(ctx, g, &position, w); err != nil {
				return err
			}
			f.closeFile(ctx, g)
		}
		finished = true
		if current, err = f.next(ctx); err != nil {
			return err
		}
	}
}

// next opens the generation that the runner began while we followed the one
// before. Between its rename and the new hello there is a moment with neither.
func (f *follower) next(ctx context.Context) (*generation, error) {
	deadline := time.NewTimer(f.t.Handshake)
	defer deadline.Stop()
	for {
		g, err := f.open(ctx)
		if err == nil || !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errNoHello) {
			return g, err
		}
		pause := time.NewTimer(5 * f.t.Busy)
		select {
		case <-pause.C:
			continue
		case <-deadline.C:
		case <-f.link.done:
			err = f.link.down("open the next generation")
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
		pause.Stop()
		return nil, err
	}
}

// missed returns the closed generations that lie between position and the
// current one, oldest first, and sets position to where to go on.
func (f *follower) missed(ctx context.Context, current *generation, position *pipe.Position, finished bool) ([]*generation, error) {
	if position.Generation == "" {
		*position = pipe.Position{Generation: current.id}
	}
	if position.Generation == current.id {
		return nil, nil
	}
	names, err := call(ctx, f.link, f.t.Call, "list "+f.dir, func() ([]fs.FileInfo, error) { return f.link.sftp.ReadDir(f.dir) })
	if err != nil {
		return nil, err
	}
	from, _ := position.Generation.Number()
	to, _ := current.id.Number()
	found := false
	var old []*generation
	for _, info := range names {
		id, isOld := strings.CutPrefix(info.Name(), pipe.Out+".")
		g := &generation{id: pipe.Generation(id), path: path.Join(f.dir, info.Name()), final: true}
		n, valid := g.id.Number()
		switch {
		case !isOld || !valid || n >= to:
		case g.id == position.Generation:
			// Even if finished: its second name may have been there before its last line.
			found = true
			old = append(old, g)
		case n > from:
			old = append(old, g)
		}
	}
	slices.SortFunc(old, func(a, b *generation) int {
		m, _ := a.id.Number()
		n, _ := b.id.Number()
		return cmp.Compare(m, n)
	})
	if !found && !finished {
		f.log.Warn("events of an old generation are gone; going on with the next one there is",
			zap.String("generation", string(position.Generation)), zap.Int64("offset", position.Offset),
			zap.String("current", string(current.id)))
	}
	return old, nil
}

// follow reads g from position: a closed generation to its end, the current
// one until the runner begins another. An error means that the link is of no
// use any more.
func (f *follower) follow(ctx context.Context, g *generation, position *pipe.Position, w *watcher) error {
	s := pipe.Splitter{Offset: position.Offset}
	offset := position.Offset // of the next read: behind the Splitter's by a line that isn't whole
	err := f.notShrunk(ctx, g, offset)
	if errors.Is(err, ErrShrunk) && g.final {
		// The VM crashed before its disk had what we had read. What counts of it the runner repeats in the next one.
		f.log.Warn("a crash of the VM took events that were read before", zap.Error(err))
		return nil
	}
	if err != nil {
		return err
	}
	pause := f.t.Busy
	quiet := time.Duration(0) // polled so long without an event
	woken := true
	for {
		data, end, err := f.read(ctx, g, maxPacket, offset)
		if err != nil {
			return err
		}
		if len(data) > 0 {
			offset += int64(len(data))
			err := f.deliver(ctx, g, &s, data, position)
			if g.final && (errors.Is(err, pipe.ErrPunched) || errors.Is(err, pipe.ErrLineTooLong)) {
				// Nobody will mend it, and what counts of it the runner repeats in the next one.
				f.log.Warn("the rest of an old generation can't be read; going on with the next one", zap.Error(err))
				return nil
			}
			if err != nil {
				return err
			}
			if !woken {
				w.doubt()
			}
			pause, quiet, woken = f.t.Busy, 0, true
		}
		if !end {
			continue
		}
		if g.final {
			if offset > s.Offset {
				f.log.Warn("the last line of a generation was cut off", zap.String("file", g.path),
					zap.Int64("offset", s.Offset), zap.Int64("bytes", offset-s.Offset))
			}
			return nil
		}
		if len(data) == 0 && quiet >= f.t.Idle {
			// At rest. Only now is it worth asking whether this is still the current file.
			if err := f.notShrunk(ctx, g, offset); err != nil {
				return err
			}
			if g.final, err = f.closed(ctx, g); err != nil {
				return err
			}
			if g.final {
				continue // what was written before it got its name
			}
			if woken, err = f.rest(ctx, w); err != nil {
				return err
			}
			continue
		}
		if _, err := f.wait(ctx, pause, nil); err != nil {
			return err
		}
		if len(data) == 0 {
			quiet += pause
			pause *= 2
		}
	}
}

// rest waits for the watcher's word, or for the next poll, and reports which
// of the two it was.
func (f *follower) rest(ctx context.Context, w *watcher) (bool, error) {
	bound := f.t.Poll
	if !w.arm() {
		bound = min(f.t.Poll, f.t.Idle) // nobody will wake us
	}
	return f.wait(ctx, bound, w.wake)
}

func (f *follower) wait(ctx context.Context, d time.Duration, wake <-chan struct{}) (woken bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return false, nil
	case <-wake:
		return true, nil
	case <-f.link.done:
		return false, f.link.down("follow events")
	case <-ctx.Done():
		return false, context.Cause(ctx)
	}
}

func (f *follower) notShrunk(ctx context.Context, g *generation, offset int64) error {
	info, err := call(ctx, f.link, f.t.Call, "look at "+g.path, g.file.Stat)
	if err != nil {
		return err
	}
	if info.Size() < offset {
		return fmt.Errorf("%s, generation %s: %w: %d bytes, read up to %d", g.path, g.id, ErrShrunk, info.Size(), offset)
	}
	return nil
}

// closed reports whether the runner has begun another generation, or is about
// to: first it gives the file of this one its lasting name.
func (f *follower) closed(ctx context.Context, g *generation) (bool, error) {
	name := path.Join(f.dir, g.id.File())
	err := f.link.do(ctx, "look for "+name, func() error {
		_, err := f.link.sftp.Lstat(name)
		return err
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// deliver hands the events in data to the Sink. What can't be read as an
// event is passed over, once with a word about it: a newer runner may say
// more than we understand.
func (f *follower) deliver(ctx context.Context, g *generation, s *pipe.Splitter, data []byte, position *pipe.Position) error {
	var entries []pipe.Entry
	broken := s.Push(data, func(line []byte, end int64) error {
		e, err := pipe.ParseEvent(line)
		switch {
		case errors.Is(err, pipe.ErrUnknownType):
			f.note("unknown event passed over", string(e.Type), g, end, line, err)
		case err != nil:
			f.note("line that is no event passed over", "malformed", g, end, line, err)
		default:
			if e.Type == pipe.TypeHello && !g.final {
				f.onHello(*e.Hello) // a runner that was started anew says it again
			}
			entries = append(entries, pipe.Entry{Event: e, Next: pipe.Position{Generation: g.id, Offset: end}})
		}
		return nil
	})
	if len(entries) > 0 {
		if err := f.sink.Entries(ctx, f.builder, entries); err != nil {
			return &sinkError{fmt.Errorf("entries: %w", err)}
		}
	}
	position.Offset = s.Offset
	if broken != nil {
		return fmt.Errorf("%s, generation %s: %w", g.path, g.id, broken)
	}
	return nil
}

// note logs a message the first time that it is about key.
func (f *follower) note(message, key string, g *generation, end int64, line []byte, err error) {
	if key = message + key; f.noted[key] {
		return
	}
	f.noted[key] = true
	f.log.Warn(message, zap.String("file", g.path), zap.Int64("end", end),
		zap.ByteString("line", line[:min(len(line), 200)]), zap.Error(err))
}
