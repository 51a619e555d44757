package runner

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

func consumeHeader(g pipe.Generation, offset int64) pipe.Header {
	return pipe.Header{Kind: pipe.KindConsume, Owner: owner, Consumed: &pipe.Position{Generation: g, Offset: offset}}
}

func repeatHeader(g pipe.Generation, offset int64) pipe.Header {
	h := consumeHeader(g, offset)
	h.Kind = pipe.KindRepeat
	return h
}

// tail reads the events from an offset on.
func (m *machine) from(offset int64) []pipe.Event {
	m.t.Helper()
	data, err := os.ReadFile(m.cfg.pipeOut())
	if err != nil {
		m.t.Fatal(err)
	}
	return parseEvents(m.t, data[offset:])
}

func (m *machine) size() int64 {
	m.t.Helper()
	info, err := os.Stat(m.cfg.pipeOut())
	if err != nil {
		m.t.Fatal(err)
	}
	return info.Size()
}

func (m *machine) blocks() int64 {
	m.t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(m.cfg.pipeOut(), &st); err != nil {
		m.t.Fatal(err)
	}
	return st.Blocks
}

// request sends one and returns its nth answer behind an offset.
func (m *machine) ask(from int64, h pipe.Header) {
	m.t.Helper()
	m.rename(request(m.t, h, ""))
	m.until("answer to "+h.Key(), func() bool {
		found := find(m.from(from), answer(h.Key()))
		return len(found) > 0 && found[0].Accepted != nil
	})
}

// chatty has a job finish that leaves some megabytes in pipe_out.
func (m *machine) chatty(id string, lines int) {
	m.t.Helper()
	m.submit(id, fmt.Sprintf("seq %d\n", lines))
	m.finished(id)
}

// Blocks that were read are freed; the first line, all offsets and what a
// restarted runner knows stay.
func TestConsume(t *testing.T) {
	m := boot(t)
	m.chatty("old", 200_000)
	wait, open := m.gate("g")
	m.submit("runs", "echo one\n"+wait+"echo two\n")
	m.until("its output", func() bool { return m.output("runs") == "one\n" })
	hello, whole := m.events()[0].Hello, []byte(m.raw())
	offset, blocks := m.size(), m.blocks()
	m.ask(offset, consumeHeader(hello.Generation, offset))
	if now := m.blocks(); now > blocks/2 {
		t.Errorf("%d blocks, before %d", now, blocks)
	}
	data := []byte(m.raw())
	if !bytes.HasPrefix(data, whole[:bytes.IndexByte(whole, '\n')+1]) {
		t.Error("the first line is gone")
	}
	if n := bytes.Count(data[:offset], []byte{0}); int64(n) < offset-3*4096 {
		t.Errorf("%d of %d bytes were freed", n, offset)
	}
	for range 3 { // a restart at this point changes nothing, however often
		m.stop()
		m.start()
	}
	open()
	m.until("the end", func() bool { return len(find(m.from(offset), ofJob(pipe.TypeFinished, "runs"))) > 0 })
	events := m.from(offset)
	if got := string(output(t, events, "runs", 4)); got != "two\n" {
		t.Errorf("output goes on with %q", got)
	}
	for _, e := range events {
		if e.Job == "old" || e.Hello != nil && e.Hello.Generation != hello.Generation || e.Job == "runs" && e.Type == pipe.TypeStarted {
			t.Errorf("told again: %+v", e)
		}
	}
	last := uint64(bytes.Count(whole, []byte("\n")))
	for _, e := range events {
		if last++; e.Seq != last {
			t.Fatalf("event %d, want %d", e.Seq, last)
		}
	}
	// Another boot: what the freed part told is not told again, nor lost.
	m.reboot()
	if f := m.finished("old"); f.Status != pipe.StatusSucceeded {
		t.Errorf("after a boot: %+v", f)
	}
	if n := len(find(m.events(), ofType(pipe.TypeLog))); n > 0 {
		t.Errorf("%d log events", n)
	}
	// A reader that is in the new generation has no use for the old one.
	now := m.events()[0].Hello.Generation
	m.ask(0, consumeHeader(now, m.size()))
	if _, err := os.Stat(filepath.Join(m.cfg.Pipe, hello.Generation.File())); !os.IsNotExist(err) {
		t.Errorf("old generation: %v", err)
	}
}

