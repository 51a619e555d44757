package vm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
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
	noted   map[string]bool // what was complained about on this link
	seen    *seen           // the last event; the Builder's
	fresh   bool            // nothing was read before
	buf     []byte          // of the last read, if nobody writes to it any more
}

// A generation is one file of events, open.
type generation struct {
	file  *sftp.File
	path  string
	id    pipe.Generation
	hello pipe.Hello // of the current one only
	final bool       // nothing will be appended
	// broken: its first line can't be read, so its id is of our making.
	broken error
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
	case errors.Is(err, errBadHello):
		// No reason to stay away: the runner can be asked for a new one.
		g.broken, g.id = err, unknownGeneration()
		return g, nil
	case err != nil:
		f.closeFile(ctx, g)
		return nil, &RungError{RungPipe, fmt.Errorf("%s: %w", g.path, err)}
	case hello.Protocol != pipe.Version:
		f.closeFile(ctx, g)
		return nil, &RungError{RungProtocol, fmt.Errorf("runner %s in image %s speaks version %d of the pipe's protocol, this sidecar version %d",
			hello.Runner, hello.Image, hello.Protocol, pipe.Version)}
	}
	g.id, g.hello = hello.Generation, hello
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

var (
	// errNoHello: the file's first line has no end. The runner's files appear
	// with theirs, so somebody cut it; the runner will notice.
	errNoHello = errors.New("no hello in it yet")
	// errBadHello: the file's first line is not the runner's.
	errBadHello = errors.New("read hello")
)

