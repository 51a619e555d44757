package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/vm"
	"osbuilder/pipe"
)

// hurry makes the daemon of this test impatient.
func (s *sidecar) hurry() {
	answer, retry := answerTimeout, retryAfter
	answerTimeout, retryAfter = time.Second, 50*time.Millisecond
	s.t.Cleanup(func() { answerTimeout, retryAfter = answer, retry })
	s.timings = vm.Timings{
		RetryMin: 20 * time.Millisecond, RetryMax: 100 * time.Millisecond,
		Busy: 5 * time.Millisecond, Idle: 40 * time.Millisecond, Poll: 100 * time.Millisecond,
	}
}

// clock lets a test have the daemon's clock run ahead.
func (s *sidecar) clock() (ahead func(time.Duration)) {
	var by atomic.Int64
	before := now
	now = func() time.Time { return before().Add(time.Duration(by.Load())) }
	s.t.Cleanup(func() { now = before })
	return func(d time.Duration) { by.Add(int64(d)) }
}

// wantRung waits for the line that a user reads each minute in which no VM is
// ready.
func (s *sidecar) wantRung(ahead func(time.Duration), rung, why string) {
	s.t.Helper()
	s.until("line with rung="+rung, func() bool {
		ahead(time.Minute)
		for _, line := range s.logs.FilterMessage("drops wait, for no VM is ready").All() {
			said := line.ContextMap()
			if text, _ := said["for"].(string); said["rung"] == rung && strings.Contains(text, why) && said["hint"] != nil {
				return line.Level == zap.WarnLevel
			}
		}
		return false
	})
}

