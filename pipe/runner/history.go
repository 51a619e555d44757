package runner

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// told is what a pipe_out says of one attempt of a job.
type told struct {
	accepted, started, finished bool
	log                         int64 // where its output goes on
	artifacts                   int
}

// A history is what a pipe_out says in all.
type history struct {
	gen    pipe.Generation // of the first hello; empty without one
	seq    uint64
	jobs   map[pipe.JobRef]told
	head   int64 // behind the first line
	end    int64 // behind the last newline
	size   int64
	zeros  bool  // behind end there are NUL bytes
	damage error // wraps errDamaged: what no runner leaves; nil in a whole file
	torn   bool  // the last whole line was no event
}

// errDamaged: pipe_out holds what this runner, or one before it, did not
// write, or lacks what it did.
var errDamaged = errors.New("pipe_out is damaged")

// spoil notes the first damage.
func (h *history) spoil(format string, args ...any) {
	if h.damage == nil {
		h.damage = fmt.Errorf("%w: "+format, append([]any{errDamaged}, args...)...)
	}
}

// readHistory reads events. Lines that are none are passed over. One that was
// torn, by a disk that was full, is no damage if the next event counts on.
func readHistory(r io.Reader) (history, error) {
	h := history{jobs: map[pipe.JobRef]told{}}
	err := h.scan(r)
	return h, err
}

// scan reads on at the start of a line.
func (h *history) scan(r io.Reader) error {
	buf := bufio.NewReaderSize(r, pipe.MaxLine)
	for {
		line, err := buf.ReadSlice('\n')
		at := h.size
		h.size += int64(len(line))
		switch {
		case err == nil:
			h.end = h.size
			if at == 0 {
				h.head = h.size
			}
			h.add(line, at)
		case errors.Is(err, bufio.ErrBufferFull):
			// Its end is passed over as a line of its own.
			h.spoil("a line at %d is longer than any event", at)
		case errors.Is(err, io.EOF):
			h.zeros = bytes.IndexByte(line, 0) >= 0
			if h.torn {
				h.spoil("its last line is no event")
			}
			return nil
		default:
			return fmt.Errorf("read events: %w", err)
		}
	}
}

// skim passes over what is known, and finds what was punched out of it.
func (h *history) skim(r io.Reader) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := r.Read(buf)
		if i := bytes.IndexByte(buf[:n], 0); i >= 0 {
			h.spoil("NUL bytes at %d", h.size+int64(i))
		}
		h.size += int64(n)
		if errors.Is(err, io.EOF) {
			h.end = h.size
			return nil
		}
		if err != nil {
			return fmt.Errorf("read events: %w", err)
		}
	}
}

func (h *history) add(line []byte, at int64) {
	if bytes.IndexByte(line, 0) >= 0 {
		h.spoil("NUL bytes at %d", at)
		line = bytes.TrimLeft(line, "\x00")
	}
	e, err := pipe.ParseEvent(line)
	if err != nil && !errors.Is(err, pipe.ErrUnknownType) {
		h.torn = true
		return
	}
	if e.Seq != h.seq+1 {
		h.spoil("event %d follows event %d, at %d", e.Seq, h.seq, at)
	}
	h.torn = false
	h.seq = max(h.seq, e.Seq)
	if err != nil {
		return
	}
	ref := pipe.JobRef{Job: e.Job, Attempt: e.Attempt}
	t := h.jobs[ref]
	switch e.Type {
	case pipe.TypeHello:
		if h.gen == "" {
			h.gen = e.Hello.Generation
		}
		if h.gen != e.Hello.Generation {
			h.spoil("generation %s begins at %d in generation %s", e.Hello.Generation, at, h.gen)
		}
		return
	case pipe.TypeAccepted:
		if e.Accepted.Request != jobKey(ref) {
			return // to acknowledge it, say
		}
		t.accepted = true
	case pipe.TypeStarted:
		t.started = true
	case pipe.TypeLog:
		t.log = max(t.log, e.Log.Offset+int64(len(e.Log.Data)))
	case pipe.TypeArtifact:
		t.artifacts++
	case pipe.TypeFinished:
		t.finished = true
	default:
		return
	}
	h.jobs[ref] = t
}

// jobKey is the key of the request that brought a job.
func jobKey(ref pipe.JobRef) string {
	return pipe.Header{Kind: pipe.KindJob, Job: ref.Job, Attempt: ref.Attempt}.Key()
}

// A mark is what pipe_out said up to an offset, kept in the spool before
// blocks below it are freed: the file alone no longer tells it.
type mark struct {
	Generation pipe.Generation `json:"generation"`
	Freed      int64           `json:"freed"`  // from here on the file is whole
	Offset     int64           `json:"offset"` // between two lines
	Seq        uint64          `json:"seq"`    // of the last event before Offset
	Jobs       []markedJob     `json:"jobs,omitempty"`
}

type markedJob struct {
	pipe.JobRef
	Accepted  bool  `json:"accepted,omitempty"`
	Started   bool  `json:"started,omitempty"`
	Finished  bool  `json:"finished,omitempty"`
	Log       int64 `json:"log,omitempty"`
	Artifacts int   `json:"artifacts,omitempty"`
}

// history is the mark's part of what the file says.
func (m mark) history(head int64) history {
	h := history{gen: m.Generation, seq: m.Seq, jobs: map[pipe.JobRef]told{}, head: head, size: m.Freed, end: m.Freed}
	for _, j := range m.Jobs {
		h.jobs[j.JobRef] = told{
			accepted: j.Accepted, started: j.Started, finished: j.Finished, log: j.Log, artifacts: j.Artifacts,
		}
	}
	return h
}

// readOut reads the history of a file, empty if there is none. What was freed
// on purpose is taken from the mark, if it is the file's.
func readOut(path string, m mark) (history, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return history{}, nil
	}
	if err != nil {
		return history{}, fmt.Errorf("open pipe_out: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return history{}, fmt.Errorf("open pipe_out: %w", err)
	}
	if !info.Mode().IsRegular() {
		return history{}, fmt.Errorf("%w: it is no regular file", errDamaged)
	}
	gen, head, err := readHead(f)
	if err != nil {
		return history{}, err
	}
	ours := gen != "" && gen == m.Generation && head <= m.Freed && m.Freed <= m.Offset
	if !ours || info.Size() < m.Offset {
		h, err := readHistory(f)
		if ours {
			h.spoil("it has %d bytes, and had %d", info.Size(), m.Offset)
		}
		return h, err
	}
	h := m.history(head)
	if err := h.skim(io.NewSectionReader(f, m.Freed, m.Offset-m.Freed)); err != nil {
		return h, err
	}
	err = h.scan(io.NewSectionReader(f, m.Offset, math.MaxInt64-m.Offset))
	return h, err
}

// readHead reads which generation the first line begins, if it does, and
// where it ends.
func readHead(f io.ReaderAt) (pipe.Generation, int64, error) {
	line, err := bufio.NewReaderSize(io.NewSectionReader(f, 0, pipe.MaxLine), pipe.MaxLine).ReadSlice('\n')
	if err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, bufio.ErrBufferFull) {
			return "", 0, nil
		}
		return "", 0, fmt.Errorf("read events: %w", err)
	}
	e, err := pipe.ParseEvent(line)
	if err != nil || e.Type != pipe.TypeHello {
		return "", 0, nil //nolint:nilerr // the whole file is looked at, then
	}
	return e.Hello.Generation, int64(len(line)), nil
}
