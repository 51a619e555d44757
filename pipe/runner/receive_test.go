package runner

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// refused checks the answer to a request.
func refused(t *testing.T, e pipe.Event, reason pipe.Reason) *pipe.Refused {
	t.Helper()
	if e.Refused == nil || e.Refused.Reason != reason {
		t.Fatalf("answer: accepted %+v, refused %+v; want refused for %q", e.Accepted, e.Refused, reason)
	}
	return e.Refused
}

func accepted(t *testing.T, e pipe.Event) {
	t.Helper()
	if e.Accepted == nil {
		t.Fatalf("refused: %+v", e.Refused)
	}
}

func TestRepeatIsAnsweredAndDoesNotRun(t *testing.T) {
	m := boot(t)
	h := jobHeader("again", 1)
	accepted(t, m.send(1, h, "echo x\n"))
	accepted(t, m.send(2, h, "echo x\n"))
	m.finished("again")
	accepted(t, m.send(3, h, "echo x\n"))
	m.send(1, ackHeader("again", 1), "")
	accepted(t, m.send(4, h, "echo x\n"))
	m.stop()
	m.start()
	accepted(t, m.send(5, h, "echo x\n"))
	m.settle("after")
	if n := len(find(m.events(), ofType(pipe.TypeStarted))); n != 1 {
		t.Errorf("started %d times", n)
	}
}

func TestConflict(t *testing.T) {
	m := boot(t)
	accepted(t, m.send(1, jobHeader("c", 1), "echo one\n"))
	refused(t, m.send(2, jobHeader("c", 1), "echo two\n"), pipe.ReasonConflict)
	inputs := jobHeader("c", 1)
	inputs.Inputs = digestOf("inputs")
	refused(t, m.send(3, inputs, "echo one\n"), pipe.ReasonConflict)
	m.finished("c")
	accepted(t, m.send(1, ackHeader("c", 1), ""))
	refused(t, m.send(4, jobHeader("c", 1), "echo two\n"), pipe.ReasonConflict)
	accepted(t, m.send(1, jobHeader("c", 2), "echo two\n"))
	m.await("second attempt", 1, func(e pipe.Event) bool { return e.Type == pipe.TypeFinished && e.Attempt == 2 })
}

func TestOwner(t *testing.T) {
	m := boot(t)
	accepted(t, m.send(1, jobHeader("mine", 1), "echo mine\n"))
	other := jobHeader("theirs", 1)
	other.Owner = "sidecar-2"
	r := refused(t, m.send(1, other, "echo theirs\n"), pipe.ReasonOwner)
	if r.OwnedBy != owner {
		t.Errorf("owned by %q", r.OwnedBy)
	}
	m.finished("mine")

	m.stop()
	m.start() // the owner lasts
	if h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello; h.Owner != owner || len(h.Jobs) != 1 {
		t.Errorf("hello: %+v", h)
	}
	refused(t, m.send(2, other, "echo theirs\n"), pipe.ReasonOwner)
	accepted(t, m.send(1, pipe.Header{Kind: pipe.KindTakeOver, Owner: "sidecar-2"}, ""))
	accepted(t, m.send(3, other, "echo theirs\n"))
	m.finished("theirs")
	refused(t, m.send(1, jobHeader("mine", 2), "echo mine\n"), pipe.ReasonOwner)
}

func TestAcknowledge(t *testing.T) {
	m := boot(t)
	wait, open := m.gate("ack")
	m.submit("ack", wait+"echo x >$OUT/x\n")
	m.await("start", 1, ofType(pipe.TypeStarted))
	refused(t, m.send(1, ackHeader("ack", 1), ""), pipe.ReasonConflict)
	open()
	m.finished("ack")
	a := m.await("artifact", 1, ofType(pipe.TypeArtifact)).Artifact
	for n := range 2 { // idempotent
		accepted(t, m.send(n+2, ackHeader("ack", 1), ""))
		p := m.cfg.paths(pipe.JobRef{Job: "ack", Attempt: 1})
		for _, path := range []string{a.Path, p.own, p.spool, p.artifacts, p.roots} {
			if exists(path) {
				t.Errorf("%s is still there", path)
			}
		}
	}
	m.until("the trash to be emptied", func() bool {
		left, err := os.ReadDir(filepath.Join(m.cfg.spool(), "trash"))
		return err == nil && len(left) == 0
	})
	m.stop()
	m.start()
	if h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello; len(h.Jobs) != 0 {
		t.Errorf("hello lists %v", h.Jobs)
	}
}

