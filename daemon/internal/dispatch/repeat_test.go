package dispatch

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// observe has what is logged kept.
func (b *bench) observe() *observer.ObservedLogs {
	core, logs := observer.New(zapcore.DebugLevel)
	b.cfg.Log = b.cfg.Log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, core) }))
	return logs
}

const asked = "events of the builder can't be read; it is asked to tell everything again, and nothing is lost"

// Whatever of the events can't be read, noticed by the link or only by what is
// missing: it is told again, once, and the log has every byte.
func TestRepeat(t *testing.T) {
	for name, hidden := range map[string]func(pipe.Event) bool{
		"the start":        func(e pipe.Event) bool { return e.Started != nil },
		"first output":     func(e pipe.Event) bool { return e.Log != nil && e.Log.Offset == 0 },
		"last output":      func(e pipe.Event) bool { return e.Log != nil && e.Log.Offset > 0 },
		"all output":       func(e pipe.Event) bool { return e.Log != nil },
		"the outcome":      func(e pipe.Event) bool { return e.Finished != nil },
		"the answer":       func(e pipe.Event) bool { return e.Accepted != nil && strings.HasPrefix(e.Accepted.Request, "job/") },
		"all but the rest": func(e pipe.Event) bool { return e.Hello == nil && e.Finished == nil },
	} {
		for _, noticed := range []bool{true, false} {
			if !noticed && strings.HasPrefix(name, "the ") {
				continue // nothing shows it but a number that is missing, which the link sees
			}
			t.Run(fmt.Sprintf("%s, noticed %t", name, noticed), func(t *testing.T) {
				b := newBench(t)
				b.cfg.AnswerTimeout = time.Hour // nothing is healed by writing again
				logs := b.observe()
				id := b.add("hello")
				b.noticed = noticed
				b.hole = func(e pipe.Entry) bool { return e.Next.Generation == "1-00000000" && hidden(e.Event) }
				_, stop := b.run()
				defer stop()
				j := b.settled(id)
				if j.State != job.Done || j.Attempt != 1 || b.logs[id] != "first\nend\n" {
					t.Errorf("%s after %d attempts, log %q", j.State, j.Attempt, b.logs[id])
				}
				b.set(func(m *machine) {
					if len(m.repeats) != 1 || m.runs["job/"+string(id)+"/1"] != 1 {
						t.Errorf("asked to repeat at %v, ran %v", m.repeats, m.runs)
					}
				})
				if n := logs.FilterMessage(asked).Len(); n != 1 {
					t.Errorf("%d lines about it", n)
				}
				b.wait("checkpoint without the wish", func() bool {
					c, err := b.store.Checkpoint(t.Context(), "vm")
					return err == nil && c.Repeat == nil
				})
			})
		}
	}
}

// What the VM itself doesn't have any more is not asked for again and again.
func TestRepeatedAndStillMissing(t *testing.T) {
	b := newBench(t)
	b.cfg.AnswerTimeout = time.Hour // or a slow machine has the same asked twice
	b.hole = func(e pipe.Entry) bool { return e.Event.Log != nil && e.Event.Log.Offset == 0 }
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || b.logs[id] != "[osbuilder: 6 bytes of output were lost with the VM]\nend\n" {
		t.Errorf("%s, log %q", j.State, b.logs[id])
	}
	b.set(func(m *machine) {
		if len(m.repeats) > 2 {
			t.Errorf("asked to repeat at %v", m.repeats)
		}
	})
}

// Artifacts that were announced and not named are asked for, and if they are
// not to be had, the job failed.
func TestArtifactsMissing(t *testing.T) {
	for name, everywhere := range map[string]bool{"once": false, "for good": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.outcome = func() pipe.Finished {
				return pipe.Finished{Status: pipe.StatusSucceeded, LogLength: 10, Artifacts: 1}
			}
			id := b.add("hello")
			b.vm.beforeEnd = func(id string, attempt int) {
				b.vm.say(pipe.Event{Type: pipe.TypeArtifact, Job: id, Attempt: attempt, Artifact: &pipe.Artifact{Name: "a", SHA256: strings.Repeat("0", 64)}})
			}
			b.hole = func(e pipe.Entry) bool {
				return e.Event.Artifact != nil && (everywhere || e.Next.Generation == "1-00000000")
			}
			_, stop := b.run()
			defer stop()
			j := b.settled(id)
			if everywhere && (j.State != job.Failed || j.Result.Reason != "the VM named 0 of its 1 artifacts") || !everywhere && (j.State != job.Done || len(j.Artifacts) != 1) {
				t.Errorf("%s, %+v, artifacts %v", j.State, j.Result, j.Artifacts)
			}
		})
	}
}

