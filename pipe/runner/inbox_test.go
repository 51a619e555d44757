package runner

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// ran waits for n jobs to be finished, and returns the output of all.
func (m *machine) ran(n int) []string {
	m.t.Helper()
	m.await(fmt.Sprintf("%d finished jobs", n), n, ofType(pipe.TypeFinished))
	events := m.events()
	var all []string
	for _, e := range find(events, ofType(pipe.TypeAccepted)) {
		all = append(all, string(output(m.t, events, e.Job, 0)))
	}
	return all
}

// settle has a request answered, so that all that was noticed before it was
// dealt with.
func (m *machine) settle(name string) {
	m.t.Helper()
	m.send(1, pipe.Header{Kind: pipe.KindAcknowledge, Owner: owner, Job: name, Attempt: 1}, "")
}

func TestEchoRuns(t *testing.T) {
	m := boot(t)
	m.echo("echo $((6 * 7))\n")
	if got := m.ran(1); got[0] != "42\n" {
		t.Errorf("output %q", got)
	}
	e := find(m.events(), ofType(pipe.TypeAccepted))[0]
	if !strings.HasPrefix(e.Job, "anon-") || !pipe.ValidID(e.Job) {
		t.Errorf("anonymous job is called %q", e.Job)
	}
}

func TestSameTextTwiceRunsTwice(t *testing.T) {
	m := boot(t)
	m.echo("echo again\n")
	m.ran(1)
	m.echo("echo again\n")
	m.ran(2)
}

