package dispatch

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// another gives the VM another data disk: it knows nothing of what it ran. What
// did run stays counted.
func (m *machine) another(generation pipe.Generation) {
	m.spool, m.held, m.hold = map[string]string{}, map[string]bool{}, false
	m.ended, m.forgotten, m.running = map[string]pipe.Finished{}, map[string]bool{}, 0
	m.events, m.said, m.generation = nil, nil, generation
	m.hello()
}

// unanswered has the VM accept a job's request, and its answer unread.
func (b *bench) unanswered(id job.ID) {
	b.t.Helper()
	b.wait("request in the VM", func() (there bool) {
		b.set(func(m *machine) { there = m.runs[fmt.Sprintf("job/%s/1", id)] > 0 })
		return there
	})
}

// linked links a dispatcher that runs to a VM; the returned function ends
// that.
func (b *bench) linked(d *Dispatcher, name string, link func(context.Context, *Dispatcher) error) (down func()) {
	ctx, cancel := context.WithCancel(b.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- link(ctx, d) }()
	return func() {
		b.t.Helper()
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			b.t.Errorf("link: %v", err)
		}
		if err := d.Down(context.WithoutCancel(b.t.Context()), name, errors.New("no route")); err != nil {
			b.t.Error(err)
		}
	}
}

// The VM accepted an attempt, nobody read that, and its disk was replaced: the
// attempt is not run again by the new one, a next one is.
func TestDiskReplacedBeforeTheAnswer(t *testing.T) {
	for name, tt := range map[string]struct {
		generation pipe.Generation
		restarted  bool
		gone       bool // the link says that what it was to read is not there any more
	}{
		"a blank disk, the sidecar away":    {"1-11111111", true, false},
		"a blank disk, the link down":       {"1-11111111", false, false},
		"a used disk, the sidecar away":     {"7-11111111", true, true},
		"a used disk, the link down":        {"7-11111111", false, true},
		"a used disk, and nothing repeated": {"7-22222222", true, true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.Gone = errors.New("gone")
			b.cfg.AnswerTimeout = time.Hour
			b.vm.hold, b.vm.mute = true, 1
			id := b.add("hello")
			start := func() (d *Dispatcher, stop func()) {
				d = New(b.cfg, b.unsettled())
				d.Add(b.vm)
				return d, b.startWithoutLink(d)
			}
			d, stop := start()
			down := b.linked(d, "vm", b.link)
			b.unanswered(id)
			down()
			if tt.restarted {
				stop()
				d, stop = start()
			}
			defer stop()
			b.set(func(m *machine) {
				m.another(tt.generation)
				m.oldRunner = tt.generation == "7-22222222"
			})
			defer b.linked(d, "vm", func(ctx context.Context, d *Dispatcher) error {
				p, err := d.Position(ctx, "vm")
				if err == nil && tt.gone {
					err = d.Damaged(ctx, "vm", p, fmt.Errorf("generation %s: %w", p.Generation, b.cfg.Gone))
				}
				if err != nil {
					return err
				}
				return b.link(ctx, d)
			})()
			if tt.generation == "7-22222222" {
				// It never tells again: that is said, and a person goes on.
				b.until(id, "told what it waits for", func(j job.Job) bool {
					return j.State == job.Sending && j.Why == "vm to tell again which jobs it has, since its data disk may be another one; osbuilder retry runs it again without"
				})
				if _, err := d.Retry(t.Context(), id); err != nil {
					t.Fatal(err)
				}
			}
			j := b.settled(id)
			if j.State != job.Done || j.Attempt != 2 || j.Interruptions() != 1 {
				t.Errorf("%s after %d attempts, story %v", j.State, j.Attempt, story(j))
			}
			b.onlyOnce()
		})
	}
}

