package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func (b *bench) cancel(d *Dispatcher, id job.ID) job.Job {
	b.t.Helper()
	j, err := d.Cancel(b.t.Context(), id, "not wanted")
	if err != nil {
		b.t.Fatalf("cancel: %v", err)
	}
	return j
}

// set changes the machine between two requests.
func (b *bench) set(change func(m *machine)) {
	b.vm.mu.Lock()
	defer b.vm.mu.Unlock()
	change(b.vm)
}

func (b *bench) wantCancelled(id job.ID, runs int) job.Job {
	b.t.Helper()
	j := b.settled(id)
	if j.State != job.Cancelled || j.Result == nil || j.Result.Status != pipe.StatusCancelled || j.Result.Reason != "not wanted" {
		b.t.Errorf("%s, result %+v", j.State, j.Result)
	}
	if b.published[id] != 1 {
		b.t.Errorf("published %d times", b.published[id])
	}
	b.set(func(m *machine) {
		total := 0
		for key, n := range m.runs {
			if _, of, _ := splitKey(key); of == id {
				total += n
			}
			if n > 1 {
				b.t.Errorf("%s ran %d times", key, n)
			}
		}
		if total > runs {
			b.t.Errorf("ran %d times, want at most %d", total, runs)
		}
	})
	return j
}

func TestCancelWaiting(t *testing.T) {
	b := newBench(t)
	b.vm.hold, b.vm.slots = true, 1
	b.vm.events = nil
	b.vm.hello()
	first, second := b.add("first"), b.add("second")
	d, stop := b.run()
	defer stop()
	b.running(first)
	if j := b.cancel(d, second); j.State != job.Collecting || j.Cancel == nil {
		t.Errorf("%s, wish %v", j.State, j.Cancel)
	}
	j := b.wantCancelled(second, 0)
	want := []job.Event{job.Created, job.Finished, job.PublishedCancelled}
	if diff := cmp.Diff(want, story(j)); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	b.cancel(d, first)
	b.wantCancelled(first, 1)
}

// The wish is on record before the VM is told, and what the VM then says is
// the outcome.
func TestCancelRunning(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	b.vm.onCancel = func(id job.ID) {
		if j, err := b.store.Get(t.Context(), id); err != nil || j.Cancel == nil {
			t.Errorf("the VM was told before it was on record: %+v, %v", j, err)
		}
	}
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.running(id)
	if j := b.cancel(d, id); j.State != job.Running || j.Cancel == nil {
		t.Errorf("%s, wish %v", j.State, j.Cancel)
	}
	b.cancel(d, id) // a repeat changes nothing
	j := b.wantCancelled(id, 1)
	want := []job.Event{job.Created, job.Claimed, job.Accepted, job.CancelAsked, job.Finished, job.PublishedCancelled}
	if diff := cmp.Diff(want, story(j)); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	if b.logs[id] != "first\nend\n" {
		t.Errorf("build.log %q", b.logs[id])
	}
}

// Its request lies in the VM, unanswered.
func TestCancelSending(t *testing.T) {
	b := newBench(t)
	b.vm.hold, b.vm.mute = true, 1
	b.cfg.AnswerTimeout = time.Hour
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.wait("request in the VM", func() (sent bool) {
		b.set(func(m *machine) { sent = len(m.spool) > 0 })
		return sent
	})
	if j := b.cancel(d, id); j.State != job.Sending || j.Cancel == nil {
		t.Errorf("%s, wish %v", j.State, j.Cancel)
	}
	b.skew.Store(int64(2 * time.Hour)) // it is written again
	b.wantCancelled(id, 1)
}