// That the VM has to repeat outlives the sidecar.
func TestRepeatAfterARestart(t *testing.T) {
	b := newBench(t)
	b.vm.silent = pipe.KindRepeat
	b.vm.hold = true
	id := b.add("hello")
	b.noticed = true
	b.hole = func(e pipe.Entry) bool { return e.Next.Generation == "1-00000000" && e.Event.Log != nil }
	d, stop := b.run()
	b.wait("request to repeat", func() (n bool) {
		b.set(func(m *machine) { n = len(m.repeats) > 0 })
		return n
	})
	b.running(id)
	if err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop()
	c, err := b.store.Checkpoint(t.Context(), "vm")
	if err != nil || c.Repeat == nil || *c.Repeat != b.vm.repeats[0] {
		t.Fatalf("checkpoint %+v, %v; asked at %v", c, err, b.vm.repeats)
	}
	b.set(func(m *machine) {
		m.silent = ""
		m.end(string(id), 1)
	})
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || b.logs[id] != "first\nend\n" {
		t.Errorf("%s, log %q", j.State, b.logs[id])
	}
	b.set(func(m *machine) { // which may still be asked
		for _, at := range m.repeats {
			if at != *c.Repeat {
				t.Errorf("asked at %v, want always the same", m.repeats)
			}
		}
	})
}

// A VM that doesn't answer the request, or can't read it, is not held up by
// it.
func TestRepeatHoldsNobodyUp(t *testing.T) {
	for name, fault := range map[string]func(*machine){
		"silent": func(m *machine) { m.silent = pipe.KindRepeat },
		"old":    func(m *machine) { m.oldRunner = true },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.AnswerTimeout = 20 * time.Millisecond
			fault(b.vm)
			logs := b.observe()
			d, stop := b.run()
			defer stop()
			if err := d.Probe(t.Context()); err != nil {
				t.Fatal(err)
			}
			b.wait("position", func() bool { return b.vm.stored().Offset > 0 })
			for i := range int64(3) { // more damage in one generation is no reason to ask twice
				if err := d.Damaged(t.Context(), "vm", pipe.Position{Generation: "1-00000000", Offset: i + 1}, errors.New("zeros")); err != nil {
					t.Fatal(err)
				}
			}
			if n := logs.FilterMessage(asked).Len(); n != 1 {
				t.Errorf("%d lines about it", n)
			}
			for i := range 3 {
				if j := b.settled(b.add2(d, fmt.Sprint("job-", i))); j.State != job.Done {
					t.Errorf("%s", j.State)
				}
			}
		})
	}
}

// Somebody damages pipe_out again and again: the VM is asked at once, a few
// times, then more slowly, and that is said.
func TestRepeatsSlowDown(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Minute
	logs := b.observe()
	d, stop := b.run()
	defer stop()
	count := func() (n int) {
		b.set(func(m *machine) { n = len(m.repeats) })
		return n
	}
	read := func() (at pipe.Position) {
		t.Helper()
		b.wait("all to be read", func() bool {
			p, err := d.Position(t.Context(), "vm")
			b.set(func(m *machine) { at = pipe.Position{Generation: m.generation, Offset: int64(len(m.events))} })
			return err == nil && p == at
		})
		return at
	}
	harm := func() {
		t.Helper()
		at := read()
		if err := d.Damaged(t.Context(), "vm", at, errors.New("zeros")); err != nil {
			t.Fatal(err)
		}
	}
	for i := range quickRepeats {
		harm()
		b.wait("repetition", func() bool { return count() == i+1 })
	}
	slow := logs.FilterMessageSnippet("again and again")
	if slow.Len() != 0 {
		t.Errorf("said too early: %v", slow.All())
	}
	harm()
	if err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := count(); n != quickRepeats || logs.FilterMessageSnippet("again and again").Len() != 1 {
		t.Errorf("asked %d times", n)
	}
	b.skew.Add(int64(2 * time.Minute))
	b.wait("slow repetition", func() bool { return count() == quickRepeats+1 })
	read() // or the request counts as unanswered, and is written again
	// Quiet for long, the next one is asked for at once.
	b.skew.Add(int64(2 * repeatPause))
	harm()
	b.wait("quick repetition", func() bool { return count() == quickRepeats+2 })
}