// The disk is the same: the request is written again, and was accepted before.
func TestSameDiskBeforeTheAnswer(t *testing.T) {
	for name, change := range map[string]func(m *machine){
		"as it was":         func(*machine) {},
		"started anew":      func(m *machine) { m.hello() },
		"booted":            func(m *machine) { m.generate() },
		"booted, told late": func(m *machine) { m.generation = "2-00000000"; m.hello() },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.hold, b.vm.mute = true, 1
			b.cfg.AnswerTimeout = time.Hour
			id := b.add("hello")
			_, stop := b.run()
			b.unanswered(id)
			stop()
			b.set(change)
			_, stop = b.run()
			defer stop()
			b.running(id)
			b.set(func(m *machine) { m.end(string(id), 1) })
			if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
				t.Errorf("%s after %d attempts", j.State, j.Attempt)
			}
			b.onlyOnce()
		})
	}
}

// A request that this process did not write can't have run: with another disk
// it is the same attempt.
func TestDiskReplacedBeforeTheRequest(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	b.cfg.RetryAfter = time.Millisecond
	began := make(chan struct{}, 100)
	b.vm.broken = func() error { began <- struct{}{}; return errors.New("no room") }
	id := b.addNixOS("hello", "x86_64-linux")
	d := New(b.cfg, b.unsettled())
	d.Add(b.vm)
	stop := b.startWithoutLink(d)
	defer stop()
	down := b.linked(d, "vm", b.link)
	<-began
	down()
	b.set(func(m *machine) {
		m.broken = nil
		m.another("1-11111111")
	})
	defer b.linked(d, "vm", b.link)()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s after %d attempts", j.State, j.Attempt)
	}
}

// Refused for now, a request that was written twice can have been accepted all
// the same, and the disk be replaced before anybody read that.
func TestDiskReplacedAfterARefusal(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter, b.cfg.AnswerTimeout = time.Hour, time.Hour
	b.vm.refuse = []pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}
	id := b.add("hello")
	_, stop := b.run()
	b.until(id, "refused", job.Job.Deferred)
	stop()
	b.set(func(m *machine) {
		m.start(string(id), 1)
		m.another("1-11111111")
	})
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 2 || j.Interruptions() != 0 {
		t.Errorf("%s after %d attempts, %d interruptions", j.State, j.Attempt, j.Interruptions())
	}
	b.onlyOnce()
}

// A request that is still being written when the link ends is given up: the
// next link may lead to another disk.
func TestWritingEndsWithTheLink(t *testing.T) {
	b := newBench(t)
	b.cfg.AnswerTimeout = time.Hour
	vm := &slowSend{machine: b.vm, began: make(chan struct{}), ended: make(chan error, 1)}
	b.add("hello")
	d := New(b.cfg, b.unsettled())
	d.Add(vm)
	stop := b.start(d)
	defer stop()
	<-vm.began
	if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
		t.Fatal(err)
	}
	if err := <-vm.ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the writing ended with %v", err)
	}
}

type slowSend struct {
	*machine
	began chan struct{}
	ended chan error
}

func (s *slowSend) Send(ctx context.Context, _ []byte) error {
	close(s.began)
	<-ctx.Done()
	s.ended <- ctx.Err()
	return ctx.Err()
}

// No job's request is written before all is read that the VM said before.
func TestNoRequestBeforeAllIsRead(t *testing.T) {
	b := newBench(t)
	d, stop := b.run()
	b.settled(b.add2(d, "first"))
	stop()
	id := b.add("hello")
	d = New(b.cfg, b.unsettled())
	d.Add(b.vm)
	stop = b.startWithoutLink(d)
	defer stop()
	if err := d.Up(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	b.cfg.AnswerTimeout = time.Hour
	b.skew.Store(int64(time.Hour)) // it takes long
	b.until(id, "told what it waits for", func(j job.Job) bool { return j.Why == "all to be read that vm said meanwhile" })
	b.set(func(m *machine) {
		if n := m.runs[fmt.Sprintf("job/%s/1", id)]; n > 0 {
			t.Error("it was sent")
		}
	})
	if err := d.CaughtUp(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	b.unanswered(id)
}