// Its request was never written, since its inputs are still on their way: it
// ends at once, and so does the upload.
func TestCancelUploading(t *testing.T) {
	b := newBench(t)
	ended := make(chan struct{})
	began := make(chan struct{})
	vm := &slowUpload{machine: b.vm, began: began, ended: ended}
	id := b.add("hello")
	j, err := b.store.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	j.Inputs = &job.Inputs{SHA256: strings.Repeat("0", 64), Size: 1}
	if _, err := b.store.Update(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	d := New(b.cfg, b.unsettled())
	d.Add(vm)
	stop := b.start(d)
	defer stop()
	<-began
	if j := b.cancel(d, id); j.State != job.Collecting {
		t.Errorf("%s", j.State)
	}
	<-ended
	b.wantCancelled(id, 0)
}

type slowUpload struct {
	*machine
	began, ended chan struct{}
}

func (s *slowUpload) Upload(ctx context.Context, _ string, _ int64, _ bool, _ func(io.Writer) error) error {
	close(s.began)
	<-ctx.Done()
	close(s.ended)
	return ctx.Err()
}

// Started again, nobody knows whether the request was written: the VM's answer
// tells. It was not, so the VM lacks its inputs, which are not uploaded for it.
func TestCancelSendingAfterARestart(t *testing.T) {
	b := newBench(t)
	vm := &slowUpload{machine: b.vm, began: make(chan struct{}), ended: make(chan struct{})}
	id := b.add("hello")
	j, err := b.store.Get(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	j.Inputs = &job.Inputs{SHA256: strings.Repeat("0", 64), Size: 1}
	if _, err := b.store.Update(t.Context(), j); err != nil {
		t.Fatal(err)
	}
	d := New(b.cfg, b.unsettled())
	d.Add(vm)
	stop := b.start(d)
	<-vm.began
	stop()

	down := New(b.cfg, b.unsettled())
	down.Add(b.vm)
	stop = b.startWithoutLink(down)
	if j := b.cancel(down, id); j.State != job.Sending || j.Cancel == nil {
		t.Errorf("%s, wish %v", j.State, j.Cancel)
	}
	stop()
	_, stop = b.run()
	defer stop()
	b.wantCancelled(id, 0)
	if len(b.vm.uploads) > 0 {
		t.Error("its inputs were uploaded")
	}
}

func TestCancelIsRefusedOnceEnded(t *testing.T) {
	b := newBench(t)
	b.failing = slices.Repeat([]error{errors.New("disk full")}, 1)
	b.cfg.RetryAfter = time.Hour
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.until(id, "not to be published", func(j job.Job) bool { return j.State == job.Collecting && j.Why != "" })
	if _, err := d.Cancel(t.Context(), id, ""); !errors.Is(err, ErrEnded) {
		t.Errorf("collecting: %v", err)
	}
	if _, err := d.Prioritize(t.Context(), id, 1); !errors.Is(err, ErrEnded) {
		t.Errorf("collecting: %v", err)
	}
	// Published now, without being built again.
	j, err := d.Retry(t.Context(), id)
	if err != nil || j.State != job.Collecting {
		t.Errorf("retry: %s, %v", j.State, err)
	}
	j = b.settled(id)
	want := []job.Event{job.Created, job.Claimed, job.Accepted, job.Finished, job.RetryAsked, job.PublishedDone}
	if diff := cmp.Diff(want, story(j)); diff != "" || b.vm.ran()["job/"+string(id)+"/1"] != 1 {
		t.Errorf("runs %v, story (-want +got):\n%s", b.vm.ran(), diff)
	}
	b.wait("end of the flight", func() bool {
		_, err := d.Cancel(t.Context(), id, "")
		return errors.Is(err, ErrUnknown)
	})
	if err := d.Probe(t.Context()); err != nil {
		t.Errorf("what was refused stopped it: %v", err)
	}
}

// The job ended before its VM read that it is cancelled: the first outcome
// counts.
func TestCancelComesTooLate(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.running(id)
	b.vm.onCancel = func(job.ID) { b.vm.end(string(id), 1) }
	b.cancel(d, id)
	if j := b.settled(id); j.State != job.Done || j.Cancel == nil {
		t.Errorf("%s, wish %v", j.State, j.Cancel)
	}
}

func TestCancelWhileTheLinkIsDown(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.running(id)
	if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
		t.Fatal(err)
	}
	b.cancel(d, id)
	if err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.set(func(m *machine) {
		if len(m.cancels) > 0 {
			t.Error("the VM was told without a link")
		}
	})
	if err := d.Up(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	b.wantCancelled(id, 1)
}

// The VM dies under a job that is to be cancelled: there is no next attempt.
func TestCancelThenInterrupted(t *testing.T) {
	for name, die := range map[string]func(m *machine, id job.ID){
		"it says so": func(m *machine, id job.ID) {
			m.finish(string(id), 1, pipe.Finished{Status: pipe.StatusInterrupted, Reason: "the VM was reset", LogLength: 10})
		},
		"its disk is gone": func(m *machine, _ job.ID) {
			m.spool, m.held = map[string]string{}, map[string]bool{}
			m.hello()
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.hold = true
			id := b.add("hello")
			d, stop := b.run()
			defer stop()
			b.running(id)
			if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
				t.Fatal(err)
			}
			b.cancel(d, id)
			b.set(func(m *machine) { die(m, id) })
			if err := d.Up(t.Context(), "vm"); err != nil {
				t.Fatal(err)
			}
			if j := b.wantCancelled(id, 1); j.Attempt != 1 {
				t.Errorf("%d attempts", j.Attempt)
			}
		})
	}
}

