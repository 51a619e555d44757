package dispatch

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"osbuilder/daemon/internal/buildlog"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// fromACopy makes a job's record one of a copy, as the store does when it is
// opened.
func (b *bench) fromACopy(id job.ID) {
	b.t.Helper()
	j, err := b.store.Get(b.t.Context(), id)
	if err == nil {
		j, err = j.Apply(job.Restored, b.cfg.Now(), "from a copy")
	}
	if err != nil {
		b.t.Fatal(err)
	}
	j.Restored = true
	if _, err := b.store.Update(b.t.Context(), j); err != nil {
		b.t.Fatal(err)
	}
}

// newRestored is a bench that knows what lies in output/ and in the state
// folder.
func newRestored(t *testing.T) (b *bench, outcomes map[job.ID]Outcome) {
	b = newBench(t)
	outcomes = make(map[job.ID]Outcome)
	b.cfg.Published = func(j job.Job) (Outcome, bool, error) {
		o, ok := outcomes[j.ID]
		return o, ok, nil
	}
	b.cfg.Begun = func(j job.Job) bool {
		_, err := os.Stat(buildlog.Path(b.state, j.ID))
		return err == nil
	}
	return b, outcomes
}

func (b *bench) onlyOnce() {
	b.t.Helper()
	b.set(func(m *machine) {
		for key, n := range m.runs {
			if n > 1 {
				b.t.Errorf("%s ran %d times", key, n)
			}
		}
	})
}

// What the VM has goes on there, with the attempt that it has, whatever the
// record says.
func TestRestoredJobIsFoundInTheVM(t *testing.T) {
	for _, attempt := range []int{1, 2, 3} {
		for _, recorded := range []int{0, 1} {
			t.Run(fmt.Sprintf("attempt %d, recorded %d", attempt, recorded), func(t *testing.T) {
				b, _ := newRestored(t)
				b.vm.hold = true
				id := b.add("hello")
				j, err := b.store.Get(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if recorded > 0 {
					j.Attempt, j.Builder = recorded, "vm"
					if _, err := b.store.Update(t.Context(), j); err != nil {
						t.Fatal(err)
					}
				}
				b.fromACopy(id)
				b.vm.owner = "me"
				b.set(func(m *machine) {
					m.spool[fmt.Sprintf("job/%s/%d", id, attempt)] = "whatever"
					m.start(string(id), attempt)
				})
				_, stop := b.run()
				defer stop()
				b.running(id)
				b.set(func(m *machine) { m.end(string(id), attempt) })
				j = b.settled(id)
				if j.State != job.Done || j.Attempt != attempt || j.Restored {
					t.Errorf("%s, attempt %d, restored %t", j.State, j.Attempt, j.Restored)
				}
				if !strings.HasSuffix(b.logs[id], "first\nend\n") {
					t.Errorf("build.log %q", b.logs[id])
				}
				b.onlyOnce()
			})
		}
	}
}

// What no VM has runs: as the first attempt if it never was given to one, else
// as an attempt that none can have been.
func TestRestoredJobThatNoVMHas(t *testing.T) {
	for name, tt := range map[string]struct {
		recorded int
		log      bool
		want     int
	}{
		"never begun":                    {0, false, 1},
		"begun, as its log says":         {0, true, untouched + 1},
		"begun, as its record says":      {1, true, untouched + 1},
		"restored, and then once more":   {untouched + 1, true, 2*untouched + 1},
		"begun, and forgotten by the VM": {1, false, untouched + 1},
	} {
		t.Run(name, func(t *testing.T) {
			b, _ := newRestored(t)
			id := b.add("hello")
			j, err := b.store.Get(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			if tt.recorded > 0 {
				j.Attempt, j.Builder = tt.recorded, "vm"
				if _, err := b.store.Update(t.Context(), j); err != nil {
					t.Fatal(err)
				}
			}
			if tt.log {
				w, err := buildlog.Open(b.state, id, job.Mark{}, nil)
				if err == nil {
					err = errors.Join(w.Append(1, pipe.Log{Data: []byte("before\n")}), w.Close())
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			b.fromACopy(id)
			_, stop := b.run()
			defer stop()
			j = b.settled(id)
			if j.State != job.Done || j.Attempt != tt.want || j.Restored {
				t.Errorf("%s, attempt %d, want %d, restored %t", j.State, j.Attempt, tt.want, j.Restored)
			}
			if kept := strings.HasPrefix(b.logs[id], "before\n"); kept != tt.log || !strings.HasSuffix(b.logs[id], "first\nend\n") {
				t.Errorf("build.log %q", b.logs[id])
			}
		})
	}
}

// What is published is not built again, and the VM may forget it.
func TestRestoredJobThatIsPublished(t *testing.T) {
	b, outcomes := newRestored(t)
	id := b.add("hello")
	outcomes[id] = Outcome{Result: pipe.Finished{Status: pipe.StatusSucceeded}, Attempt: 2, Builder: "vm"}
	b.fromACopy(id)
	b.set(func(m *machine) { m.spool["job/"+string(id)+"/2"] = "whatever" })
	w, err := buildlog.Open(b.state, id, job.Mark{}, nil)
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	_, stop := b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 2 || j.Restored {
		t.Errorf("%s, attempt %d, restored %t", j.State, j.Attempt, j.Restored)
	}
	b.set(func(m *machine) {
		if len(m.runs) > 0 || !m.forgotten["job/"+string(id)+"/2"] {
			t.Errorf("runs %v, forgotten %v", m.runs, m.forgotten)
		}
	})
}

// While no VM can be asked it waits, and says for what; others don't wait for
// it. A person can let it go.
func TestRestoredJobWaitsForTheVM(t *testing.T) {
	b, _ := newRestored(t)
	b.vm.silent = pipe.KindRepeat
	b.cfg.AnswerTimeout = bound
	id := b.add("hello")
	b.fromACopy(id)
	d, stop := b.run()
	b.until(id, "told why it waits", func(j job.Job) bool { return strings.Contains(j.Why, "its record comes from a copy") })
	other := b.add2(d, "other")
	stop()
	b.cfg.AnswerTimeout = 50 * time.Millisecond // the request that is never answered lets others pass
	d, stop = b.run()
	defer stop()
	if j, err := d.Retry(t.Context(), id); err != nil || j.Restored {
		t.Errorf("%v, restored %t", err, j.Restored)
	}
	for _, id := range []job.ID{id, other} {
		if j := b.settled(id); j.State != job.Done {
			t.Errorf("%s", j.State)
		}
	}
	b.onlyOnce()
}

// Cancelled before it is known what became of it: whatever that is, it does
// not run on.
func TestCancelRestored(t *testing.T) {
	for name, inVM := range map[string]bool{"the VM has it": true, "no VM has it": false} {
		t.Run(name, func(t *testing.T) {
			b, _ := newRestored(t)
			b.vm.hold, b.vm.owner = true, "me"
			id := b.add("hello")
			b.fromACopy(id)
			runs := 0
			if inVM {
				runs = 1
				b.set(func(m *machine) {
					m.spool["job/"+string(id)+"/2"] = "whatever"
					m.start(string(id), 2)
				})
			}
			d := New(b.cfg, b.unsettled())
			d.Add(b.vm)
			stop := b.startWithoutLink(d)
			if j := b.cancel(d, id); j.State != job.Queued || j.Cancel == nil {
				t.Errorf("%s, wish %v", j.State, j.Cancel)
			}
			stop()
			_, stop = b.run()
			defer stop()
			b.wantCancelled(id, runs)
		})
	}
}
