package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"
	"unicode/utf8"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// Output is told in batches.
const (
	batch        = 50 * time.Millisecond  // gathered for as long
	partialAfter = 250 * time.Millisecond // a line without an end waits so long for it
)

// A tail tells a job's output from where it was told to.
type tail struct {
	a      *attendant
	file   *effect.File
	offset int64     // of the first byte not told
	held   time.Time // since when a piece of a line waits for its end; zero if none does
	buf    [pipe.MaxLog]byte
}

func openTail(a *attendant) (*tail, error) {
	f, err := effect.Open(a.path.log())
	if err != nil {
		return nil, fmt.Errorf("open output: %w", err)
	}
	return &tail{a: a, file: f, offset: a.told}, nil
}

func (t *tail) close() {
	t.a.told = t.offset
	_ = t.file.Close()
}

// atOnce is how many pieces are told before whoever follows looks at the rest
// of the world: a job that writes without end must not keep it from that.
const atOnce = 64

// A state says why pump ended.
type state int

const (
	allTold  state = iota
	lineHeld       // a piece of a line is held back
	moreLeft
)

// pump tells what is there, up to the end of the last line, or to the very
// end if final.
func (t *tail) pump(ctx context.Context, final bool) (state, error) {
	for range atOnce {
		left := min(int64(len(t.buf)), t.a.limit-t.offset)
		if left <= 0 {
			return allTold, nil
		}
		n, err := t.file.ReadAt(t.buf[:left], t.offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return allTold, fmt.Errorf("read output: %w", err)
		}
		if n == 0 {
			return allTold, nil
		}
		cut := t.cut(t.buf[:n], final)
		if cut == 0 {
			if t.held.IsZero() {
				t.held = time.Now()
			}
			return lineHeld, nil
		}
		t.held = time.Time{}
		// The owner may still be at it when ctx ends: so it works on what
		// nobody touches then.
		from, next := t.offset, int64(0)
		err = t.a.r.call(ctx, func() error {
			var err error
			next, err = t.a.r.tellOutput(ctx, t.a.job, from, t.buf[:cut])
			return err
		})
		if err != nil && !errors.Is(err, errRewound) {
			return allTold, err
		}
		t.offset = next
	}
	return moreLeft, nil
}

// excess reports whether there is more output than a job may have.
func (t *tail) excess() (bool, error) {
	info, err := t.file.Stat()
	if err != nil {
		return false, fmt.Errorf("measure output: %w", err)
	}
	return info.Size() > t.a.r.cfg.MaxOutput, nil
}

// cut says how much of data is told now: whole lines. A line without an end
// is told, in whole runes, if it was held back long enough or is longer than
// one event.
func (t *tail) cut(data []byte, final bool) int {
	if i := bytes.LastIndexByte(data, '\n'); i >= 0 {
		return i + 1
	}
	whole := len(data) == len(t.buf)
	if !final && !whole && (t.held.IsZero() || time.Since(t.held) < partialAfter) {
		return 0
	}
	if final && !whole {
		return len(data)
	}
	return len(data) - splitRune(data)
}

// splitRune is the length of a rune at the end of data that is not whole; 0
// where the end is no rune's, and where it is all there is.
func splitRune(data []byte) int {
	for n := 1; n < utf8.UTFMax && n < len(data); n++ {
		b := data[len(data)-n]
		if utf8.RuneStart(b) {
			if b >= utf8.RuneSelf && !utf8.FullRune(data[len(data)-n:]) {
				return n
			}
			return 0
		}
	}
	return 0
}