// Refused for now, cancelled, and then accepted after all, since the request
// was written twice: the VM is told, and forgets it.
func TestCancelDeferred(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Hour
	b.vm.hold = true
	b.vm.refuse = []pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.until(id, "refused", job.Job.Deferred)
	key := "job/" + string(id) + "/1"
	b.set(func(m *machine) {
		m.spool[key] = "whatever"
		m.start(string(id), 1)
	})
	b.cancel(d, id)
	b.wantCancelled(id, 1)
	b.set(func(m *machine) {
		if m.cancels[key] == 0 || m.held[key] || !m.forgotten[key] {
			t.Errorf("told %d times, runs %t, forgotten %t", m.cancels[key], m.held[key], m.forgotten[key])
		}
	})
}

// Refused, the request of a job that is to be cancelled is not written again.
func TestCancelThenRefused(t *testing.T) {
	for _, r := range []pipe.Refused{
		{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"},
		{Reason: pipe.ReasonMalformed, Message: "no"},
		{Reason: pipe.ReasonOwner, OwnedBy: "somebody", Retryable: true, Message: "owned"},
	} {
		t.Run(string(r.Reason), func(t *testing.T) {
			b := newBench(t)
			b.vm.mute = 1
			b.cfg.AnswerTimeout = time.Hour
			b.vm.refuse = []pipe.Refused{r, r} // the first one goes under
			id := b.add("hello")
			d, stop := b.run()
			defer stop()
			b.wait("a refusal", func() (sent bool) {
				b.set(func(m *machine) { sent = len(m.refuse) == 1 })
				return sent
			})
			b.cancel(d, id)
			b.skew.Store(int64(2 * time.Hour))
			b.until(id, "cancelled", func(j job.Job) bool { return j.State == job.Cancelled })
			if len(b.vm.ran()) > 0 {
				t.Errorf("ran: %v", b.vm.ran())
			}
		})
	}
}

// A runner from before there were requests to cancel doesn't hold up the rest.
func TestCancelWithAnOldRunner(t *testing.T) {
	b := newBench(t)
	b.vm.hold, b.vm.oldRunner = true, true
	b.cfg.AnswerTimeout = time.Hour
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.running(id)
	b.cancel(d, id)
	b.set(func(m *machine) { m.hold = false })
	b.settled(b.add2(d, "next"))
	b.set(func(m *machine) { m.oldRunner = false })
	b.skew.Store(int64(2 * maxPause))
	b.wantCancelled(id, 1)
}

// add2 records a job while the dispatcher runs.
func (b *bench) add2(d *Dispatcher, name string) job.ID {
	b.t.Helper()
	id := b.add(name)
	if err := d.Take(b.t.Context(), id); err != nil {
		b.t.Fatal(err)
	}
	return id
}

// A job that is on record, and of which the inbox has not told yet.
func TestAskOfWhatWasNotTaken(t *testing.T) {
	b := newBench(t)
	b.vm.slots = 0
	b.vm.events = nil
	b.vm.hello()
	d, stop := b.run()
	defer stop()
	id := b.add("hello")
	b.cancel(d, id)
	b.wantCancelled(id, 0)
	if _, err := d.Cancel(t.Context(), "no-such-job", ""); !errors.Is(err, ErrUnknown) {
		t.Errorf("no such job: %v", err)
	}
	if err := d.Probe(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPriority(t *testing.T) {
	b := newBench(t)
	b.vm.hold, b.vm.slots = true, 1
	b.vm.events = nil
	b.vm.hello()
	var ids []job.ID
	for i := range 5 {
		ids = append(ids, b.add(fmt.Sprint("job-", i)))
	}
	d, stop := b.run()
	b.running(ids[0])
	for id, n := range map[job.ID]int{ids[4]: 10, ids[2]: 10, ids[1]: -1, ids[0]: 100} {
		j, err := d.Prioritize(t.Context(), id, n)
		if err != nil || j.Priority != n {
			t.Errorf("priority %d, %v", j.Priority, err)
		}
	}
	stop() // it lasts
	_, stop = b.run()
	defer stop()
	for _, id := range []job.ID{ids[0], ids[2], ids[4], ids[3], ids[1]} {
		b.running(id)
		b.set(func(m *machine) { m.end(string(id), 1) })
		b.settled(id)
	}
	j, err := b.store.Get(t.Context(), ids[1])
	if err != nil {
		t.Fatal(err)
	}
	if want := []job.Event{job.Created, job.PriorityChanged, job.Claimed}; !slices.Equal(story(j)[:3], want) || j.History[1].Reason != "from 0 to -1" {
		t.Errorf("story %v, reason %q", story(j), j.History[1].Reason)
	}
}

// What waits to be tried again is tried at once; what runs can't be.
func TestRetryInFlight(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Hour
	b.vm.hold = true
	b.vm.refuse = []pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.until(id, "refused", job.Job.Deferred)
	if _, err := d.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	b.running(id)
	if _, err := d.Retry(t.Context(), id); !errors.Is(err, ErrRunning) {
		t.Errorf("running: %v", err)
	}
	if j, err := b.store.Get(t.Context(), id); err != nil || j.Attempt != 1 {
		t.Errorf("%d attempts, %v", j.Attempt, err)
	}
}

// Damage is fetched again soon, then slowly, then never; a restart hurries
// nothing, a person does.
func TestDamagedFetches(t *testing.T) {
	b := newBench(t)
	const all = quickFetches + slowFetches
	b.failing = slices.Repeat([]error{fmt.Errorf("image: %w", ErrDamaged)}, all)
	id := b.add("hello")
	_, stop := b.run()
	slow := func(n int) func(j job.Job) bool {
		return func(j job.Job) bool { return strings.Contains(j.Why, fmt.Sprintf("try %d of %d", n, all)) }
	}
	b.until(id, "fetched slowly", slow(quickFetches))
	stop()
	d, stop := b.run()
	defer stop()
	if _, err := d.Retry(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	b.until(id, "fetched because of a person", slow(quickFetches+1))
	for n := quickFetches + 2; n < all; n++ {
		b.skew.Add(int64(slowly))
		b.until(id, "fetched after an hour", slow(n))
	}
	b.skew.Add(int64(slowly))
	j := b.settled(id)
	if j.State != job.Failed || !strings.Contains(j.Result.Reason, "could not be fetched") || b.published[id] != 1 {
		t.Errorf("%s, %+v, published %d times", j.State, j.Result, b.published[id])
	}
	if n := damagedFetches(j); n != all {
		t.Errorf("%d fetches are on record, want %d", n, all)
	}
}

// The clock was ahead when damage came, and was put right while the daemon was
// off: no fetch waits longer for it than its pause.
func TestDamagedFetchAfterTheClockWasAhead(t *testing.T) {
	b := newBench(t)
	b.failing = slices.Repeat([]error{fmt.Errorf("image: %w", ErrDamaged)}, quickFetches)
	b.skew.Store(int64(1000 * time.Hour))
	id := b.add("hello")
	_, stop := b.run()
	b.until(id, "fetched slowly", func(j job.Job) bool { return strings.Contains(j.Why, fmt.Sprintf("try %d of", quickFetches)) })
	stop()
	b.skew.Store(0)
	d, stop := b.run()
	defer stop()
	if _, err := d.InFlight(t.Context()); err != nil { // answered once the job is taken up
		t.Fatal(err)
	}
	b.skew.Store(int64(slowly))
	if j := b.settled(id); j.State != job.Done {
		t.Errorf("%s, %+v", j.State, j.Result)
	}
}

// What needs no VM to be published is tried again with pauses, and says why, be
// there a link or not.
func TestPublishWithoutALink(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Hour
	b.failing = slices.Repeat([]error{errors.New("no space left on device")}, 3)
	left := func() int {
		b.mu.Lock()
		defer b.mu.Unlock()
		return len(b.failing)
	}
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	// The next pause counts from when a failure is seen, so the clock must not go on before.
	failed := func(times int) {
		t.Helper()
		b.wait(fmt.Sprint("failure ", times), func() (seen bool) {
			err := d.do(t.Context(), func(context.Context) error {
				seen = d.flights[id].failures == times
				return nil
			})
			return err == nil && seen
		})
	}
	b.until(id, "told why it is not published", func(j job.Job) bool { return j.Why == "to be published: no space left on device" })
	if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
		t.Fatal(err)
	}
	b.skew.Store(int64(maxPause))
	failed(2)
	if n := left(); n != 1 {
		t.Errorf("tried %d times", 3-n)
	}
	b.skew.Store(int64(2 * maxPause))
	failed(3)
	b.skew.Store(int64(3 * maxPause))
	b.until(id, "done", func(j job.Job) bool { return j.State == job.Done })
}

// A job that can't have its VM says so, whatever its state.
func TestWhyItDoesNotMove(t *testing.T) {
	b := newBench(t)
	b.vm.mute, b.vm.hold = 1<<30, true
	b.cfg.AnswerTimeout = 10 * time.Millisecond
	id := b.add("hello")
	d, stop := b.run()
	defer stop()
	b.until(id, "sent", func(j job.Job) bool { return j.State == job.Sending })
	second := b.add2(d, "second")
	b.until(second, "told that the VM is silent", func(j job.Job) bool { return strings.Contains(j.Why, "vm to answer") })
	if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
		t.Fatal(err)
	}
	b.until(id, "told that the link is down", func(j job.Job) bool { return j.Why == "no link to vm: no route" })
	b.set(func(m *machine) {
		m.mute, m.hold = 0, false
		m.end(string(id), 1)
	})
	if err := errors.Join(d.Up(t.Context(), "vm"), d.CaughtUp(t.Context(), "vm")); err != nil {
		t.Fatal(err)
	}
	for _, id := range []job.ID{id, second} {
		if j := b.settled(id); j.Why != "" {
			t.Errorf("%s, and waits for %q", j.State, j.Why)
		}
	}
}

// Cancelled at random moments and stopped at random moments, with answers lost
// now and then: one outcome, no attempt twice, nothing left in the VM.
func TestCancelsAndStopsAtRandom(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			b := newBench(t)
			b.vm.hold = true
			b.cfg.AnswerTimeout = 10 * time.Millisecond
			var ids, wished []job.ID
			for i := range 8 {
				ids = append(ids, b.add(fmt.Sprint("job-", i)))
			}
			for rounds := 0; len(b.unsettled()) > 0; rounds++ {
				if rounds > 500 {
					t.Fatal("no end in sight")
				}
				b.set(func(m *machine) { m.mute = random.IntN(3) })
				d, stop := b.run()
				for range 2 {
					<-time.After(time.Duration(random.IntN(10)) * time.Millisecond)
					id := ids[random.IntN(len(ids))]
					switch _, err := d.Cancel(t.Context(), id, "not wanted"); {
					case err == nil:
						wished = append(wished, id)
					case !errors.Is(err, ErrEnded) && !errors.Is(err, ErrUnknown):
						t.Error(err)
					}
				}
				if random.IntN(4) == 0 {
					b.set(func(m *machine) {
						for key := range m.held {
							_, id, attempt := splitKey(key)
							status := pipe.StatusSucceeded
							if random.IntN(2) == 0 {
								status = pipe.StatusInterrupted
							}
							m.finish(string(id), attempt, pipe.Finished{Status: status, LogLength: 10})
							break
						}
					})
				}
				stop()
			}
			for _, id := range ids {
				j := b.settled(id)
				switch {
				case b.published[id] == 0:
					t.Errorf("%s was never published", id)
				case j.Cancel == nil && slices.Contains(wished, id):
					t.Errorf("%s lost the wish", id)
				case j.State == job.Done && j.Result.Status == pipe.StatusSucceeded:
				case j.State == job.Failed && j.Result.Status == pipe.StatusInterrupted && j.Cancel == nil:
				case j.State == job.Cancelled && j.Result.Status == pipe.StatusCancelled && j.Cancel != nil:
				default:
					t.Errorf("%s: %s, %+v, wish %v", id, j.State, j.Result, j.Cancel)
				}
			}
			b.set(func(m *machine) {
				for key, n := range m.runs {
					if n > 1 || !m.forgotten[key] && m.held[key] {
						t.Errorf("%s: ran %d times, forgotten %t, runs on %t", key, n, m.forgotten[key], m.held[key])
					}
				}
			})
		})
	}
}

