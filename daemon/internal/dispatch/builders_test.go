package dispatch

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"osbuilder/daemon/internal/buildlog"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// A pair is a bench with a second builder, "other".
type pair struct {
	*bench
	other    *machine
	outcomes map[job.ID]Outcome
}

func newPair(t *testing.T) *pair {
	b, outcomes := newRestored(t)
	p := &pair{b, newMachine(), outcomes}
	p.other.stored = func() pipe.Position {
		c, err := b.store.Checkpoint(context.WithoutCancel(t.Context()), "other")
		if err != nil {
			t.Errorf("read the checkpoint: %v", err)
		}
		return c.Position
	}
	return p
}

// begin starts a dispatcher that knows both, without a link to either.
func (p *pair) begin() (d *Dispatcher, stop func()) {
	p.t.Helper()
	d = New(p.cfg, p.unsettled())
	d.Add(p.vm)
	d.Add(named{p.other, "other"})
	return d, p.startWithoutLink(d)
}

// link links it to one of them; the returned function ends that.
func (p *pair) link(d *Dispatcher, name string) (down func()) {
	m := p.vm
	if name == "other" {
		m = p.other
	}
	return p.linked(d, name, func(ctx context.Context, d *Dispatcher) error { return p.linkTo(ctx, d, m, name) })
}

// waitsFor waits until a job says that it waits for the word of that one alone.
func (p *pair) waitsFor(id job.ID, name string) job.Job {
	p.t.Helper()
	return p.until(id, "told whom it waits for", func(j job.Job) bool {
		return strings.HasPrefix(j.Why, name+" (no link to "+name+" yet) to say what it has of it")
	})
}

// has gives a machine an attempt of a job, which runs, or has ended.
func has(m *machine, id job.ID, attempt int, ended bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.owner, m.hold = "me", !ended
	m.spool[fmt.Sprintf("job/%s/%d", id, attempt)] = "whatever"
	m.start(string(id), attempt)
}

// Two builders have attempts of a job, whose record comes from a copy: whoever
// is heard first, it goes on with the highest one, and the other one is ended.
func TestRestoredJobIsFoundInTwoVMs(t *testing.T) {
	for _, highest := range []string{"vm", "other"} {
		for _, first := range []string{"vm", "other"} {
			for _, ended := range []bool{false, true} {
				for _, stopped := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s has the highest, ended %t, %s is heard first, stopped %t", highest, ended, first, stopped), func(t *testing.T) {
						p := newPair(t)
						id := p.add("hello")
						p.fromACopy(id)
						high, low := p.vm, p.other
						if highest == "other" {
							high, low = low, high
						}
						has(high, id, 2, ended)
						has(low, id, 1, false)
						second := map[string]string{"vm": "other", "other": "vm"}[first]

						d, stop := p.begin()
						down := p.link(d, first)
						j := p.waitsFor(id, second)
						if j.State != job.Queued || !j.Restored || !strings.Contains(j.Why, "osbuilder retry goes on without") {
							t.Errorf("%s, waits for %q", j.State, j.Why)
						}
						if stopped { // nobody is there to repeat when it is decided
							down()
						}
						downToo := p.link(d, second)
						p.until(id, "found", func(j job.Job) bool { return !j.Restored })
						if stopped {
							downToo()
							stop()
							d, stop = p.begin()
							down, downToo = p.link(d, first), p.link(d, second)
						}
						defer stop()
						defer down()
						defer downToo()
						if !ended {
							p.running(id)
							high.mu.Lock()
							high.end(string(id), 2)
							high.mu.Unlock()
						}
						if j := p.settled(id); j.State != job.Done || j.Attempt != 2 || j.Builder != highest || p.logs[id] != "first\nend\n" {
							t.Errorf("%s, attempt %d on %s, log %q", j.State, j.Attempt, j.Builder, p.logs[id])
						}
						p.wait("end of the other attempt", func() bool {
							low.mu.Lock()
							defer low.mu.Unlock()
							key := fmt.Sprintf("job/%s/1", id)
							return low.forgotten[key] && !low.held[key]
						})
						p.onlyOnce()
						low.mu.Lock()
						defer low.mu.Unlock()
						if len(low.runs) != 1 {
							t.Errorf("the other one ran %v", low.runs)
						}
					})
				}
			}
		}
	}
}

// A builder that is never heard holds a job up only until a person lets it go,
// as an attempt that no builder can have.
func TestRestoredJobAndASilentVM(t *testing.T) {
	for name, cancelled := range map[string]bool{"retried": false, "cancelled and retried": true} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			id := p.add("hello")
			j, err := p.store.Get(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			j.Attempt, j.Builder = 1, "other"
			if _, err := p.store.Update(t.Context(), j); err != nil {
				t.Fatal(err)
			}
			log, err := buildlog.Open(p.state, id, job.Mark{}, nil)
			if err == nil {
				err = log.Close()
			}
			if err != nil {
				t.Fatal(err)
			}
			p.fromACopy(id)
			d, stop := p.begin()
			defer stop()
			defer p.link(d, "vm")()
			p.waitsFor(id, "other")
			if cancelled {
				p.cancel(d, id)
			}
			if _, err := d.Retry(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			if cancelled {
				p.ended(id)
				return
			}
			if j := p.settled(id); j.State != job.Done || j.Attempt != untouched+1 || j.Builder != "vm" {
				t.Errorf("%s, attempt %d on %s", j.State, j.Attempt, j.Builder)
			}
		})
	}
}

// Nobody has it: it is let go when the last one has said so.
func TestRestoredJobThatNeitherHas(t *testing.T) {
	p := newPair(t)
	id := p.add("hello")
	p.fromACopy(id)
	d, stop := p.begin()
	defer stop()
	defer p.link(d, "vm")()
	p.waitsFor(id, "other")
	if j, err := p.store.Get(t.Context(), id); err != nil || j.Attempt != 0 {
		t.Errorf("attempt %d, %v", j.Attempt, err)
	}
	defer p.link(d, "other")()
	if j := p.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s, attempt %d", j.State, j.Attempt)
	}
}

// A job that runs on a builder which the project knows is not another one's,
// too; one whose builder has left the project may be this one's, under another
// name, and is left alone.
func TestTheSameAttemptElsewhere(t *testing.T) {
	for name, tt := range map[string]struct {
		builder string
		ended   bool
	}{
		"the other one runs it":        {"other", true},
		"its builder left the project": {"gone", false},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			id := p.add("hello")
			j, err := p.store.Get(t.Context(), id)
			for _, e := range []job.Event{job.Claimed, job.Accepted} {
				if err == nil {
					j, err = j.Apply(e, p.cfg.Now(), "")
				}
			}
			if err != nil {
				t.Fatal(err)
			}
			j.Attempt, j.Builder = 1, tt.builder
			if _, err := p.store.Update(t.Context(), j); err != nil {
				t.Fatal(err)
			}
			has(p.vm, id, 1, false)
			p.set(func(m *machine) {
				m.hold = false
				m.hello()
			})
			d, stop := p.begin()
			defer stop()
			defer p.link(d, "vm")()
			p.settled(p.add2(d, "next"))
			key := fmt.Sprintf("job/%s/1", id)
			if tt.ended {
				p.wait("end of it", func() (over bool) {
					p.set(func(m *machine) { over = m.forgotten[key] && !m.held[key] })
					return over
				})
				return
			}
			p.set(func(m *machine) {
				if !m.held[key] || m.cancels[key] > 0 {
					t.Errorf("it was ended")
				}
			})
		})
	}
}
