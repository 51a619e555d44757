package runner

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// childArgument makes the test's own program a runner that can be killed.
const childArgument = "run-as-child"

func TestMain(m *testing.M) {
	if len(os.Args) == 6 && os.Args[1] == childArgument {
		slots, err := strconv.Atoi(os.Args[5])
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		cfg := Config{
			Pipe: filepath.Join(os.Args[2], "nexus_bootstrap"), Data: filepath.Join(os.Args[2], "data"),
			Units: ProcessUnits{}, Boot: os.Args[3], Slots: slots, Image: "test-1", Version: "child", Log: os.Stderr,
		}
		// Killed before the write to a file of that name, or before what is
		// called so.
		if where := os.Args[4]; where != "-" {
			cfg.fault = func(op, path string) error {
				if filepath.Base(path) == where || op == where {
					return unix.Kill(os.Getpid(), unix.SIGKILL)
				}
				return nil
			}
		}
		r := New(cfg)
		go func() { <-r.Ready(); fmt.Fprintln(os.Stdout, "ready") }()
		if err := r.Run(context.Background()); err != nil { //nolint:forbidigo // this is a main
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

// startChild runs a runner as a process, and returns what kills it with -9.
func (m *machine) startChild(dieAt string) (kill, wait func()) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), os.Args[0], childArgument, filepath.Dir(m.cfg.Pipe), m.cfg.Boot, dieAt, strconv.Itoa(m.cfg.Slots))
	cmd.Stderr = m.log
	out, err := cmd.StdoutPipe()
	if err != nil {
		m.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		m.t.Fatalf("child said %q, %v", line, err)
	}
	wait = func() {
		m.t.Helper()
		ended := make(chan struct{})
		go func() { _ = cmd.Wait(); close(ended) }()
		select {
		case <-ended:
		case <-time.After(patience):
			_ = cmd.Process.Kill()
			m.t.Errorf("the child does not end at %q", dieAt)
			<-ended
		}
	}
	return func() { _ = cmd.Process.Kill(); wait() }, wait
}

// The runner is killed with -9 while a job runs; the job goes on, and the next
// runner tells all of it, once.
func TestKilledWhileRunning(t *testing.T) {
	m := newMachine(t)
	kill, _ := m.startChild("-")
	wait, open := m.gate("g")
	m.submit("long", "echo first\n"+wait+"echo second\necho x >$OUT/x\n")
	m.submit("queued", wait+"echo q\n")
	m.submit("third", "echo third\n") // no slot for it yet
	m.until("the first line", func() bool { return m.output("long") == "first\n" })
	kill()
	m.start()
	open()
	if f := m.finished("long"); f.Status != pipe.StatusSucceeded || f.Artifacts != 1 {
		t.Errorf("finished: %+v", f)
	}
	m.finished("queued")
	m.finished("third")
	if got := m.output("long"); got != "first\nsecond\n" {
		t.Errorf("output %q", got)
	}
	// "accepted" may be said twice: killed right after the last answer, the
	// runner has not yet noted that it gave it.
	for _, typ := range []pipe.Type{pipe.TypeStarted, pipe.TypeFinished} {
		if n := len(find(m.events(), ofType(typ))); n != 3 {
			t.Errorf("%s: %d, want one a job", typ, n)
		}
	}
	if g := len(find(m.events(), ofType(pipe.TypeHello))); g != 2 {
		t.Errorf("%d hellos", g)
	}
}

// The job ends while no runner lives.
func TestEndedMeanwhile(t *testing.T) {
	m := newMachine(t)
	kill, _ := m.startChild("-")
	wait, open := m.gate("g")
	m.submit("alone", wait+"echo done; exit 3\n")
	m.await("start", 1, ofType(pipe.TypeStarted))
	kill()
	open()
	p := m.cfg.paths(pipe.JobRef{Job: "alone", Attempt: 1})
	m.until("the result", func() bool { _, err := os.Stat(p.result()); return err == nil })
	m.start()
	f := m.finished("alone")
	if f.Status != pipe.StatusFailed || f.ExitCode == nil || *f.ExitCode != 3 || m.output("alone") != "done\n" {
		t.Errorf("finished: %+v, output %q", f, m.output("alone"))
	}
}