func TestConsumedFreesOldGenerations(t *testing.T) {
	m := boot(t)
	first := m.events()[0].Hello.Generation
	m.reboot()
	second := m.events()[0].Hello.Generation
	m.reboot()
	third := m.events()[0].Hello.Generation
	file := func(g pipe.Generation) string { return filepath.Join(m.cfg.Pipe, g.File()) }
	for i, tc := range []struct {
		consumed     pipe.Generation
		first, other bool
	}{
		{"9-00000000", true, true}, // of another VM
		{first, true, true},
		{second, false, true},
		{third, false, false},
	} {
		h := ackHeader("nothing", 1)
		h.Consumed = &pipe.Position{Generation: tc.consumed}
		m.send(i+1, h, fmt.Sprint("# ", i))
		if exists(file(first)) != tc.first || exists(file(second)) != tc.other {
			t.Errorf("consumed %s: first kept %v, second kept %v", tc.consumed, exists(file(first)), exists(file(second)))
		}
	}
}

func TestAnonymousJobsArePruned(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 4
	m.start()
	const n = keepAnonymous + 3
	for i := range n {
		m.echo(fmt.Sprintf("echo %d\n", i))
		m.await("its acceptance", i+1, ofType(pipe.TypeAccepted))
	}
	m.await("all to finish", n, ofType(pipe.TypeFinished))
	m.until("the oldest to be forgotten", func() bool {
		left, err := os.ReadDir(filepath.Join(m.cfg.spool(), "jobs"))
		return err == nil && len(left) == keepAnonymous
	})
}

