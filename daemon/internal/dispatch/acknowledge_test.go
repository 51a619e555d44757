package dispatch

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"osbuilder/daemon/internal/job"
)

var errNoRecord = errors.New("not found")

// losing is a store that has lost the record of a job.
type losing struct {
	Store
	id job.ID
}

func (s losing) Get(ctx context.Context, id job.ID) (job.Job, error) {
	if id == s.id {
		return job.Job{}, errNoRecord
	}
	return s.Store.Get(ctx, id)
}

// lose has the record of a job lost, and returns those that are left.
func (b *bench) lose(id job.ID) (left []job.Job) {
	b.t.Helper()
	b.cfg.Store, b.cfg.NotFound = losing{b.store, id}, errNoRecord
	b.cfg.Begun = func(j job.Job) bool { return j.ID == id }
	for _, j := range b.unsettled() {
		if j.ID != id {
			left = append(left, j)
		}
	}
	return left
}

// The VM has a job whose record is lost. It is ended there, whatever it does,
// and forgotten when it has ended; once, though the sidecar is started again.
func TestRecordLost(t *testing.T) {
	for name, tt := range map[string]struct {
		ended     bool
		oldRunner bool
	}{
		"it runs":  {},
		"it ended": {ended: true},
		"it can't be cancelled, and ends by itself": {oldRunner: true},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.hold = true
			id := b.add("orphan")
			_, stop := b.run()
			b.running(id)
			stop()
			key := fmt.Sprintf("job/%s/1", id)
			b.set(func(m *machine) {
				m.hold, m.oldRunner = false, tt.oldRunner
				if tt.ended {
					m.end(string(id), 1)
				}
				m.hello()
			})
			left := b.lose(id)
			logs := b.observe()
			start := func() (d *Dispatcher, stop func()) {
				d = New(b.cfg, left)
				d.Add(b.vm)
				return d, b.start(d)
			}
			_, stop = start()
			if tt.oldRunner {
				b.wait("refusal to forget it", func() bool { return logs.FilterMessageSnippet("nobody waits for").Len() > 0 })
				b.set(func(m *machine) { m.end(string(id), 1) })
			}
			b.wait("end of it", func() (over bool) {
				b.set(func(m *machine) { over = m.forgotten[key] && !m.held[key] })
				return over
			})
			b.set(func(m *machine) {
				if m.cancels[key] != 1 && !tt.oldRunner {
					t.Errorf("cancelled %d times", m.cancels[key])
				}
			})
			b.wait("checkpoint that lists it no more", func() bool {
				c, err := b.store.Checkpoint(t.Context(), "vm")
				return err == nil && len(c.Hello.Jobs) == 0
			})
			stop()
			d, stop := start()
			defer stop()
			b.wait("all to be read again", func() (read bool) {
				err := d.do(t.Context(), func(context.Context) error {
					read = d.workers["vm"].caughtUp
					return nil
				})
				return err == nil && read
			})
			if n := logs.FilterMessageSnippet("whose record is lost").Len(); n != 1 {
				t.Errorf("%d lines about it", n)
			}
		})
	}
}

// Stopped between the two requests, it goes on with them.
func TestRecordLostAndStopped(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("orphan")
	_, stop := b.run()
	b.running(id)
	stop()
	key := fmt.Sprintf("job/%s/1", id)
	b.set(func(m *machine) {
		m.hello()
		m.mute = 1 // the answer to the request to cancel
	})
	left := b.lose(id)
	b.cfg.AnswerTimeout = time.Hour
	start := func() (stop func()) {
		d := New(b.cfg, left)
		d.Add(b.vm)
		return b.start(d)
	}
	stop = start()
	b.wait("end of it", func() (over bool) {
		b.set(func(m *machine) { over = m.cancels[key] == 1 && !m.held[key] })
		return over
	})
	stop()
	stop = start()
	defer stop()
	b.wait("it to be forgotten", func() (over bool) {
		b.set(func(m *machine) { over = m.forgotten[key] })
		return over
	})
}

// An attempt that a job has left behind, and that runs all the same, is ended,
// too.
func TestLeftBehind(t *testing.T) {
	b, _ := newRestored(t)
	b.vm.hold, b.vm.owner = true, "me"
	id := b.add("hello")
	b.set(func(m *machine) {
		m.spool["job/"+string(id)+"/1"] = "whatever"
		m.start(string(id), 1)
	})
	j, err := b.store.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	j.Attempt, j.Builder = 1, "vm"
	if _, err := b.store.Update(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	b.fromACopy(id)
	d := New(b.cfg, b.unsettled())
	d.Add(b.vm)
	stop := b.startWithoutLink(d)
	if _, err := d.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	stop()
	b.set(func(m *machine) { m.hello() })
	_, stop = b.run()
	defer stop()
	next := fmt.Sprintf("job/%s/%d", id, untouched+1)
	b.wait("end of the first, and start of the next", func() (over bool) {
		b.set(func(m *machine) {
			first := "job/" + string(id) + "/1"
			over = m.cancels[first] > 0 && m.forgotten[first] && m.held[next]
		})
		return over
	})
	b.set(func(m *machine) { m.end(string(id), untouched+1) })
	if j := b.settled(id); j.State != job.Done {
		t.Errorf("%s", j.State)
	}
	b.onlyOnce()
}
