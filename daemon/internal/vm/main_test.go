package vm_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// quick are timings with which a test doesn't wait; what a test wants to
// happen late or never it sets itself.
var quick = vm.Timings{
	RetryMin: 5 * time.Millisecond, RetryMax: 20 * time.Millisecond, RetryHostKey: 20 * time.Millisecond,
	Busy: 2 * time.Millisecond, Idle: 20 * time.Millisecond, Poll: 50 * time.Millisecond,
}

// bound is how long a test waits for what must happen.
const bound = 30 * time.Second

// A sink records what it is told.
type sink struct {
	mu       sync.Mutex // guards what follows
	position pipe.Position
	entries  []pipe.Entry
	batches  int
	ups      int
	reasons  []error
	changed  chan struct{}
	patience time.Duration // how long the test waits for what must happen
	fail     error         // of Entries
	block    chan struct{} // Entries waits for it, if not nil
	deaf     bool          // and for nothing else
	taking   bool          // Entries was called

	caughtUp int // calls
	damages  []damaged
}

// damaged is one call of Damaged.
type damaged struct {
	place  pipe.Position
	reason error
}

func newSink(from pipe.Position) *sink {
	return &sink{position: from, changed: make(chan struct{}), patience: bound}
}

func (s *sink) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *sink) Position(context.Context, string) (pipe.Position, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.position, nil
}

func (s *sink) Up(context.Context, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ups++
	s.tell()
	return nil
}

func (s *sink) Entries(ctx context.Context, _ string, entries []pipe.Entry) error {
	s.mu.Lock()
	block, deaf := s.block, s.deaf
	s.taking = true
	s.tell()
	s.mu.Unlock()
	switch {
	case block != nil && deaf:
		<-block
	case block != nil:
		select {
		case <-block:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.entries = append(s.entries, entries...)
	s.batches++
	s.position = entries[len(entries)-1].Next
	s.tell()
	return nil
}

func (s *sink) CaughtUp(context.Context, string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.caughtUp++
	s.tell()
	return nil
}

func (s *sink) Damaged(_ context.Context, _ string, place pipe.Position, reason error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damages = append(s.damages, damaged{place, reason})
	s.tell()
	return nil
}

func (s *sink) Down(_ context.Context, _ string, reason error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reasons = append(s.reasons, reason)
	s.tell()
	return nil
}

// until waits until ok says so of the sink.
func (s *sink) until(t *testing.T, what string, ok func(*sink) bool) {
	t.Helper()
	timer := time.NewTimer(s.patience)
	defer timer.Stop()
	for {
		s.mu.Lock()
		if ok(s) {
			s.mu.Unlock()
			return
		}
		changed := s.changed
		s.mu.Unlock()
		select {
		case <-changed:
		case <-timer.C:
			s.mu.Lock()
			defer s.mu.Unlock()
			t.Fatalf("waited in vain for %s: %d entries, %d ups, downs %v, damages %v", what, len(s.entries), s.ups, s.reasons, s.damages)
		}
	}
}

func (s *sink) untilUp(t *testing.T, n int) {
	t.Helper()
	s.until(t, fmt.Sprintf("up number %d", n), func(s *sink) bool { return s.ups >= n })
}

// untilDamaged waits for that many damages and returns the last.
func (s *sink) untilDamaged(t *testing.T, n int) damaged {
	t.Helper()
	var last damaged
	s.until(t, fmt.Sprint("damage number ", n), func(s *sink) bool {
		if len(s.damages) >= n {
			last = s.damages[n-1]
		}
		return len(s.damages) >= n
	})
	return last
}

func (s *sink) untilAt(t *testing.T, p pipe.Position) {
	t.Helper()
	s.until(t, fmt.Sprintf("position %v", p), func(s *sink) bool { return s.position == p })
}

// untilRung waits for a reason that is of the rung.
func (s *sink) untilRung(t *testing.T, rung vm.Rung) error {
	t.Helper()
	var found error
	s.until(t, "rung "+string(rung), func(s *sink) bool {
		for _, reason := range s.reasons {
			var broken *vm.RungError
			if errors.As(reason, &broken) && broken.Rung == rung {
				found = reason
				return true
			}
		}
		return false
	})
	return found
}

// untilLogged waits for a log line with the message.
func untilLogged(t *testing.T, logs *observer.ObservedLogs, message string) {
	t.Helper()
	deadline := time.After(bound)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for logs.FilterMessage(message).Len() == 0 {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for the line %q", message)
		}
	}
}

// texts returns the texts of all log events taken so far, in order.
func (s *sink) texts() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []string
	for _, e := range s.entries {
		if e.Event.Log != nil {
			all = append(all, string(e.Event.Log.Data))
		}
	}
	return all
}

// A rig is a server and a builder that runs.
type rig struct {
	srv  *vmtest.Server
	sink *sink
	b    *vm.Builder
	logs *observer.ObservedLogs
	stop context.CancelFunc
	done chan error
}

func config(srv *vmtest.Server, t vm.Timings) vm.Config {
	return vm.Config{
		Name: "vm", Addr: srv.Addr(), User: "builder", Signer: srv.Signer(),
		HostKeys: srv.HostKeys(), Dir: srv.Dir(), Run: filepath.Join(srv.Dir(), "run"), Timings: t,
	}
}

func start(t *testing.T, srv *vmtest.Server, s *sink, timings vm.Timings, changes ...func(*vm.Config)) *rig {
	t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	r := &rig{srv: srv, sink: s, logs: logs, done: make(chan error, 1)}
	cfg := config(srv, timings)
	for _, change := range changes {
		change(&cfg)
	}
	r.b = vm.New(cfg, s, zap.New(core))
	ctx, cancel := context.WithCancel(t.Context())
	r.stop = cancel
	go func() { r.done <- r.b.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-r.done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(bound):
			t.Error("Run doesn't end")
		}
	})
	return r
}

// end stops the builder and returns what Run did.
func (r *rig) end(t *testing.T) error {
	t.Helper()
	r.stop()
	return r.wait(t)
}

func (r *rig) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.done:
		r.done <- nil // for the cleanup
		return err
	case <-time.After(bound):
		t.Fatal("Run doesn't end")
		return nil
	}
}

// up is a rig whose link is up, on a fresh generation.
func up(t *testing.T, timings vm.Timings) (*rig, *vmtest.Pipe) {
	t.Helper()
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	r := start(t, srv, newSink(pipe.Position{}), timings)
	r.sink.untilUp(t, 1)
	return r, p
}
