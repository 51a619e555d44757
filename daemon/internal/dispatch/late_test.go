package dispatch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// late is a machine that takes the first request of a kind later than what is
// written next: pipe_in is read by a runner that can be slow, or away.
type late struct {
	*machine
	kind   pipe.Kind
	before func(pipe.Header) bool // in front of which request it is taken at last; nil: of none
	came   chan struct{}          // closed when there is one

	mu   sync.Mutex
	kept []byte // until it is taken
	once sync.Once
}

func newLate(m *machine, kind pipe.Kind, before func(pipe.Header) bool) *late {
	return &late{machine: m, kind: kind, before: before, came: make(chan struct{})}
}

func (l *late) Send(ctx context.Context, data []byte) error {
	r, err := pipe.Parse(data)
	if err != nil {
		return err
	}
	keep := false
	if r.Header.Kind == l.kind {
		l.once.Do(func() { keep = true })
	}
	if keep {
		l.mu.Lock()
		l.kept = data
		l.mu.Unlock()
		close(l.came)
		return nil
	}
	if l.before != nil && l.before(*r.Header) {
		if err := l.take(ctx); err != nil {
			return err
		}
	}
	return l.machine.Send(ctx, data)
}

// take has the machine read what was kept.
func (l *late) take(ctx context.Context) error {
	l.mu.Lock()
	data := l.kept
	l.kept = nil
	l.mu.Unlock()
	if data == nil {
		return nil
	}
	return l.machine.Send(ctx, data)
}

// sent is a bench whose daemon was stopped when it had sent a job, and whose VM
// takes that request in front of the one that before names.
func sent(t *testing.T, before func(pipe.Header) bool) (b *bench, vm *late, id job.ID, start func() (stop func())) {
	t.Helper()
	b = newBench(t)
	b.cfg.AnswerTimeout = time.Hour
	b.vm.hold = true
	id = b.add("hello")
	vm = newLate(b.vm, pipe.KindJob, before)
	start = func() (stop func()) {
		d := New(b.cfg, b.unsettled())
		d.Add(vm)
		return b.start(d)
	}
	stop := start()
	<-vm.came
	stop()
	return b, vm, id, start
}

// A request was given up in doubt, and the VM takes it all the same: what it
// makes of it is ended there, so that it keeps no slot, and the next attempt
// goes on.
func TestGivenUpAndAcceptedAllTheSame(t *testing.T) {
	for name, unread := range map[string]bool{
		"after the next attempt":                  false,
		"before it is told, and nobody read that": true,
	} {
		t.Run(name, func(t *testing.T) {
			b, vm, id, start := sent(t, func(h pipe.Header) bool { return unread && h.Kind != pipe.KindJob && h.Attempt == 1 })
			key := fmt.Sprintf("job/%s/1", id)
			if unread {
				b.hole = func(e pipe.Entry) bool {
					return e.Event.Accepted != nil && e.Event.Accepted.Request == key || e.Event.Attempt == 1 && e.Event.Finished == nil
				}
			}
			// The hello that is read again doesn't list it.
			b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
			stop := start()
			defer stop()
			b.until(id, "running again", func(j job.Job) bool { return j.State == job.Running && j.Attempt == 2 })
			if !unread {
				b.set(func(m *machine) { delete(m.forgotten, key) }) // what it didn't have
				if err := vm.take(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			b.wait("end of the first attempt", func() (over bool) {
				b.set(func(m *machine) { over = m.runs[key] == 1 && !m.held[key] && m.forgotten[key] })
				return over
			})
			b.set(func(m *machine) { m.end(string(id), 2) })
			if j := b.settled(id); j.State != job.Done || j.Attempt != 2 {
				t.Errorf("%s after %d attempts", j.State, j.Attempt)
			}
			b.onlyOnce()
		})
	}
}

// Cancelled while the VM is told that the attempt was given up, a job ends.
func TestGivenUpAndCancelled(t *testing.T) {
	for name, answer := range map[string]pipe.Event{
		"taken":    {Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{}},
		"refused":  {Type: pipe.TypeRefused, Refused: &pipe.Refused{Reason: pipe.ReasonInternal, Retryable: true}},
		"not read": {Type: pipe.TypeRefused, Refused: &pipe.Refused{Reason: pipe.ReasonMalformed}},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.AnswerTimeout = 10_000 * time.Hour
			id := b.add("hello")
			key := fmt.Sprintf("cancel/%s/1", id)
			vm := newLate(b.vm, pipe.KindJob, nil)
			start := func() (d *Dispatcher, stop func()) {
				d = New(b.cfg, b.unsettled())
				d.Add(vm)
				return d, b.start(d)
			}
			_, stop := start()
			<-vm.came
			stop()
			b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
			b.cfg.Room = func() string { return "room on the disk" } // for a next attempt
			b.vm.silent = pipe.KindCancel
			d, stop := start()
			defer stop()
			b.wait("request to end it", func() (asked bool) {
				b.set(func(m *machine) { asked = m.cancels[fmt.Sprintf("job/%s/1", id)] == 1 })
				return asked
			})
			b.cancel(d, id)
			b.set(func(m *machine) {
				m.silent = ""
				switch {
				case answer.Accepted != nil:
					answer.Accepted.Request = key
				case answer.Refused.Reason != pipe.ReasonMalformed:
					answer.Refused.Request = key
				}
				m.say(answer)
			})
			j := b.until(id, "settled", func(j job.Job) bool {
				b.skew.Add(int64(maxPause)) // as long as a refusal puts off
				return j.Settled()
			})
			if j.State != job.Cancelled || j.Attempt != 1 {
				t.Errorf("%s after %d attempts", j.State, j.Attempt)
			}
			b.set(func(m *machine) {
				if n := m.cancels[fmt.Sprintf("job/%s/1", id)]; n > 3 {
					t.Errorf("told to end %d times", n)
				}
			})
		})
	}
}