// without takes the builder out of the Compose project: a dispatcher that
// doesn't know it.
func (b *bench) without() (d *Dispatcher, stop func()) {
	b.t.Helper()
	d = New(b.cfg, b.unsettled())
	return d, b.startWithoutLink(d)
}

// ended waits until a job is cancelled, as far as it can be without its VM.
func (b *bench) ended(id job.ID) job.Job {
	b.t.Helper()
	j := b.until(id, "cancelled", func(j job.Job) bool { return j.State == job.Cancelled })
	if j.Result.Status != pipe.StatusCancelled || j.Result.Reason != "not wanted" || j.Why != "" || b.published[id] != 1 {
		b.t.Errorf("result %+v, waits for %q, published %d times", j.Result, j.Why, b.published[id])
	}
	return j
}

// The job's builder left the Compose project: cancelled, the job ends at once.
// Should the builder come back, it is told, and forgets the job.
func TestCancelWithoutTheBuilder(t *testing.T) {
	for name, sent := range map[string]bool{"running": false, "sending": true} {
		for _, before := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, asked before it left %t", name, before), func(t *testing.T) {
				b := newBench(t)
				b.vm.hold = true
				if sent {
					b.vm.mute = 1 << 30
				}
				b.cfg.AnswerTimeout = time.Hour
				id := b.add("hello")
				d, stop := b.run()
				b.wait("request in the VM", func() (there bool) {
					b.set(func(m *machine) { there = len(m.spool) > 0 })
					return there
				})
				if !sent {
					b.running(id)
				}
				if before {
					if err := d.Down(t.Context(), "vm", errors.New("no route")); err != nil {
						t.Fatal(err)
					}
					b.cancel(d, id)
				}
				stop()
				d, stop = b.without()
				if !before {
					if j := b.cancel(d, id); j.State != job.Collecting {
						t.Errorf("%s", j.State)
					}
				}
				if j := b.ended(id); j.Settled() {
					t.Error("settled, though its VM has it")
				}
				stop()
				b.set(func(m *machine) { m.mute = 0 })
				b.cfg.AnswerTimeout = 100 * time.Millisecond
				_, stop = b.run()
				defer stop()
				b.wantCancelled(id, 1)
				b.set(func(m *machine) {
					if key := "job/" + string(id) + "/1"; m.held[key] || !m.forgotten[key] {
						t.Errorf("runs on %t, forgotten %t", m.held[key], m.forgotten[key])
					}
				})
			})
		}
	}
}