// inMemory has the folders of a test made in memory: how fast the disk is is not
// what it is about. Where nothing can be mounted they lie on disk.
func inMemory(t *testing.T) {
	t.Helper()
	dir, err := os.MkdirTemp("", "m") //nolint:usetesting // a short name: there are sockets below it
	if err != nil {
		t.Fatal(err)
	}
	mounted := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=500m") == nil
	t.Cleanup(func() {
		if mounted {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	t.Setenv("TMPDIR", dir)
}

// said counts the lines of the daemon that hold a text.
func (s *sidecar) said(text string) int { return s.logs.FilterMessageSnippet(text).Len() }

const (
	asks      = "it is asked to tell everything again"
	perStage  = 200
	stageLine = "this is line %d of a job that says much, so that there is something to damage\n"
)

// A staged job prints perStage lines for each stage that it is let into, and
// notes that it ran.
type staged struct {
	s    *sidecar
	name string
	dir  string
}

func (s *sidecar) staged(name string, stages int) *staged {
	s.t.Helper()
	j := &staged{s: s, name: name, dir: s.t.TempDir()}
	var script strings.Builder
	fmt.Fprintf(&script, "cd '%s'\necho ran >>runs\n", j.dir)
	for stage := range stages {
		fmt.Fprintf(&script, "until [ -e go-%d ]; do sleep 0.02; done\nfor ((i = %d; i < %d; i++)); do printf '%s' $i; done\n",
			stage, stage*perStage, (stage+1)*perStage, strings.ReplaceAll(stageLine, "\n", `\n`))
	}
	fmt.Fprintf(&script, "echo image >\"$OUT/%s.iso\"\n", name)
	s.drop(name+".sh", script.String())
	return j
}

// let lets it into a stage.
func (j *staged) let(stage int) {
	j.s.t.Helper()
	if err := os.WriteFile(filepath.Join(j.dir, fmt.Sprint("go-", stage)), nil, 0o600); err != nil {
		j.s.t.Fatal(err)
	}
}

func stageOutput(stages int) string {
	var b strings.Builder
	for i := range stages * perStage {
		fmt.Fprintf(&b, stageLine, i)
	}
	return b.String()
}

// read waits until the sidecar has the output of so many stages.
func (j *staged) read(stages int) {
	j.s.t.Helper()
	want := stageOutput(stages)
	j.s.until(fmt.Sprint("log of ", stages, " stages"), func() bool {
		logs, err := filepath.Glob(filepath.Join(j.s.cfg.Paths.State, "jobs", "*", "build.log"))
		if err != nil {
			return false
		}
		return slices.ContainsFunc(logs, func(name string) bool {
			log, err := os.ReadFile(name)
			return err == nil && string(log) == want
		})
	})
}

// told waits until the runner has said the last line of a stage.
func (j *staged) told(stages int) {
	j.s.t.Helper()
	want := strings.TrimSuffix(fmt.Sprintf(stageLine, stages*perStage-1), "\n")
	j.s.until(fmt.Sprint("word of ", stages, " stages in pipe_out"), func() bool {
		out, err := os.ReadFile(j.s.out())
		return err == nil && bytes.Contains(out, []byte(want))
	})
}

// done waits for the outcome: one run, a whole log.
func (j *staged) done(stages int) {
	j.s.t.Helper()
	status, log, _ := j.s.outcome(j.name)
	if diff := cmp.Diff(stageOutput(stages), log); status != "succeeded" || diff != "" {
		j.s.t.Errorf("status %s, build.log (-want +got):\n%s", status, diff)
	}
	if runs, err := os.ReadFile(filepath.Join(j.dir, "runs")); err != nil || string(runs) != "ran\n" {
		j.s.t.Errorf("it ran %d times, %v", strings.Count(string(runs), "\n"), err)
	}
}

func (s *sidecar) out() string { return filepath.Join(s.vm.Dir(), pipe.Out) }

// overwrite puts bytes into pipe_out at an offset, or at its end for -1.
func (s *sidecar) overwrite(at int64, data []byte) {
	s.t.Helper()
	f, err := os.OpenFile(s.out(), os.O_WRONLY, 0)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	if at < 0 {
		if at, err = f.Seek(0, 2); err != nil {
			s.t.Fatal(err)
		}
	}
	if _, err := f.WriteAt(data, at); err != nil {
		s.t.Fatal(err)
	}
}

// Whatever somebody does to pipe_out while a job runs, before the eyes of the
// sidecar or while it is away: it is said once, the job's log has every byte,
// and the job runs once.
func TestPipeOutUnderOtherHands(t *testing.T) {
	inMemory(t)
	middle := func(s *sidecar) int64 {
		info, err := os.Stat(s.out())
		if err != nil {
			s.t.Fatal(err)
		}
		return info.Size() * 2 / 3 // not read, where the sidecar is away
	}
	for name, tt := range map[string]struct {
		harm func(s *sidecar) error
		live bool // shows while it is read
	}{
		"cut":     {func(s *sidecar) error { return os.Truncate(s.out(), middle(s)) }, true},
		"emptied": {func(s *sidecar) error { return os.Truncate(s.out(), 0) }, true},
		"removed": {func(s *sidecar) error { return os.Remove(s.out()) }, true},
		"replaced": {func(s *sidecar) error {
			other := s.out() + ".other"
			return errors.Join(os.WriteFile(other, []byte("something else\n"), 0o644), os.Rename(other, s.out()))
		}, true},
		"edited": {func(s *sidecar) error { // as sed -i does it
			data, err := os.ReadFile(s.out())
			lines := bytes.SplitAfter(data, []byte("\n"))
			other := s.out() + ".other"
			kept := bytes.Join(slices.Delete(lines, len(lines)*2/3, len(lines)-2), nil)
			return errors.Join(err, os.WriteFile(other, kept, 0o644), os.Rename(other, s.out()))
		}, true},
		"folder removed": {func(s *sidecar) error { return os.RemoveAll(s.vm.Dir()) }, true},
		"garbage":        {func(s *sidecar) error { s.overwrite(-1, []byte("garbage\n\xff\xfe\x01")); return nil }, true},
		"zeros":          {func(s *sidecar) error { s.overwrite(-1, make([]byte, 10_000)); return nil }, true},
		"punched":        {func(s *sidecar) error { s.overwrite(middle(s), make([]byte, 5000)); return nil }, false},
		"overwritten": {func(s *sidecar) error {
			s.overwrite(middle(s), bytes.Repeat([]byte("not an event, though as long\n"), 40))
			return nil
		}, false},
		"hello overwritten": {func(s *sidecar) error { s.overwrite(3, []byte("nonsense")); return nil }, false},
	} {
		for _, away := range []bool{false, true} {
			if !away && !tt.live {
				continue // it was read before
			}
			t.Run(fmt.Sprintf("%s, away %t", name, away), func(t *testing.T) {
				s := newSidecar(t)
				s.hurry()
				stop := s.start()
				defer func() { stop() }()
				j := s.staged("big", 3)
				j.let(0)
				j.read(1)
				if away {
					stop()
				}
				j.let(1)
				j.told(2)
				if !away {
					j.read(2)
				}
				if err := tt.harm(s); err != nil {
					t.Fatal(err)
				}
				if away {
					stop = s.start()
				}
				j.let(2)
				j.done(3)
				if n := s.said(asks); n > 1 {
					t.Errorf("%d lines about it", n)
				}
				// And all is as it was: the next job has nothing to complain about.
				next := s.staged("next", 1)
				next.let(0)
				next.done(1)
				if n := s.said(asks); n > 1 {
					t.Errorf("%d lines about it after the next job", n)
				}
			})
		}
	}
}

// The files of older generations, which were not read, are removed.
func TestOldGenerationsRemoved(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	stop := s.start()
	defer func() { stop() }()
	j := s.staged("big", 2)
	j.let(0)
	j.read(1)
	stop()
	j.let(1)
	s.until("outcome in the VM", func() bool {
		out, err := os.ReadFile(s.out())
		return err == nil && bytes.Contains(out, []byte(`"type":"finished"`))
	})
	for range 2 {
		s.run.Reboot()
	}
	old, err := filepath.Glob(s.out() + ".*")
	if err != nil || len(old) < 2 {
		t.Fatalf("old generations: %v, %v", old, err)
	}
	for _, name := range old {
		if err := os.Remove(name); err != nil {
			t.Fatal(err)
		}
	}
	stop = s.start()
	j.done(2)
	if n := s.said(asks); n != 1 {
		t.Errorf("%d lines about it", n)
	}
}

// loseCheckpoint damages what is on record of how far the VM's events were
// read.
func (s *sidecar) loseCheckpoint() {
	s.t.Helper()
	name := filepath.Join(s.cfg.Paths.State, "osbuilder.db")
	data, err := os.ReadFile(name)
	if err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Contains(data, []byte(`{"position":{`)) {
		s.t.Fatal("no checkpoint in the store's file")
	}
	if err := os.WriteFile(name, bytes.ReplaceAll(data, []byte(`{"position":{`), []byte(`{"pisition":{`)), 0o600); err != nil {
		s.t.Fatal(err)
	}
}

// The VM is told what it may forget when much was read, and frees it. With the
// checkpoint damaged, the sidecar then meets the hole, and has all told again:
// the job runs once, and its log is whole.
func TestConsumedAndCheckpointDamaged(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	every := consumeEvery
	consumeEvery = 32 << 10
	t.Cleanup(func() { consumeEvery = every })
	stop := s.start()
	defer func() { stop() }()
	j := s.staged("big", 6)
	for stage := range 5 {
		j.let(stage)
		j.read(stage + 1)
	}
	s.until("a hole in pipe_out", func() bool {
		out, err := os.ReadFile(s.out())
		return err == nil && bytes.Count(out, []byte{0}) > len(out)/3
	})
	// A punch is a change of the file, and no reason to ask again.
	logins, before := s.vm.Logins(), s.vm.Requests("posix-rename@openssh.com")
	s.until("rest", func() bool {
		now := s.vm.Requests("posix-rename@openssh.com")
		quiet := now == before
		before = now
		return quiet
	})
	stop()
	if n := s.vm.Logins(); n != logins {
		t.Errorf("%d logins, want %d", n, logins)
	}
	s.loseCheckpoint()
	stop = s.start()
	s.until("word of it", func() bool {
		return s.said("how far the builder's events were read is not known any more") == 1 && s.said(asks) == 1
	})
	j.let(5)
	j.done(6)
	if n := s.said(asks); n != 1 {
		t.Errorf("%d lines about it", n)
	}
}

// The checkpoint is damaged, and nothing was freed yet: the VM's first hello
// is older than the job.
func TestCheckpointDamaged(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	stop := s.start()
	defer func() { stop() }()
	j := s.staged("big", 2)
	j.let(0)
	j.read(1)
	stop()
	s.loseCheckpoint()
	stop = s.start()
	j.read(1)
	j.let(1)
	j.done(2)
}

// Somebody writes a script into pipe_in between our request and the runner's
// look at it: the script runs, and our request is written again.
func TestPipeInUnderOtherHands(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	trace := filepath.Join(t.TempDir(), "trace")
	s.vm.Overwrite("echo theirs >>'" + trace + "'\n")
	stop := s.start()
	defer stop()
	j := s.staged("big", 1)
	j.let(0)
	j.done(1)
	s.until("trace of the other script", func() bool {
		text, err := os.ReadFile(trace)
		return err == nil && string(text) == "theirs\n"
	})
	if n := s.said("request not answered, writing it again"); n != 1 {
		t.Errorf("%d lines about it", n)
	}
}

// second is another installation at the same VM.
func (s *sidecar) second() *sidecar {
	s.t.Helper()
	other := *s
	dir := s.t.TempDir()
	other.cfg.Paths.Jobs, other.cfg.Paths.Output, other.cfg.Paths.State = filepath.Join(dir, "jobs"), filepath.Join(dir, "output"), filepath.Join(dir, "state")
	other.cfg.Paths.Health, other.cfg.Paths.Control = filepath.Join(dir, "health.sock"), filepath.Join(dir, "control.sock")
	for _, path := range []string{other.cfg.Paths.Jobs, other.cfg.Paths.Output, other.cfg.Paths.State} {
		if err := os.Mkdir(path, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	return &other
}

// A second sidecar at the same VM is refused, both say so, and the first one's
// jobs are not disturbed. Allowed to, it takes the VM over: the first one says
// that it lost it, sees its running job to the end, and doesn't fight.
func TestSecondSidecar(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	ahead := s.clock()
	stop := s.start()
	defer func() { stop() }()
	j := s.staged("first", 2)
	j.let(0)
	j.read(1)

	other := s.second()
	stopOther := other.start()
	theirs := other.staged("theirs", 1)
	theirs.let(0)
	other.untilWaits("theirs", "owned by", "TAKE_OVER=Y")
	s.until("word of the other one", func() bool { return s.said("another sidecar writes to this builder") == 1 })
	other.wantRung(ahead, "owner", "is owned by")
	quick := s.staged("quick", 1) // it is not held up by that
	quick.let(0)
	quick.done(1)
	stopOther()

	s.cfg.TakeOver = true // it doesn't fight even so; but that was read at its start
	other.cfg.TakeOver = true
	stopOther = other.start()
	defer func() { stopOther() }()
	theirs.done(1)
	s.until("word of the loss", func() bool { return s.said("this builder was taken over by another sidecar") == 1 })
	waits := s.staged("waits", 1)
	waits.let(0)
	s.untilWaits("waits", "was taken over by")
	j.let(1)
	j.done(2)
	again := other.staged("again", 1)
	again.let(0)
	again.done(1)
}

// The runner stands still while the link is up.
func TestRunnerStandsStill(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	ahead := s.clock()
	stop := s.start()
	defer func() { stop() }()
	first := s.staged("first", 1)
	first.let(0)
	first.done(1)
	s.run.Stop()
	next := s.staged("next", 1)
	next.let(0)
	s.wantRung(ahead, "answer", "it left a request unanswered")
	s.run.Start()
	next.done(1)
}

// Two sidecars on one state folder: the second one doesn't start, and says
// why.
func TestSecondOnTheSameState(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	stop := s.start()
	defer func() { stop() }()
	j := s.staged("first", 2)
	j.let(0)
	j.read(1)
	err := serve(t.Context(), s.cfg, nil, zap.NewNop())
	if err == nil || len(hint.Of(err)) == 0 {
		t.Errorf("error %v, hints %q: want both", err, hint.Of(err))
	}
	j.let(1)
	j.done(2)
}