// The runner dies at each step that leaves something on disk.
func TestKilledAtEachStep(t *testing.T) {
	for _, tc := range []struct {
		dies   string // writing this file
		status pipe.Status
		starts int
	}{
		{"body.part", "", 0},                      // not accepted: never heard of
		{"script", pipe.StatusSucceeded, 1},       // not started: runs
		{"ran", pipe.StatusSucceeded, 1},          // before the marker: runs
		{"checked.part", pipe.StatusSucceeded, 1}, // in the middle of collecting
		{"outcome.part", pipe.StatusSucceeded, 1}, // collected, not recorded
		{"seen.part", pipe.StatusSucceeded, 1},    // accepted, request not noted
	} {
		t.Run(tc.dies, func(t *testing.T) {
			m := newMachine(t)
			if tc.dies == "body.part" {
				tc.dies = "body"
			}
			_, wait := m.startChild(tc.dies)
			h := jobHeader("j", 1)
			data := request(t, h, "echo out\necho x >$OUT/x\n")
			m.rename(data)
			wait()
			m.start()
			// The sidecar has no answer, or isn't sure of it: it asks again.
			m.rename(data)
			f := m.finished("j")
			want := tc.status
			if want == "" {
				want = pipe.StatusSucceeded
			}
			if f.Status != want || f.Artifacts != 1 {
				t.Errorf("finished: %+v", f)
			}
			if n := len(find(m.events(), ofType(pipe.TypeStarted))); n != 1 {
				t.Errorf("started %d times", n)
			}
			if got := m.output("j"); got != "out\n" {
				t.Errorf("output %q", got)
			}
		})
	}
}

// A marker without unit or result: nobody knows what the job did.
func TestInterrupted(t *testing.T) {
	m := newMachine(t)
	kill, _ := m.startChild("-")
	wait, _ := m.gate("g")
	m.submit("lost", "echo begun\n"+wait)
	m.until("its output", func() bool { return m.output("lost") == "begun\n" })
	kill()
	p := m.cfg.paths(pipe.JobRef{Job: "lost", Attempt: 1})
	groups, err := os.ReadFile(filepath.Join(p.spool, "process"))
	if err != nil {
		t.Fatal(err)
	}
	var supervisor, job int
	if _, err := fmt.Sscan(string(groups), &supervisor, &job); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(-supervisor, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(-job, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	m.start()
	if f := m.finished("lost"); f.Status != pipe.StatusInterrupted || f.LogLength != 6 {
		t.Errorf("finished: %+v", f)
	}
	accepted(t, m.send(1, jobHeader("lost", 2), "echo again\n"))
}

// After a new boot the new file alone tells every outcome.
func TestReboot(t *testing.T) {
	m := boot(t)
	wait, open := m.gate("g")
	m.submit("done", "echo done\necho x >$OUT/x\n")
	m.finished("done")
	m.submit("failed", "exit 7\n")
	m.finished("failed")
	m.submit("acknowledged", "true\n")
	m.finished("acknowledged")
	m.send(1, ackHeader("acknowledged", 1), "")
	m.submit("cut", "echo begun\n"+wait+"echo unheard\n")
	m.submit("cut2", wait)
	m.submit("waits", "echo waited\n")
	m.until("its output", func() bool { return m.output("cut") == "begun\n" })
	m.await("start", 2, func(e pipe.Event) bool { return strings.HasPrefix(e.Job, "cut") && e.Type == pipe.TypeStarted })
	first := m.events()[0].Hello.Generation
	m.reboot()
	open()
	for job, want := range map[string]pipe.Status{
		"done": pipe.StatusSucceeded, "failed": pipe.StatusFailed,
		"cut": pipe.StatusInterrupted, "cut2": pipe.StatusInterrupted, "waits": pipe.StatusSucceeded,
	} {
		if f := m.finished(job); f.Status != want {
			t.Errorf("%s: %+v, want %s", job, f, want)
		}
	}
	events := m.events()
	hello := events[0].Hello
	if len(hello.Jobs) != 5 || !strings.HasPrefix(string(hello.Generation), "2-") || events[0].Seq != 1 {
		t.Errorf("hello: %+v", hello)
	}
	if n := len(find(events, ofType(pipe.TypeAccepted))); n != 5 {
		t.Errorf("%d accepted", n)
	}
	if n := len(find(events, ofJob(pipe.TypeArtifact, "done"))); n != 1 {
		t.Errorf("%d artifacts", n)
	}
	// Output goes on where the old file ends.
	if got := output(t, events, "done", 5); len(got) > 0 {
		t.Errorf("told again: %q", got)
	}
	if got := m.output("waits"); got != "waited\n" {
		t.Errorf("output %q", got)
	}
	old, err := os.ReadFile(filepath.Join(m.cfg.Pipe, first.File()))
	if err != nil {
		t.Fatal(err)
	}
	if got := string(output(t, parseEvents(t, old), "cut", 0)); got != "begun\n" {
		t.Errorf("old file: %q", got)
	}
	// Another boot changes nothing of that.
	m.reboot()
	if f := m.finished("cut"); f.Status != pipe.StatusInterrupted {
		t.Errorf("after another boot: %+v", f)
	}
}

// A crash leaves zeros where a file had grown. They are neither output nor
// events.
func TestZerosAfterCrash(t *testing.T) {
	m := boot(t)
	wait, _ := m.gate("g")
	m.submit("j", "echo begun\n"+wait)
	m.until("its output", func() bool { return m.output("j") == "begun\n" })
	first := m.events()[0].Hello.Generation
	m.stop()
	grow := func(path string, by int64) {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, info.Size()+by); err != nil {
			t.Fatal(err)
		}
	}
	end := len(m.raw())
	grow(m.cfg.pipeOut(), 5000)
	grow(m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).log(), 200_000)
	m.reboot()
	if f := m.finished("j"); f.Status != pipe.StatusInterrupted || f.LogLength != 6 {
		t.Errorf("finished: %+v", f)
	}
	if info, err := os.Stat(filepath.Join(m.cfg.Pipe, first.File())); err != nil || info.Size() != int64(end) {
		t.Errorf("old file: %v, %v, want %d bytes", info, err, end)
	}
}