// The VM is told what it may forget when much was stored and nothing else has
// to be written, and not twice for the same.
func TestConsume(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	d, stop := b.run()
	b.running(id)
	b.cfg.ConsumeEvery = 20
	stop()
	_, stop = b.run()
	defer stop()
	b.wait("a quiet VM", func() bool { return b.vm.stored().Offset == int64(len(b.vm.events)) })
	count := func() (n int) {
		b.set(func(m *machine) { n = len(m.consumes) })
		return n
	}
	if n := count(); n != 0 {
		t.Errorf("%d requests to consume before there was anything", n)
	}
	for i := range 3 {
		b.set(func(m *machine) {
			for range b.cfg.ConsumeEvery {
				m.say(pipe.Event{Type: pipe.TypeProgress, Job: string(id), Attempt: 1, Progress: &pipe.Progress{Phase: "p", Unit: "u"}})
			}
		})
		b.wait("request to consume", func() bool { return count() == i+1 })
		b.wait("its answer", func() bool {
			b.vm.mu.Lock()
			defer b.vm.mu.Unlock()
			return b.vm.stored().Offset == int64(len(b.vm.events))
		})
		if n := count(); n != i+1 {
			t.Errorf("%d requests, want %d", n, i+1)
		}
	}
	_ = d
}

// damagedStore has lost the checkpoint.
type damagedStore struct {
	Store
	lost bool
}

var errDamagedRecord = errors.New("record is damaged")

func (s *damagedStore) Checkpoint(ctx context.Context, builder string) (job.Checkpoint, error) {
	if s.lost {
		s.lost = false
		return job.Checkpoint{}, fmt.Errorf("read checkpoint: %w", errDamagedRecord)
	}
	return s.Store.Checkpoint(ctx, builder)
}

// The checkpoint is lost: the VM's first hello, older than the job, doesn't
// list it. The job is not run again, and its log is whole.
func TestCheckpointLost(t *testing.T) {
	for name, tt := range map[string]struct {
		before func(b *bench, id job.ID) // while the sidecar is away
		hole   func(pipe.Entry) bool
	}{
		"runs":         {func(*bench, job.ID) {}, nil},
		"ended":        {func(b *bench, id job.ID) { b.set(func(m *machine) { m.end(string(id), 1) }) }, nil},
		"was consumed": {func(*bench, job.ID) {}, func(e pipe.Entry) bool { return e.Next.Generation == "1-00000000" && e.Event.Hello == nil }},
		"the VM was reset": {func(b *bench, _ job.ID) {
			b.set(func(m *machine) { m.generate() })
		}, nil},
	} {
		for _, oneByOne := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, one by one %t", name, oneByOne), func(t *testing.T) {
				b := newBench(t)
				b.vm.hold, b.oneByOne = true, oneByOne
				id := b.add("hello")
				_, stop := b.run()
				b.running(id)
				stop()
				tt.before(b, id)
				b.hole, b.noticed = tt.hole, true
				b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
				_, stop = b.run()
				b.wait("all that was said", func() bool {
					b.vm.mu.Lock()
					defer b.vm.mu.Unlock()
					return b.vm.stored().Offset == int64(len(b.vm.events))
				})
				b.set(func(m *machine) {
					if len(m.ended) == 0 {
						m.end(string(id), 1)
					}
				})
				defer stop()
				j := b.settled(id)
				if j.State != job.Done || j.Attempt != 1 || b.logs[id] != "first\nend\n" || len(b.vm.ran()) != 1 {
					t.Errorf("%s after %d attempts, runs %v, log %q", j.State, j.Attempt, b.vm.ran(), b.logs[id])
				}
			})
		}
	}
}