// The runner dies at each step of freeing.
func TestKilledWhileConsuming(t *testing.T) {
	for _, dies := range []string{"consumed.part", "punch"} {
		t.Run(dies, func(t *testing.T) {
			m := boot(t)
			m.chatty("old", 50_000)
			g, offset := m.events()[0].Hello.Generation, m.size()
			m.stop()
			_, wait := m.startChild(dies)
			m.rename(request(t, consumeHeader(g, offset), ""))
			wait()
			m.start()
			m.ask(offset, consumeHeader(g, offset))
			for _, e := range m.from(offset) {
				if e.Job == "old" || e.Hello != nil && e.Hello.Generation != g {
					t.Errorf("told again: %+v", e)
				}
			}
		})
	}
}

// Places that say nothing about these files free nothing.
func TestConsumeElsewhere(t *testing.T) {
	m := boot(t)
	m.chatty("old", 50_000)
	g, end := m.events()[0].Hello.Generation, m.size()
	for _, h := range []pipe.Header{consumeHeader("99-0123abcd", 50_000), consumeHeader(g, end+1<<20), consumeHeader(g, 0), consumeHeader(g, 10)} {
		m.ask(end, h)
		end = m.size()
	}
	if strings.Contains(m.raw(), "\x00") {
		t.Error("something was freed")
	}
	m.events()
	if !strings.Contains(m.log.String(), "nothing is freed") {
		t.Error("nothing is said of it")
	}
}

// noted waits until the runner has noted its last write: what somebody else
// does between the two it takes for its own.
func (m *machine) noted() {
	m.t.Helper()
	m.until("the note", func() bool {
		data, err := os.ReadFile(filepath.Join(m.cfg.spool(), "length"))
		var size int64
		if err == nil {
			_, err = fmt.Sscanf(string(data), "%d", &size)
		}
		return err == nil && size == m.size()
	})
}

// Somebody else punches, writes or cuts: the runner sees it, and a new
// generation tells all again, output from its beginning.
func TestOthersWrite(t *testing.T) {
	punch := func(from, n int64) func(*os.File) error {
		return func(f *os.File) error {
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, n)
		}
	}
	for name, damage := range map[string]func(*os.File) error{
		"punched":         punch(8192, 4096),
		"punched at head": punch(0, 4096),
		"overwritten":     func(f *os.File) error { _, err := f.WriteAt([]byte("garbage"), 9000); return err },
		"appended":        func(f *os.File) error { _, err := f.WriteString("garbage\n"); return err },
		"cut":             func(f *os.File) error { return f.Truncate(9000) },
	} {
		for _, running := range []bool{true, false} {
			for _, consumed := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, runner lives: %v, consumed: %v", name, running, consumed), func(t *testing.T) {
					m := boot(t)
					m.chatty("old", 20_000)
					g, offset := m.events()[0].Hello.Generation, m.size()
					if consumed {
						m.ask(offset, consumeHeader(g, 10_000)) // two blocks remain below it
					}
					m.noted()
					if !running {
						m.stop()
					}
					f, err := os.OpenFile(m.cfg.pipeOut(), os.O_RDWR, 0)
					if err != nil {
						t.Fatal(err)
					}
					if strings.HasPrefix(name, "app") {
						if _, err := f.Seek(0, 2); err != nil {
							t.Fatal(err)
						}
					}
					if err := damage(f); err != nil {
						t.Fatal(err)
					}
					if err := f.Close(); err != nil {
						t.Fatal(err)
					}
					if running {
						m.rename(request(t, jobHeader("after", 1), "echo after\n"))
					} else {
						m.start()
					}
					m.until("a new generation", func() bool {
						h, err := readOut(m.cfg.pipeOut(), mark{})
						return err == nil && h.gen != "" && h.gen != g
					})
					m.finished("old")
					if got := m.output("old"); strings.Count(got, "\n") != 20_000 {
						t.Errorf("%d lines are told again", strings.Count(got, "\n"))
					}
					if !strings.Contains(m.log.String(), "in which all is told again") {
						t.Error("nothing is said of it")
					}
				})
			}
		}
	}
}