// Its artifacts lie in a VM that left the Compose project: it can be given up.
func TestCancelUnreachableArtifacts(t *testing.T) {
	for name, before := range map[string]bool{"not asked before": false, "asked too late before": true} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.RetryAfter = time.Hour
			b.failing = []error{errors.New("disk full")}
			b.vm.hold = true
			id := b.add("hello")
			d, stop := b.run()
			b.running(id)
			end := func() {
				b.vm.say(pipe.Event{Type: pipe.TypeArtifact, Job: string(id), Attempt: 1, Artifact: &pipe.Artifact{Name: "a", SHA256: strings.Repeat("0", 64)}})
				b.vm.end(string(id), 1)
			}
			if before {
				b.vm.onCancel = func(job.ID) { end() }
				b.cancel(d, id)
			} else {
				b.set(func(*machine) { end() })
			}
			b.until(id, "not to be published", func(j job.Job) bool { return j.State == job.Collecting && j.Why != "" })
			if _, err := d.Cancel(t.Context(), id, ""); !errors.Is(err, ErrEnded) {
				t.Errorf("its VM is there, and its artifacts are given up: %v", err)
			}
			stop()
			d, stop = b.without()
			defer stop()
			b.until(id, "told why it waits", func(j job.Job) bool { return strings.Contains(j.Why, "no longer has") })
			b.cancel(d, id)
			if j := b.ended(id); len(j.Artifacts) > 0 {
				t.Errorf("artifacts %v", j.Artifacts)
			}
		})
	}
}