// unknownGeneration is a name of our own for a generation whose name can't be
// read.
func unknownGeneration() pipe.Generation {
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails, since Go 1.24
	return pipe.Generation("1-" + hex.EncodeToString(random[:]))
}

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
			return pipe.Hello{}, fmt.Errorf("%w: %w", errBadHello, pipe.ErrPunched)
		case !whole && len(head) == pipe.MaxLine:
			return pipe.Hello{}, fmt.Errorf("%w: %w", errBadHello, pipe.ErrLineTooLong)
		case !whole && len(head) == size:
			continue
		case !whole:
			return pipe.Hello{}, errNoHello
		}
		e, err := pipe.ParseEvent(line)
		if err != nil {
			return pipe.Hello{}, fmt.Errorf("%w: %w", errBadHello, err)
		}
		if e.Type != pipe.TypeHello {
			return pipe.Hello{}, fmt.Errorf("%w: its first event is %q", errBadHello, e.Type)
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
		nameless := current.broken != nil
		if current, err = f.next(ctx); err != nil {
			return err
		}
		if nameless { // so it can't be said which generations come after it
			position = pipe.Position{Generation: current.id}
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
	f.fresh = position.Generation == ""
	if f.fresh || current.broken != nil {
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
	switch {
	case found || finished:
	case from >= to:
		f.log.Warn("the VM has another data disk, or an older one; going on with what it says now",
			zap.String("generation", string(position.Generation)), zap.String("current", string(current.id)))
	default:
		err := fmt.Errorf("generation %s, from %d on: %w; the current one is %s", position.Generation, position.Offset, ErrGone, current.id)
		if err := f.sink.Damaged(ctx, f.builder, *position, err); err != nil {
			return nil, &sinkError{fmt.Errorf("damaged: %w", err)}
		}
	}
	return old, nil
}

// follow reads g from position: a closed generation to its end, the current
// one until the runner begins another. An error means that the link is of no
// use any more.
func (f *follower) follow(ctx context.Context, g *generation, position *pipe.Position, w *watcher) error {
	size, err := f.size(ctx, g)
	if err != nil {
		return err
	}
	r := &reading{f: f, g: g, position: position, offset: position.Offset, size: size}
	r.check = newChecker(*position, f.seen.after(*position))
	r.check.unknown = func(line []byte, end int64, e pipe.Event, err error) {
		f.note("unknown event passed over", string(e.Type), g, end, line, err)
	}
	r.check.passed = func(line []byte, end int64, err error) {
		f.note("line that is no event passed over", "malformed", g, end, line, err)
	}
	switch {
	case g.broken != nil:
		err = r.damaged(ctx, &damage{0, g.broken})
	case size < position.Offset && g.final:
		// What counts of it the runner repeats in the next one.
		f.log.Warn("events that were read before are gone from an old generation: a crash of the VM took them, or somebody cut it",
			zap.Error(f.shrunk(g, size, position.Offset)))
		return nil
	case size < position.Offset:
		err = r.damaged(ctx, &damage{position.Offset, f.shrunk(g, size, position.Offset)})
	}
	if err != nil {
		return err
	}
	pause := f.t.Busy
	quiet := time.Duration(0) // polled so long without an event
	woken := true
	caughtUp := g.final
	for {
		n, end, err := r.more(ctx)
		if err != nil || r.given {
			return err
		}
		if n > 0 {
			if !woken {
				w.doubt()
			}
			pause, quiet, woken = f.t.Busy, 0, true
		}
		if !caughtUp && r.offset >= size {
			caughtUp = true
			if err := f.sink.CaughtUp(ctx, f.builder); err != nil {
				return &sinkError{fmt.Errorf("caught up: %w", err)}
			}
		}
		if !end {
			continue
		}
		if g.final {
			return r.close(ctx)
		}
		if n == 0 && quiet >= f.t.Idle {
			// At rest. Only now is it worth asking whether this is still the current file.
			if err := r.look(ctx); err != nil {
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
		if n == 0 {
			quiet += pause
			pause *= 2
		}
	}
}

// A reading is one generation being read.
type reading struct {
	f        *follower
	g        *generation
	check    *checker
	position *pipe.Position // behind the last sound line
	offset   int64          // of the next read: behind position by a line that isn't whole
	size     int64          // of the file, when reading it began
	missing  bool           // pipe_out was not there when we looked
	given    bool           // the rest of an old generation can't be read
}

// more reads what there is, in one read, and reports how much that was and
// whether it met the end.
func (r *reading) more(ctx context.Context) (int, bool, error) {
	data, end, err := r.f.read(ctx, r.g, maxPacket, r.offset)
	if err != nil || len(data) == 0 {
		return 0, end, err
	}
	n := len(data)
	r.offset += int64(n)
	entries, broken := r.check.push(data)
	if len(entries) > 0 {
		if err := r.f.sink.Entries(ctx, r.f.builder, entries); err != nil {
			return n, end, &sinkError{fmt.Errorf("entries: %w", err)}
		}
		last := entries[len(entries)-1]
		*r.f.seen = seen{last.Next, last.Event.Seq}
	}
	r.position.Offset = r.check.sound()
	if broken != nil {
		return n, end, r.damaged(ctx, broken)
	}
	return n, end, nil
}

// damaged tells the Sink, and goes on behind the damage. The runner is going
// to tell everything again in a generation that it begins for it; of what
// follows here, the answers to requests count.
func (r *reading) damaged(ctx context.Context, d *damage) error {
	place := pipe.Position{Generation: r.g.id, Offset: d.offset}
	reason := fmt.Errorf("%s, generation %s, at %d: %w: %w", r.g.path, r.g.id, d.offset, ErrDamaged, d.err)
	if r.f.fresh && d.offset < r.size && errors.Is(d.err, pipe.ErrPunched) {
		// The runner frees what was read; without a checkpoint that is what we meet.
		reason = fmt.Errorf("%s, generation %s, at %d: %w: they were read before, and that is not on record here", r.g.path, r.g.id, d.offset, ErrGone)
	}
	// What is written from now on may be the answer to what the Sink asks for.
	size, err := r.f.size(ctx, r.g)
	if err != nil {
		return err
	}
	if err := r.f.sink.Damaged(ctx, r.f.builder, place, reason); err != nil {
		return &sinkError{fmt.Errorf("damaged: %w", err)}
	}
	if r.g.final {
		r.given = true
		return nil
	}
	tail := false
	if size > 0 {
		last, _, err := r.f.read(ctx, r.g, 1, size-1)
		if err != nil {
			return err
		}
		tail = string(last) != "\n"
	}
	r.check.skip(size, tail)
	r.offset, r.position.Offset = size, size
	return nil
}

// look is what is done at rest: is the file what it was, and still the
// current one?
func (r *reading) look(ctx context.Context) error {
	if d := r.check.rest(); d != nil {
		return r.damaged(ctx, d)
	}
	info, err := r.f.stat(ctx, r.g)
	if err != nil {
		return err
	}
	if size := info.Size(); size < r.offset {
		return r.damaged(ctx, &damage{r.position.Offset, r.f.shrunk(r.g, size, r.offset)})
	}
	final, missing, err := r.f.closed(ctx, r.g, info)
	if err != nil {
		return err
	}
	r.g.final = final
	if missing && !r.missing {
		// The runner notices it too, though not at once.
		err = r.damaged(ctx, &damage{r.position.Offset, errors.New("it was removed")})
	}
	r.missing = missing
	return err
}

// close ends the reading of an old generation.
func (r *reading) close(ctx context.Context) error {
	if d := r.check.rest(); d != nil {
		return r.damaged(ctx, d)
	}
	if at := r.check.sound(); r.offset > at {
		r.f.log.Warn("the last line of a generation was cut off", zap.String("file", r.g.path),
			zap.Int64("offset", at), zap.Int64("bytes", r.offset-at))
	}
	return nil
}

// A seen is the number of the last event that was read, and the place behind
// it. It outlives the link.
type seen struct {
	at  pipe.Position
	seq uint64
}

// after returns the number of the event before a place, 0 if it isn't known.
func (s *seen) after(at pipe.Position) uint64 {
	if s.at != at {
		return 0
	}
	return s.seq
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

// size returns how long the file is that is open.
func (f *follower) size(ctx context.Context, g *generation) (int64, error) {
	info, err := f.stat(ctx, g)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (f *follower) stat(ctx context.Context, g *generation) (fs.FileInfo, error) {
	return call(ctx, f.link, f.t.Call, "look at "+g.path, g.file.Stat)
}

func (f *follower) shrunk(g *generation, size, offset int64) error {
	return fmt.Errorf("%s, generation %s: %w: %d bytes, read up to %d", g.path, g.id, ErrShrunk, size, offset)
}

// closed reports whether the runner has begun another generation, or is about
// to: first it gives the file of this one its lasting name. One that somebody
// removed can't get it; then the name pipe_out leads elsewhere, or nowhere for
// a while, which is reported too. open is of the file that is open.
func (f *follower) closed(ctx context.Context, g *generation, open fs.FileInfo) (final, missing bool, err error) {
	if g.broken == nil {
		switch _, err := f.lstat(ctx, path.Join(f.dir, g.id.File())); {
		case err == nil:
			return true, false, nil
		case !errors.Is(err, fs.ErrNotExist):
			return false, false, err
		}
	}
	name := path.Join(f.dir, pipe.Out)
	info, err := f.lstat(ctx, name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, true, nil
	}
	// One of the same length, written in the same second, is taken for this
	// one, until its next event.
	if err != nil || g.broken == nil && info.Size() == open.Size() && info.ModTime().Equal(open.ModTime()) {
		return false, false, err
	}
	// It grew meanwhile, or is another one.
	now := &generation{path: name}
	if err := f.openFile(ctx, now); err != nil {
		if errors.Is(err, ErrDown) || ctx.Err() != nil {
			return false, false, err
		}
		return false, false, nil // removed meanwhile, or no file: the next look will tell
	}
	defer f.closeFile(ctx, now)
	hello, err := f.readHello(ctx, now)
	switch {
	case errors.Is(err, ErrDown), ctx.Err() != nil:
		return false, false, err
	case err != nil:
		return false, false, nil // nobody's generation yet; the runner will begin one
	}
	return hello.Generation != g.id, false, nil
}

func (f *follower) lstat(ctx context.Context, name string) (fs.FileInfo, error) {
	return call(ctx, f.link, f.t.Call, "look for "+name, func() (fs.FileInfo, error) { return f.link.sftp.Lstat(name) })
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