// The checkpoint is lost, of a job that was refused for now, and of which
// nobody read what came then: what the VM has is not run again beside it.
func TestCheckpointLostAfterARefusal(t *testing.T) {
	for name, tt := range map[string]struct {
		accepted bool // its request, written again
		untold   bool // nothing but its hello can be read, and it never tells again
		want     int  // the attempt that ran
	}{
		"accepted":                      {accepted: true, want: 1},
		"refused":                       {want: 1},
		"a person goes on, not knowing": {untold: true, want: 2},
	} {
		for _, oneByOne := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, one by one %t", name, oneByOne), func(t *testing.T) {
				b := newBench(t)
				b.cfg.RetryAfter, b.cfg.AnswerTimeout = time.Hour, time.Hour
				b.oneByOne = oneByOne
				b.vm.refuse = []pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}
				id := b.add("hello")
				_, stop := b.run()
				b.until(id, "refused", job.Job.Deferred)
				stop()
				b.set(func(m *machine) {
					m.hold, m.oldRunner = true, tt.untold
					if tt.accepted {
						key := fmt.Sprintf("job/%s/1", id)
						m.spool[key] = "whatever"
						m.say(pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: key}})
						m.start(string(id), 1)
					}
				})
				if tt.untold {
					end := int64(len(b.vm.events))
					b.hole = func(e pipe.Entry) bool { return e.Event.Hello == nil && e.Next.Offset <= end }
					b.noticed = true
				}
				b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
				d, stop := b.run()
				defer stop()
				if tt.untold {
					b.until(id, "told what it waits for", func(j job.Job) bool {
						return j.Deferred() && strings.Contains(j.Why, "vm to tell again which jobs it has")
					})
					if _, err := d.Retry(t.Context(), id); err != nil {
						t.Fatal(err)
					}
				}
				b.running(id)
				b.set(func(m *machine) { m.end(string(id), tt.want) })
				j := b.settled(id)
				if j.State != job.Done || j.Attempt != tt.want || len(b.vm.ran()) != 1 {
					t.Errorf("%s after %d attempts, runs %v, story %v", j.State, j.Attempt, b.vm.ran(), story(j))
				}
				b.onlyOnce()
			})
		}
	}
}

// The checkpoint is lost, and the VM's disk too: there is a next attempt,
// though the sidecar is stopped between the hello and the end of what was said.
func TestCheckpointAndDiskLost(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	_, stop := b.run()
	b.running(id)
	stop()
	b.set(func(m *machine) {
		m.spool, m.held, m.hold = map[string]string{}, map[string]bool{}, false
		m.events, m.said, m.generation = nil, nil, "1-11111111"
		m.hello()
	})
	b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
	d := New(b.cfg, b.unsettled())
	d.Add(b.vm)
	stop = b.startWithoutLink(d)
	entries := b.vm.after(t.Context(), 0)
	if err := d.Entries(t.Context(), "vm", entries); err != nil {
		t.Fatal(err)
	}
	stop()
	if c, err := b.store.Checkpoint(t.Context(), "vm"); err != nil || len(c.Missing) != 1 {
		t.Fatalf("checkpoint %+v, %v", c, err)
	}
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 2 {
		t.Errorf("%s after %d attempts", j.State, j.Attempt)
	}
}

// With the checkpoint lost, what lies in the logs of jobs that run no more is
// all there is of them.
func TestCheckpointLostWhileCollecting(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Hour
	b.failing = []error{errors.New("no space left on device")}
	id := b.add("hello")
	_, stop := b.run()
	b.until(id, "to be published", func(j job.Job) bool { return j.State == job.Collecting && strings.Contains(j.Why, "no space") })
	stop()
	b.cfg.Store, b.cfg.Damaged = &damagedStore{b.store, true}, errDamagedRecord
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || b.logs[id] != "first\nend\n" {
		t.Errorf("%s, log %q", j.State, b.logs[id])
	}
}

// The VM lists a job whose answer we never read: nothing is uploaded for it
// again, and nothing written.
func TestListedMeansAccepted(t *testing.T) {
	b := newBench(t)
	b.vm.hold, b.vm.mute = true, 1
	b.cfg.AnswerTimeout = time.Hour
	id := b.add("hello")
	_, stop := b.run()
	b.wait("request in the VM", func() (sent bool) {
		b.set(func(m *machine) { sent = len(m.spool) > 0 })
		return sent
	})
	stop()
	b.set(func(m *machine) {
		m.generation = "2-00000000"
		m.hello()
	})
	_, stop = b.run()
	defer stop()
	j := b.until(id, "running", func(j job.Job) bool { return j.State == job.Running })
	if s := j.History[len(j.History)-1]; s.Reason != "the VM lists it" {
		t.Errorf("story %v", j.History)
	}
	b.set(func(m *machine) { m.end(string(id), 1) })
	b.settled(id)
}

// named is a machine of another name.
type named struct {
	*machine
	name string
}

func (n named) Name() string { return n.name }