func TestChunksAreOneRequest(t *testing.T) {
	m := boot(t)
	f, err := os.OpenFile(m.cfg.pipeIn(), os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for i := range 5 {
		if _, err := fmt.Fprintf(f, "echo chunk %d\n", i); err != nil {
			t.Fatal(err)
		}
		// Another writer of another file ends meanwhile: no reason to read.
		if err := os.WriteFile(filepath.Join(m.cfg.Pipe, "other"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(m.events()); n != 1 {
		t.Errorf("%d events before the writer was through", n)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if got, want := m.ran(1)[0], "chunk 0\nchunk 1\nchunk 2\nchunk 3\nchunk 4\n"; got != want {
		t.Errorf("output %q", got)
	}
}

// A second writer that still has the file open keeps it from being read when
// the first closes it.
func TestReadsWhenTheLastWriterIsThrough(t *testing.T) {
	m := boot(t)
	open := func() *os.File {
		f, err := os.OpenFile(m.cfg.pipeIn(), os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	slow, quick := open(), open()
	if _, err := quick.WriteString("echo one\n"); err != nil {
		t.Fatal(err)
	}
	quick.Close()
	if _, err := slow.WriteString("echo two\n"); err != nil {
		t.Fatal(err)
	}
	slow.Close()
	if got := m.ran(1); len(got) != 1 || got[0] != "one\ntwo\n" {
		t.Errorf("output %q", got)
	}
}

// SFTP servers may rename a file that is still open.
func TestRenamedWhileOpen(t *testing.T) {
	m := boot(t)
	temp := filepath.Join(m.cfg.Pipe, "temp")
	f, err := os.Create(temp)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(request(t, jobHeader("open", 1), "echo open\n")); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, m.cfg.pipeIn()); err != nil {
		t.Fatal(err)
	}
	f.Close()
	m.finished("open")
	if n := len(find(m.events(), ofType(pipe.TypeAccepted))); n != 1 {
		t.Errorf("accepted %d times", n)
	}
}

func TestTouchIsNoRequest(t *testing.T) {
	m := boot(t)
	m.echo("echo once\n")
	m.ran(1)
	for range 3 {
		f, err := os.OpenFile(m.cfg.pipeIn(), os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	m.settle("after-touch")
	if n := len(find(m.events(), ofType(pipe.TypeFinished))); n != 1 {
		t.Errorf("%d jobs ran, want 1", n)
	}
}

func TestNothingWritten(t *testing.T) {
	m := boot(t)
	m.echo("")
	m.echo(" \n\t\n")
	m.settle("after-nothing")
	if e := find(m.events(), func(e pipe.Event) bool { return e.Type != pipe.TypeHello }); len(e) != 1 {
		t.Errorf("answered: %+v", e)
	}
}

func TestFiftyRequestsInARow(t *testing.T) {
	m := boot(t)
	for i := range 50 {
		// As the protocol says: the next is written once this one is answered.
		m.send(1, jobHeader(fmt.Sprintf("row-%d", i), 1), fmt.Sprintf("echo %d\n", i))
	}
	for i, out := range m.ran(50) {
		if out != fmt.Sprintf("%d\n", i) {
			t.Errorf("job %d said %q", i, out)
		}
	}
	started := find(m.events(), ofType(pipe.TypeStarted))
	if len(started) != 50 {
		t.Fatalf("%d started", len(started))
	}
}

// What can't be read is refused, and the next request works.
func TestUnreadable(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("echo secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, place := range map[string]func(temp string) error{
		"link":   func(temp string) error { return os.Symlink(secret, temp) },
		"fifo":   func(temp string) error { return unix.Mkfifo(temp, 0o600) },
		"second": func(temp string) error { return os.Link(secret, temp) },
		"device": func(temp string) error { return unix.Mknod(temp, unix.S_IFSOCK|0o600, 0) },
		"large": func(temp string) error {
			return os.WriteFile(temp, make([]byte, pipe.MaxRequest+1), 0o600)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			temp := filepath.Join(m.cfg.Pipe, "temp")
			if err := place(temp); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(temp, m.cfg.pipeIn()); err != nil {
				t.Fatal(err)
			}
			e := m.await("refusal", 1, ofType(pipe.TypeRefused))
			if e.Refused.Reason != pipe.ReasonMalformed || e.Refused.Message == "" {
				t.Errorf("refused: %+v", e.Refused)
			}
			m.submit("next", "echo fine\n")
			m.finished("next")
			if strings.Contains(m.raw(), "echo secret") {
				t.Error("a foreign file was read")
			}
		})
	}
}

func TestMalformed(t *testing.T) {
	good := string(request(t, jobHeader("x", 1), "echo x\n"))
	for name, tc := range map[string]struct {
		text      string
		reason    pipe.Reason
		key       string
		retryable bool
	}{
		"cut":     {good[:len(good)-3], pipe.ReasonMalformed, "job/x/1", true},
		"json":    {"#!/bin/bash\n#pipe {\necho\n", pipe.ReasonMalformed, "", false},
		"version": {strings.Replace(good, `"version":1`, `"version":9`, 1), pipe.ReasonVersion, "job/x/1", false},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			m.rename([]byte(tc.text))
			r := m.await("refusal", 1, ofType(pipe.TypeRefused)).Refused
			if r.Reason != tc.reason || r.Request != tc.key || r.Retryable != tc.retryable {
				t.Errorf("refused: %+v", r)
			}
		})
	}
}

// What lies in pipe_in when the runner starts may be a request that nobody
// saw, or one that ran long ago.
func TestAtStart(t *testing.T) {
	t.Run("new with a header", func(t *testing.T) {
		m := boot(t)
		m.stop()
		m.rename(request(t, jobHeader("late", 1), "echo late\n"))
		m.start()
		m.finished("late")
	})
	t.Run("dealt with", func(t *testing.T) {
		m := boot(t)
		m.echo("echo once\n")
		m.ran(1)
		m.stop()
		m.start()
		m.settle("after-start")
		if n := len(find(m.events(), ofType(pipe.TypeFinished))); n != 1 {
			t.Errorf("%d jobs ran, want 1", n)
		}
		if r := find(m.events(), ofType(pipe.TypeRefused)); len(r) > 0 {
			t.Errorf("refused: %+v", r[0].Refused)
		}
	})
	t.Run("new without a header", func(t *testing.T) {
		m := boot(t)
		m.stop()
		m.echo("echo stale\n")
		m.start()
		r := m.await("refusal", 1, ofType(pipe.TypeRefused)).Refused
		if r.Reason != pipe.ReasonStale {
			t.Errorf("refused: %+v", r)
		}
		aside, err := os.ReadDir(filepath.Join(m.cfg.spool(), "aside"))
		if err != nil || len(aside) != 1 {
			t.Fatalf("set aside: %v, %v", aside, err)
		}
		m.until("pipe_in to be empty", func() bool {
			info, err := os.Stat(m.cfg.pipeIn())
			return err == nil && info.Size() == 0
		})
		m.echo("echo stale\n") // now it is meant
		m.ran(1)
	})
}

func TestLostFolder(t *testing.T) {
	m := boot(t)
	m.submit("before", "echo before\n")
	m.finished("before")
	if err := os.Rename(m.cfg.Pipe, m.cfg.Pipe+".away"); err != nil {
		t.Fatal(err)
	}
	m.until("a new pipe_out", func() bool {
		_, err := os.Stat(m.cfg.pipeOut())
		return err == nil
	})
	if f := m.finished("before"); f.Status != pipe.StatusSucceeded {
		t.Errorf("repeated: %+v", f)
	}
	m.submit("after", "echo after\n")
	m.finished("after")
	if g := m.events()[0].Hello.Generation; !strings.HasPrefix(string(g), "2-") {
		t.Errorf("generation %s, want the second", g)
	}
}

func TestNotices(t *testing.T) {
	// Two as inotify(7) lays them out, and a third that was cut.
	raw := []byte("\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00pipe_in\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\xff\xff\xff\xff\x00\x40\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" +
		"\x01\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x10\x00\x00\x00pipe")
	got := parseNotices(raw)
	if len(got) != 2 || got[0] != (notice{1, unix.IN_MODIFY, "pipe_in"}) || got[1] != (notice{-1, unix.IN_Q_OVERFLOW, ""}) {
		t.Errorf("notices: %+v", got)
	}
}

// What is swapped with a stale script may be anything: whoever writes to the
// pipe can put it there.
func TestClearMeetsAnything(t *testing.T) {
	for name, put := range map[string]func(path string) error{
		"fifo": func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link": func(path string) error { return os.Symlink("/dev/zero", path) },
	} {
		t.Run(name, func(t *testing.T) {
			r := New(Config{Pipe: t.TempDir()})
			r.user = self()
			if err := put(r.cfg.pipeIn()); err != nil {
				t.Fatal(err)
			}
			before, err := os.Lstat(r.cfg.pipeIn())
			if err != nil {
				t.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- r.clear(letter{digest: digestOf("a script")}) }()
			select {
			case err = <-done:
			case <-time.After(patience):
				t.Fatal("it waits for a writer")
			}
			after, statErr := os.Lstat(r.cfg.pipeIn())
			if err != nil || statErr != nil || !os.SameFile(before, after) {
				t.Errorf("clear: %v; it is not put back: %v", err, statErr)
			}
			if left, err := os.ReadDir(r.cfg.Pipe); err != nil || len(left) != 1 {
				t.Errorf("left: %v, %v", left, err)
			}
		})
	}
}