// The VM takes it when its job has long been done, by the next attempt: it is
// ended then, and not only when the VM boots.
func TestGivenUpAndAcceptedWhenAllWasOver(t *testing.T) {
	for name, away := range map[string]bool{"while the daemon runs": false, "while it is away": true} {
		t.Run(name, func(t *testing.T) {
			b, vm, id, start := sent(t, nil)
			key := fmt.Sprintf("job/%s/1", id)
			// The hello that is read again doesn't list it.
			b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
			stop := start()
			b.until(id, "running again", func(j job.Job) bool { return j.State == job.Running && j.Attempt == 2 })
			b.set(func(m *machine) { m.end(string(id), 2) })
			if j := b.settled(id); j.State != job.Done || j.Attempt != 2 {
				t.Errorf("%s after %d attempts", j.State, j.Attempt)
			}
			if away {
				stop()
			}
			b.set(func(m *machine) { delete(m.forgotten, key) }) // what it didn't have
			if err := vm.take(t.Context()); err != nil {
				t.Fatal(err)
			}
			if away {
				b.cfg.Store = b.store
				stop = start()
			}
			defer stop()
			b.wait("end of the first attempt", func() (over bool) {
				b.set(func(m *machine) { over = m.runs[key] == 1 && !m.held[key] && m.forgotten[key] })
				return over
			})
			b.onlyOnce()
		})
	}
}

// A VM that runs an attempt whose outcome is on record, however it came to
// that, is told to end it, and forgets it then.
func TestAcknowledgedButRunning(t *testing.T) {
	b := newBench(t)
	var once sync.Once
	b.vm.beforeEnd = func(id string, attempt int) {
		once.Do(func() { b.vm.held[fmt.Sprintf("job/%s/%d", id, attempt)] = true })
	}
	id := b.add("hello")
	key := fmt.Sprintf("job/%s/1", id)
	d := New(b.cfg, b.unsettled())
	d.Add(b.vm)
	stop := b.start(d)
	defer stop()
	b.wait("VM that has forgotten it", func() bool {
		b.skew.Add(int64(maxPause)) // as long as a refusal puts off
		return b.vm.forgot(key)
	})
	b.set(func(m *machine) {
		if m.cancels[key] < 1 || m.runs[key] != 1 || m.held[key] {
			t.Errorf("told to end %d times, ran %d times, runs %t", m.cancels[key], m.runs[key], m.held[key])
		}
	})
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s after %d attempts", j.State, j.Attempt)
	}
	b.onlyOnce()
}

// What was said before is gone, and the VM is slow to tell it again: a job
// that is sent meanwhile is none of those whose answer can be among it, though
// the hello comes in front of its answer.
func TestSentBeforeTheRepetition(t *testing.T) {
	b := newBench(t)
	b.cfg.Gone = errors.New("gone")
	b.cfg.AnswerTimeout = time.Hour
	vm := newLate(b.vm, pipe.KindRepeat, func(h pipe.Header) bool { return h.Kind == pipe.KindJob })
	d := New(b.cfg, b.unsettled())
	d.Add(vm)
	stop := b.start(d)
	defer stop()
	b.wait("hello", func() bool { return b.vm.stored().Offset > 0 })
	p, err := d.Position(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Damaged(t.Context(), "vm", p, fmt.Errorf("read the events: %w", b.cfg.Gone)); err != nil {
		t.Fatal(err)
	}
	<-vm.came
	b.skew.Add(int64(b.cfg.AnswerTimeout)) // unanswered, it lets others pass
	id := b.add2(d, "hello")
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s after %d attempts, story %v", j.State, j.Attempt, story(j))
	}
	b.set(func(m *machine) {
		if len(m.repeats) != 1 {
			t.Errorf("repeated at %v: nothing is tested", m.repeats)
		}
	})
	b.onlyOnce()
}
