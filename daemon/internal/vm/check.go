package vm

import (
	"errors"
	"fmt"

	"osbuilder/pipe"
)

// A damage is a place in pipe_out from which on it can't be read as the
// runner wrote it.
type damage struct {
	offset int64 // behind the last event that is sound
	err    error
}

// A checker cuts a generation into lines, takes them for events, and notices
// where something is not what a runner writes: bytes that were punched out, a
// number that doesn't follow the one before, lines that are no events.
//
// A line that is no event is all right in one case: a full disk, or the end
// of a runner, tore it off while it was written. The runner then ended it and
// went on with the number that it should have had.
type checker struct {
	id    pipe.Generation
	split pipe.Splitter
	seq   uint64  // of the event before; 0: unknown
	first bool    // the generation's first event comes next
	tail  bool    // what comes first is the rest of a line, and means nothing
	torn  *damage // where lines begin that are no events; what follows tells what they are

	unknown func(line []byte, end int64, e pipe.Event, err error) // an event of a type that is not known is passed over
	passed  func(line []byte, end int64, err error)               // so is a line that was torn
}

// newChecker begins behind an event whose number was seq; 0 where that isn't
// known.
func newChecker(at pipe.Position, seq uint64) *checker {
	return &checker{id: at.Generation, split: pipe.Splitter{Offset: at.Offset}, seq: seq, first: at.Offset == 0}
}

// skip goes on at offset, behind what can't be read. tail says that it is in
// the middle of a line.
func (c *checker) skip(offset int64, tail bool) {
	c.split = pipe.Splitter{Offset: offset}
	c.seq, c.first, c.tail, c.torn = 0, false, tail, nil
}

// push returns the events that data completes, up to the first damage. After
// one, skip.
func (c *checker) push(data []byte) ([]pipe.Entry, *damage) {
	var entries []pipe.Entry
	var found *damage
	err := c.split.Push(data, func(line []byte, end int64) error {
		entry, d := c.line(line, end)
		if d != nil {
			found = d
			return d.err
		}
		if entry != nil {
			entries = append(entries, *entry)
		}
		return nil
	})
	if err != nil && found == nil {
		found = &damage{c.split.Offset, err}
		if c.torn != nil {
			found = c.torn
		}
	}
	if found != nil {
		c.torn = found // nothing behind it is sound
	}
	return entries, found
}

// line deals with one line.
func (c *checker) line(line []byte, end int64) (*pipe.Entry, *damage) {
	if c.tail {
		c.tail = false
		return nil, nil //nolint:nilnil // neither an event nor damage
	}
	start := end - int64(len(line))
	e, err := pipe.ParseEvent(line)
	if err != nil && !errors.Is(err, pipe.ErrUnknownType) {
		if c.torn == nil {
			c.torn = &damage{start, err}
		}
		if c.passed != nil {
			c.passed(line, end, err)
		}
		return nil, nil //nolint:nilnil // what follows will tell
	}
	at := start
	if c.torn != nil {
		at = c.torn.offset
	}
	switch {
	case c.first && e.Seq != 1:
		return nil, &damage{at, fmt.Errorf("%w: the first event has the number %d", pipe.ErrEvent, e.Seq)}
	case c.seq != 0 && e.Seq != c.seq+1:
		return nil, &damage{at, fmt.Errorf("%w: number %d follows number %d", pipe.ErrEvent, e.Seq, c.seq)}
	case c.seq == 0 && c.torn != nil:
		return nil, c.torn // whether it was torn can't be told
	}
	c.seq, c.first, c.torn = e.Seq, false, nil
	if err != nil {
		if c.unknown != nil {
			c.unknown(line, end, e, err)
		}
		return nil, nil //nolint:nilnil // a newer runner may say more than we understand
	}
	return &pipe.Entry{Event: e, Next: pipe.Position{Generation: c.id, Offset: end}}, nil
}

// rest is called when nothing comes any more: then a line that is no event
// was not torn, for the runner ends a torn line only together with the next
// event.
func (c *checker) rest() *damage { return c.torn }

// sound is how far all is well.
func (c *checker) sound() int64 {
	if c.torn != nil {
		return c.torn.offset
	}
	return c.split.Offset
}