// A mark that is lost leaves a file that is not whole.
func TestLostMark(t *testing.T) {
	m := boot(t)
	m.chatty("old", 20_000)
	g, offset := m.events()[0].Hello.Generation, m.size()
	m.ask(offset, consumeHeader(g, offset))
	m.stop()
	if err := os.WriteFile(filepath.Join(m.cfg.spool(), "consumed"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	m.finished("old")
	if got := m.output("old"); strings.Count(got, "\n") != 20_000 {
		t.Errorf("%d lines are told again", strings.Count(got, "\n"))
	}
}

// All is told again, once for a place.
func TestRepeat(t *testing.T) {
	m := boot(t)
	m.chatty("done", 1000)
	m.submit("failed", "echo why; exit 7\n")
	m.finished("failed")
	m.submit("gone", "true\n")
	m.finished("gone")
	m.send(1, ackHeader("gone", 1), "")
	wait, open := m.gate("g")
	m.submit("runs", "echo one\n"+wait+"echo two\n")
	m.until("its output", func() bool { return m.output("runs") == "one\n" })
	first := m.events()[0].Hello.Generation
	place := repeatHeader(first, 77)
	m.rename(request(t, place, ""))
	m.until("a new generation", func() bool { return m.events()[0].Hello.Generation != first })
	m.await("the answer", 1, answer(place.Key()))
	second := m.events()[0].Hello
	if len(second.Jobs) != 3 {
		t.Errorf("hello lists %v", second.Jobs)
	}
	accepted(t, m.send(2, place, ""))
	open()
	m.finished("runs")
	m.finished("failed")
	m.finished("done")
	if h := m.events()[0].Hello; h.Generation != second.Generation {
		t.Errorf("another generation %s for the same place", h.Generation)
	}
	if got := m.output("runs"); got != "one\ntwo\n" {
		t.Errorf("output %q", got)
	}
	if got := m.output("done"); strings.Count(got, "\n") != 1000 {
		t.Errorf("%d lines", strings.Count(got, "\n"))
	}
	if got := m.output("failed"); got != "why\n" {
		t.Errorf("output %q", got)
	}
	for _, id := range []string{"done", "failed", "runs"} {
		for _, typ := range []pipe.Type{pipe.TypeAccepted, pipe.TypeStarted, pipe.TypeFinished} {
			if n := len(find(m.events(), ofJob(typ, id))); n != 1 {
				t.Errorf("%s of %s: %d times", typ, id, n)
			}
		}
	}
	// The old file is there until it is consumed, and the place is known to
	// the next runner.
	if _, err := os.Stat(filepath.Join(m.cfg.Pipe, first.File())); err != nil {
		t.Error(err)
	}
	m.stop()
	m.start()
	accepted(t, m.send(3, place, ""))
	if h := m.events()[0].Hello; h.Generation != second.Generation {
		t.Errorf("after a restart another generation %s for the same place", h.Generation)
	}
}

// The runner dies at each step of telling again; asked again, the next does
// it.
func TestKilledWhileRepeating(t *testing.T) {
	for _, dies := range []string{"base.part", "generation.part", "repeated.part"} {
		t.Run(dies, func(t *testing.T) {
			m := boot(t)
			m.chatty("done", 1000)
			m.reboot() // so that output has a base
			m.finished("done")
			g := m.events()[0].Hello.Generation
			m.stop()
			_, wait := m.startChild(dies)
			m.rename(request(t, repeatHeader(g, 5), ""))
			wait()
			m.start()
			m.rename(request(t, repeatHeader(g, 5), ""))
			m.until("the answer", func() bool {
				events := m.events()
				return events[0].Hello.Generation != g && len(find(events, answer("repeat/"+owner))) > 0
			})
			m.finished("done")
			if got := m.output("done"); strings.Count(got, "\n") != 1000 {
				t.Errorf("%d lines", strings.Count(got, "\n"))
			}
		})
	}
}

// A job's output is being repeated when all is to be told again.
func TestRepeatWhileRepeating(t *testing.T) {
	m := boot(t)
	m.chatty("done", 100_000)
	for i := range int64(5) {
		g := m.events()[0].Hello.Generation
		m.rename(request(t, repeatHeader(g, i), ""))
		m.until("a new generation", func() bool {
			events := m.events()
			return events[0].Hello.Generation != g && len(find(events, answer("repeat/"+owner))) > 0
		})
	}
	m.finished("done")
	if got := m.output("done"); strings.Count(got, "\n") != 100_000 {
		t.Errorf("%d lines", strings.Count(got, "\n"))
	}
}