// A line that a crash tore is ended, and what it would have said is said.
func TestTornLine(t *testing.T) {
	m := boot(t)
	m.submit("torn", "echo x\n")
	m.finished("torn")
	m.stop()
	data := m.raw()
	cut := strings.LastIndex(data[:len(data)-1], "\n") + 40 // within "finished"
	if err := os.Truncate(m.cfg.pipeOut(), int64(cut)); err != nil {
		t.Fatal(err)
	}
	// A crash that tears a line takes the note of its length along.
	if err := os.Remove(filepath.Join(m.cfg.spool(), "length")); err != nil {
		t.Fatal(err)
	}
	m.start()
	var bad int
	m.until("finished, told again", func() bool {
		bad = 0
		last := false
		for _, line := range strings.Split(strings.TrimSuffix(m.raw(), "\n"), "\n") {
			e, err := pipe.ParseEvent([]byte(line))
			if err != nil {
				bad++
			}
			last = e.Type == pipe.TypeFinished
		}
		return last
	})
	if bad != 1 {
		t.Errorf("%d lines are no events, want the torn one", bad)
	}
	h, err := readOut(m.cfg.pipeOut(), mark{})
	if err != nil {
		t.Fatal(err)
	}
	if h.seq != uint64(strings.Count(m.raw(), "\n")-1) {
		t.Errorf("last number is %d of %d lines", h.seq, strings.Count(m.raw(), "\n"))
	}
}

// What is no longer the file that was written to is followed by another
// generation, which tells all again.
func TestDamagedPipeOut(t *testing.T) {
	for name, damage := range map[string]func(path string) error{
		"missing": os.Remove,
		"shorter": func(path string) error { return os.Truncate(path, 200) },
		"empty":   func(path string) error { return os.Truncate(path, 0) },
		"garbage": func(path string) error {
			return os.WriteFile(path, []byte(strings.Repeat("garbage\x00\n", 1000)), 0o600)
		},
		"link": func(path string) error {
			if err := os.Remove(path); err != nil {
				return err
			}
			return os.Symlink("/dev/null", path)
		},
	} {
		for _, running := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, runner lives: %v", name, running), func(t *testing.T) {
				m := boot(t)
				m.submit("before", "echo before\n")
				m.finished("before")
				if !running {
					m.stop()
				}
				if err := damage(m.cfg.pipeOut()); err != nil {
					t.Fatal(err)
				}
				if !running {
					m.start()
				} else {
					m.rename(request(t, jobHeader("after", 1), "echo after\n"))
					m.until("a new generation", func() bool {
						h, err := readOut(m.cfg.pipeOut(), mark{})
						n, _ := h.gen.Number()
						return err == nil && n == 2
					})
					m.finished("after")
				}
				if f := m.finished("before"); f.Status != pipe.StatusSucceeded {
					t.Errorf("told again: %+v", f)
				}
			})
		}
	}
}

func TestOneRunnerAtATime(t *testing.T) {
	m := boot(t)
	if err := New(m.cfg).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "another runner") {
		t.Errorf("second runner: %v", err)
	}
}

// A record that can't be read is set aside; the others run.
func TestDamagedRecord(t *testing.T) {
	m := boot(t)
	m.submit("good", "echo good\n")
	m.submit("bad", "echo bad\n")
	m.finished("good")
	m.finished("bad")
	m.stop()
	if err := os.WriteFile(m.cfg.paths(pipe.JobRef{Job: "bad", Attempt: 1}).record(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	m.start()
	h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello
	if len(h.Jobs) != 1 || h.Jobs[0].Job != "good" {
		t.Errorf("hello lists %v", h.Jobs)
	}
	if aside, err := os.ReadDir(filepath.Join(m.cfg.spool(), "damaged")); err != nil || len(aside) != 1 {
		t.Errorf("set aside: %v, %v", aside, err)
	}
}

// pipe_out is emptied while nothing happens: whoever follows it can't write
// the request that would show it, so the runner notices by itself.
func TestIdlePipeOutIsMended(t *testing.T) {
	m := newMachine(t)
	m.cfg.look = 20 * time.Millisecond
	m.start()
	m.submit("before", "true\n")
	m.finished("before")
	if err := os.Truncate(m.cfg.pipeOut(), 0); err != nil {
		t.Fatal(err)
	}
	m.await("a hello that knows the job", 1, func(e pipe.Event) bool {
		return e.Hello != nil && len(e.Hello.Jobs) == 1 && e.Hello.Jobs[0].Job == "before"
	})
	m.finished("before")
}