// An attempt that its VM interrupted is acknowledged there, though the next
// one runs on another VM, and though the sidecar was stopped before it could.
func TestInterruptedElsewhere(t *testing.T) {
	for name, restarted := range map[string]bool{"at once": false, "after a restart": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.hold = true
			other := newMachine()
			other.stored = func() pipe.Position { return pipe.Position{Generation: "1-00000000", Offset: 1 << 40} }
			id := b.add("hello")
			_, stop := b.run()
			b.running(id)
			stop()

			d := New(b.cfg, b.unsettled())
			d.Add(b.vm)
			d.Add(named{other, "other"})
			both := func(ctx context.Context, d *Dispatcher) error {
				if err := errors.Join(d.Up(ctx, "other"), d.CaughtUp(ctx, "other")); err != nil {
					return err
				}
				for p := int64(0); ctx.Err() == nil; {
					entries := other.after(ctx, p)
					if len(entries) > 0 {
						if err := d.Entries(ctx, "other", entries); err != nil {
							return err
						}
						p += int64(len(entries))
					}
				}
				return nil
			}
			stop = b.startWith(d, both)
			b.set(func(m *machine) {
				m.finish(string(id), 1, pipe.Finished{Status: pipe.StatusInterrupted, Reason: "the VM was reset", LogLength: 10})
				if restarted {
					m.mute = 1 << 30
				}
			})
			// The first VM says so, and its link is gone at once.
			p, err := d.Position(t.Context(), "vm")
			if err != nil {
				t.Fatal(err)
			}
			if !restarted {
				if err := d.Up(t.Context(), "vm"); err != nil {
					t.Fatal(err)
				}
			}
			if err := d.Entries(t.Context(), "vm", b.vm.after(t.Context(), p.Offset)); err != nil {
				t.Fatal(err)
			}
			key := "job/" + string(id) + "/1"
			if restarted {
				b.settled(id)
				stop()
				b.set(func(m *machine) {
					m.mute = 0
					if m.forgotten[key] {
						t.Fatal("forgotten already: nothing is tested")
					}
					m.generate() // its hello lists what it still has
				})
				_, stop = b.run()
			}
			defer stop()
			b.wait("acknowledgement on the first VM", func() (done bool) {
				b.set(func(m *machine) { done = m.forgotten[key] })
				return done
			})
			if !restarted {
				// Which of the two has the next attempt is chance.
				b.set(func(m *machine) {
					for key := range m.held {
						_, id, attempt := splitKey(key)
						m.end(string(id), attempt)
					}
					m.hold = false
				})
			}
		})
	}
}

// Another sidecar's requests are refused by our VM: that is said, and our jobs
// don't wait for it.
func TestStranger(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Hour // a pause would show
	logs := b.observe()
	d, stop := b.run()
	defer stop()
	b.settled(b.add2(d, "first"))
	for i := range 5 {
		b.set(func(m *machine) {
			m.say(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{
				Request: fmt.Sprintf("job/stranger/%d", i+1), Reason: pipe.ReasonOwner, OwnedBy: "me", Message: "owned",
			}})
		})
		b.settled(b.add2(d, fmt.Sprint("job-", i)))
	}
	if n := logs.FilterMessageSnippet("another sidecar writes to this builder").Len(); n != 1 {
		t.Errorf("%d lines about it, want 1", n)
	}
}

// Another sidecar takes the VM over: this one says so, takes back what was not
// accepted, reads on, and doesn't fight, though it was allowed to take over.
func TestTakenOver(t *testing.T) {
	b := newBench(t)
	b.cfg.TakeOver = true
	b.vm.hold = true
	logs := b.observe()
	id := b.add("runs")
	d, stop := b.run()
	defer stop()
	b.running(id)
	b.set(func(m *machine) { m.mute = 1 << 30 })
	b.cfg.AnswerTimeout = time.Hour
	sent := b.add2(d, "sent")
	b.until(sent, "sent", func(j job.Job) bool { return j.State == job.Sending })
	b.set(func(m *machine) {
		m.mute = 0
		delete(m.spool, "job/"+string(sent)+"/1") // overwritten before it was read
		m.owner = "somebody"
		m.say(pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: "take-over/somebody"}})
	})
	j := b.until(sent, "taken back", func(j job.Job) bool { return j.State == job.Queued })
	if !strings.Contains(j.Why, "taken over by somebody") {
		t.Errorf("it waits for %q", j.Why)
	}
	if n := logs.FilterMessageSnippet("was taken over by another sidecar").Len(); n != 1 {
		t.Errorf("%d lines about it, want 1", n)
	}
	b.set(func(m *machine) { m.end(string(id), 1) })
	b.until(id, "done", func(j job.Job) bool { return j.State == job.Done })
	owner := ""
	b.set(func(m *machine) { owner = m.owner })
	if owner != "somebody" || b.vm.forgot("job/"+string(id)+"/1") {
		t.Error("it wrote to a VM that is not its own any more")
	}
	if !slices.Contains(story(j), job.Deferred) {
		t.Errorf("story %v", story(j))
	}
}
