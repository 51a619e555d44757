package vmtest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"osbuilder/pipe"
)

// A Pipe writes pipe_out the way the runner does, event by event as the test
// says. Where a real runner is wanted, run one.
type Pipe struct {
	t      testing.TB
	dir    string
	number int
	id     pipe.Generation
	seq    uint64
	size   int64
	file   *os.File
}

// NewPipe begins generation 1 in dir.
func NewPipe(t testing.TB, dir string) *Pipe {
	t.Helper()
	p := &Pipe{t: t, dir: dir}
	p.begin(nil)
	t.Cleanup(func() { p.file.Close() })
	return p
}

func (p *Pipe) begin(change func(*pipe.Hello)) {
	p.t.Helper()
	f, err := os.OpenFile(filepath.Join(p.dir, pipe.Out), os.O_WRONLY|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o640)
	if err != nil {
		p.t.Fatal(err)
	}
	p.number++
	p.file, p.seq, p.size = f, 0, 0
	p.id = pipe.Generation(fmt.Sprintf("%d-%08x", p.number, 0xabc0+p.number))
	hello := &pipe.Hello{
		Generation: p.id, Protocol: pipe.Version, Runner: "vmtest", Image: "vmtest-1",
		Slots: 2, Systems: []string{"x86_64-linux"}, Free: 1 << 30,
	}
	if change != nil {
		change(hello)
	}
	p.Append(pipe.Event{Type: pipe.TypeHello, Hello: hello})
}

// Append writes events, numbered, in one write, and returns the position
// after them.
func (p *Pipe) Append(events ...pipe.Event) pipe.Position {
	p.t.Helper()
	var data []byte
	for _, e := range events {
		p.seq++
		e.Seq, e.Time = p.seq, time.Now().UTC()
		line, err := pipe.MarshalEvent(e)
		if err != nil {
			p.t.Fatal(err)
		}
		data = append(data, line...)
	}
	return p.Raw(data)
}

// Raw writes any bytes.
func (p *Pipe) Raw(data []byte) pipe.Position {
	p.t.Helper()
	if _, err := p.file.Write(data); err != nil {
		p.t.Fatal(err)
	}
	p.size += int64(len(data))
	return p.End()
}

// End returns the position after all that was written.
func (p *Pipe) End() pipe.Position { return pipe.Position{Generation: p.id, Offset: p.size} }

// Rotate closes the generation and begins the next one. change, if not nil,
// alters its hello.
func (p *Pipe) Rotate(change func(*pipe.Hello)) {
	p.t.Helper()
	p.file.Close()
	if err := os.Rename(filepath.Join(p.dir, pipe.Out), filepath.Join(p.dir, p.id.File())); err != nil {
		p.t.Fatal(err)
	}
	p.begin(change)
}

// Lose removes the current generation's file and begins the next one, as the
// runner does when somebody else removed it.
func (p *Pipe) Lose(change func(*pipe.Hello)) {
	p.t.Helper()
	p.file.Close()
	if err := os.Remove(filepath.Join(p.dir, pipe.Out)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		p.t.Fatal(err)
	}
	p.begin(change)
}

// Skip leaves out numbers of events: what had them is gone.
func (p *Pipe) Skip(n uint64) { p.seq += n }

// Overwrite puts other bytes into the current generation, as nobody should.
func (p *Pipe) Overwrite(at int64, data []byte) {
	p.t.Helper()
	f, err := os.OpenFile(filepath.Join(p.dir, pipe.Out), os.O_WRONLY, 0)
	if err != nil {
		p.t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, at); err != nil {
		p.t.Fatal(err)
	}
}

// Truncate cuts the current generation, as nobody should.
func (p *Pipe) Truncate(size int64) {
	p.t.Helper()
	if err := p.file.Truncate(size); err != nil {
		p.t.Fatal(err)
	}
	p.size = size
}

// LogEvent returns a log event of a job's first attempt.
func LogEvent(job string, offset int64, text string) pipe.Event {
	return pipe.Event{Type: pipe.TypeLog, Job: job, Attempt: 1, Log: &pipe.Log{Offset: offset, Data: []byte(text)}}
}