func TestTombstonesArePruned(t *testing.T) {
	m := newMachine(t)
	if err := os.MkdirAll(m.cfg.spool(), 0o700); err != nil {
		t.Fatal(err)
	}
	s := &spool{cfg: m.cfg, room: &reserve{path: filepath.Join(m.cfg.spool(), "reserve")}}
	if err := s.open(); err != nil {
		t.Fatal(err)
	}
	defer s.close()
	for i := range 30 {
		rec := record{Job: fmt.Sprintf("j%d", i), Attempt: 1, SHA256: digestOf("x")}
		if err := s.bury(rec); err != nil {
			t.Fatal(err)
		}
		when := time.Unix(int64(1_000_000+i), 0)
		if err := os.Chtimes(s.path("gone", folder(rec.ref())), when, when); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.pruneGone(10); err != nil || s.gone != 10 {
		t.Fatalf("%d left, %v", s.gone, err)
	}
	for i := range 30 {
		if _, ok := s.tombstone(pipe.JobRef{Job: fmt.Sprintf("j%d", i), Attempt: 1}); ok != (i >= 20) {
			t.Errorf("tombstone %d kept: %v", i, ok)
		}
	}
}

// A disk that is full refuses jobs, whole and retryably, and carries out
// acknowledgements from the reserve.
func TestFullDisk(t *testing.T) {
	m := newMachine(t)
	reserve := filepath.Join(m.cfg.spool(), "reserve")
	var isFull bool // changed only while no runner lives
	m.cfg.fault = func(_, _ string) error {
		if !isFull {
			return nil
		}
		// Full, until the reserve was given back.
		if info, err := os.Stat(reserve); err == nil && info.Size() == 0 {
			return nil
		}
		return unix.ENOSPC
	}
	m.start()
	m.submit("done", "echo x >$OUT/x\n")
	m.finished("done")
	m.stop()
	isFull = true
	if err := os.Truncate(reserve, reserveSize); err != nil {
		t.Fatal(err)
	}
	m.start()
	r := refused(t, m.send(1, jobHeader("new", 1), "echo new\n"), pipe.ReasonDisk)
	if !r.Retryable {
		t.Error("not retryable")
	}
	left, err := os.ReadDir(filepath.Join(m.cfg.spool(), "jobs"))
	if err != nil || len(left) != 1 {
		t.Errorf("in the spool: %v, %v", left, err)
	}
	accepted(t, m.send(1, ackHeader("done", 1), ""))
	m.stop()
	isFull = false
	m.start()
	accepted(t, m.send(2, jobHeader("new", 1), "echo new\n"))
	m.finished("new")
}

// On a full data disk a job is refused with figures, and passes when there is
// room.
func TestRefusalOnFullDisk(t *testing.T) {
	m := newMachine(t)
	m.smallDisk()
	m.start()
	fill, err := os.Create(filepath.Join(m.cfg.Data, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for err == nil {
		_, err = fill.Write(make([]byte, 1<<20))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	h := jobHeader("j", 1)
	r := refused(t, m.send(1, h, "true\n"), pipe.ReasonDisk)
	want := regexp.MustCompile(`^no room on the VM's data disk, (0 bytes|[0-9.]+ kB) are free: spool job j-1: .*no space left on device; ` +
		`it is tried again by itself, jobs that end make room, and a larger DISK_SIZE counts from the VM's next start$`)
	if !r.Retryable || !want.MatchString(r.Message) {
		t.Errorf("refused: %+v, want %s", r, want)
	}
	if err := fill.Truncate(0); err != nil {
		t.Fatal(err)
	}
	accepted(t, m.send(2, h, "true\n"))
	m.finished("j")
}

// A job that was refused is not there, whatever failed: the same request
// passes later, and no later runner finds it.
func TestRefusedJobIsNotThere(t *testing.T) {
	m := newMachine(t)
	var fails atomic.Bool
	m.cfg.fault = func(op, path string) error {
		if op == "sync" && filepath.Base(path) == "jobs" && fails.Load() {
			return unix.EIO
		}
		return nil
	}
	m.start()
	fails.Store(true)
	digest := m.upload("inputs")
	for _, h := range []pipe.Header{jobHeader("j", 1), inputsHeader("i", 1, digest)} {
		for n := range 2 {
			if r := refused(t, m.send(n+1, h, "true\n"), pipe.ReasonInternal); !r.Retryable || !strings.Contains(r.Message, "sync folder") {
				t.Errorf("refused: %+v", r)
			}
		}
	}
	m.stop()
	m.start()
	if h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello; len(h.Jobs) != 0 {
		t.Errorf("the next runner has %v", h.Jobs)
	}
	fails.Store(false)
	accepted(t, m.send(3, jobHeader("j", 1), "true\n"))
	accepted(t, m.send(3, inputsHeader("i", 1, digest), "true\n"))
	m.finished("j")
	m.finished("i")
}

func TestReserve(t *testing.T) {
	r := &reserve{path: filepath.Join(t.TempDir(), "reserve")}
	if err := r.fill(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(r.path); err != nil || info.Size() != reserveSize {
		t.Fatalf("reserve: %v, %v", info, err)
	}
	calls := 0
	if err := r.use(func() error {
		if calls++; calls == 1 {
			return fmt.Errorf("write: %w", unix.ENOSPC)
		}
		return nil
	}); err != nil || calls != 2 || !r.spent {
		t.Errorf("%d calls, spent %v, %v", calls, r.spent, err)
	}
	if info, err := os.Stat(r.path); err != nil || info.Size() != 0 {
		t.Errorf("reserve after use: %v, %v", info, err)
	}
	other := errors.New("other")
	if err := r.use(func() error { return other }); !errors.Is(err, other) {
		t.Errorf("use: %v", err)
	}
}

// The attempts before the one that is asked for have served: nobody will
// acknowledge them.
func TestLaterAttemptSupersedesEarlierOnes(t *testing.T) {
	m := boot(t)
	m.submit("again", "echo one > \"$OUT/file\"\n")
	m.finished("again")
	first := filepath.Join(m.cfg.artifactsDir(), "again-1")
	if _, err := os.Stat(first); err != nil {
		t.Fatal(err)
	}
	accepted(t, m.send(1, jobHeader("again", 2), "true\n"))
	m.until("the first attempt's files to go", func() bool {
		_, err := os.Stat(first)
		return errors.Is(err, os.ErrNotExist)
	})
	// A late repeat of it still doesn't run.
	accepted(t, m.send(2, jobHeader("again", 1), "echo one > \"$OUT/file\"\n"))
	m.await("start of the second attempt", 1, func(e pipe.Event) bool { return e.Started != nil && e.Attempt == 2 })
	if n := len(find(m.events(), ofType(pipe.TypeStarted))); n != 2 {
		t.Errorf("%d starts", n)
	}
}
