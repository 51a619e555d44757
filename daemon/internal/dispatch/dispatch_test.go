package dispatch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"osbuilder/daemon/internal/buildlog"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
	"osbuilder/pipe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const bound = 30 * time.Second

// A machine is a VM as the protocol shows it: it reads requests, keeps a
// spool, and appends events. Its faults are switched on by tests. An event's
// offset is its place in the list.
type machine struct {
	mu         sync.Mutex
	changed    chan struct{} // closed and replaced when events grow
	generation pipe.Generation
	owner      string
	slots      int
	events     []pipe.Event
	said       []pipe.Generation // in which each was said
	spool      map[string]string // key of a job's request → digest of its body
	forgotten  map[string]bool   // acknowledged
	runs       map[string]int    // key → executions
	running    int
	mostAtOnce int

	stored   func() pipe.Position // what the other side has on disk
	unstored []pipe.Position      // consumed positions that it had not

	cancels   map[string]int  // key of a job's request → requests to cancel it
	held      map[string]bool // jobs that run and don't end by themselves
	onCancel  func(job.ID)    // called before a request to cancel is looked at
	oldRunner bool            // it has never heard of requests to cancel, to consume or to repeat

	ended    map[string]pipe.Finished // key of a job's request → outcome
	consumes []pipe.Position          // of requests to consume
	repeats  []pipe.Position          // of requests to repeat
	silent   pipe.Kind                // requests of that kind are never answered

	beforeEnd func(id string, attempt int) // says what comes before an outcome

	mute    int            // so many requests are carried out but not answered
	refuse  []pipe.Refused // answers for the next requests about jobs
	refuses func(pipe.Header) *pipe.Refused
	hold    bool // jobs don't end
	outcome func() pipe.Finished
	systems []string
	unfit   string // of its hello

	broken  func() error      // of an upload
	uploads []bool            // whether each was fresh
	inputs  map[string]string // digest by which they were uploaded → digest of what came
}

func newMachine() *machine {
	m := &machine{
		changed: make(chan struct{}), generation: "1-00000000", slots: 2,
		inputs: map[string]string{}, systems: []string{"x86_64-linux"},
		cancels: map[string]int{}, held: map[string]bool{}, ended: map[string]pipe.Finished{},
		spool: map[string]string{}, forgotten: map[string]bool{}, runs: map[string]int{},
		outcome: func() pipe.Finished { return pipe.Finished{Status: pipe.StatusSucceeded, LogLength: 10} },
	}
	m.hello()
	return m
}

func (m *machine) Name() string { return "vm" }

func (m *machine) Copy(context.Context, string, int64, io.Writer) (int64, error) {
	return 0, errors.New("these tests publish without a download")
}

// Upload stores the digest of what comes. Faults are those of m.upload.
func (m *machine) Upload(_ context.Context, digest string, size int64, fresh bool, write func(io.Writer) error) error {
	m.mu.Lock()
	fault := m.broken
	m.mu.Unlock()
	if fault != nil {
		if err := fault(); err != nil {
			return err
		}
	}
	sum := sha256.New()
	n := counter{w: sum}
	if err := write(&n); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if n.n != size {
		return fmt.Errorf("%d bytes, want %d", n.n, size)
	}
	m.uploads = append(m.uploads, fresh)
	m.inputs[digest] = hex.EncodeToString(sum.Sum(nil))
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return c.w.Write(p)
}

func (m *machine) say(e pipe.Event) {
	e.Seq, e.Time = uint64(len(m.events)+1), time.Now().UTC()
	m.events = append(m.events, e)
	m.said = append(m.said, m.generation)
	close(m.changed)
	m.changed = make(chan struct{})
}

func (m *machine) hello() {
	h := &pipe.Hello{Generation: m.generation, Protocol: pipe.Version, Slots: m.slots, Owner: m.owner, Systems: m.systems, Unfit: m.unfit}
	for key := range m.spool {
		_, id, attempt := splitKey(key)
		if !m.forgotten[key] {
			h.Jobs = append(h.Jobs, pipe.JobRef{Job: string(id), Attempt: attempt})
		}
	}
	m.say(pipe.Event{Type: pipe.TypeHello, Hello: h})
}

// ran returns how often each attempt ran.
func (m *machine) ran() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.runs)
}

// forgot reports whether the machine was told that it may forget an attempt.
func (m *machine) forgot(key string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.forgotten[key]
}

func (m *machine) Send(_ context.Context, data []byte) error {
	r, err := pipe.Parse(data)
	if err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	h, key := r.Header, r.Header.Key()
	if c := h.Consumed; c != nil {
		stored := m.stored() // perhaps of a later generation, by now
		if later(c.Generation, stored.Generation) || c.Generation == stored.Generation && c.Offset > stored.Offset {
			m.unstored = append(m.unstored, *c)
		}
	}
	answer := func(e pipe.Event) {
		if m.mute > 0 {
			m.mute--
			return
		}
		if h.Kind != m.silent {
			m.say(e)
		}
	}
	accepted := pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: key}}
	switch {
	case h.Kind == pipe.KindTakeOver:
		m.owner = h.Owner
		answer(accepted)
	case m.owner != "" && m.owner != h.Owner:
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Request: key, Reason: pipe.ReasonOwner, OwnedBy: m.owner, Retryable: true}})
	case (h.Kind == pipe.KindCancel || h.Kind == pipe.KindConsume || h.Kind == pipe.KindRepeat) && m.oldRunner:
		m.say(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Reason: pipe.ReasonMalformed, Message: "kind"}})
	case h.Kind == pipe.KindConsume:
		m.consumes = append(m.consumes, *h.Consumed)
		answer(accepted)
	case h.Kind == pipe.KindRepeat:
		if !slices.Contains(m.repeats, *h.Consumed) {
			m.generate()
		}
		m.repeats = append(m.repeats, *h.Consumed)
		answer(accepted)
	case h.Kind == pipe.KindCancel:
		key = strings.Replace(key, "cancel/", "job/", 1)
		m.cancels[key]++
		if m.onCancel != nil {
			m.onCancel(job.ID(h.Job))
		}
		answer(accepted)
		if m.held[key] {
			m.finish(h.Job, h.Attempt, pipe.Finished{Status: pipe.StatusCancelled, Reason: "it was cancelled", LogLength: 10})
		}
	case h.Kind == pipe.KindAcknowledge && m.held[strings.Replace(key, "acknowledge/", "job/", 1)]:
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Request: key, Reason: pipe.ReasonConflict}})
	case h.Kind == pipe.KindAcknowledge:
		m.forgotten[strings.Replace(key, "acknowledge/", "job/", 1)] = true
		answer(accepted)
	case len(m.refuse) > 0:
		refusal := m.refuse[0]
		m.refuse = m.refuse[1:]
		refusal.Request = key
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &refusal})
	case m.refuses != nil && m.refuses(*h) != nil:
		refusal := *m.refuses(*h)
		refusal.Request = key
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &refusal})
	case m.spool[key] == h.SHA256:
		answer(accepted)
	case m.spool[key] != "":
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Request: key, Reason: pipe.ReasonConflict}})
	case h.Inputs != "" && m.inputs[h.Inputs] != h.Inputs:
		answer(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Request: key, Reason: pipe.ReasonInputs, Retryable: true}})
	default:
		m.owner = h.Owner
		delete(m.inputs, h.Inputs)
		m.spool[key] = h.SHA256
		answer(accepted)
		m.start(h.Job, h.Attempt)
	}
	return nil
}

// generate begins a generation, in which all is told again.
func (m *machine) generate() {
	n, _ := m.generation.Number()
	m.generation = pipe.Generation(fmt.Sprintf("%d-00000000", n+1))
	m.hello()
	for _, key := range slices.Sorted(maps.Keys(m.spool)) {
		_, id, attempt := splitKey(key)
		if m.forgotten[key] {
			continue
		}
		m.say(pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: key}})
		if m.runs[key] > 0 {
			m.tell(string(id), attempt)
		}
		if f, ok := m.ended[key]; ok {
			if m.beforeEnd != nil {
				m.beforeEnd(string(id), attempt)
			}
			m.say(pipe.Event{Type: pipe.TypeFinished, Job: string(id), Attempt: attempt, Finished: &f})
		}
	}
}

// tell says what a job's output was.
func (m *machine) tell(id string, attempt int) {
	m.say(pipe.Event{Type: pipe.TypeStarted, Job: id, Attempt: attempt, Started: &pipe.Started{Slot: 1}})
	m.say(pipe.Event{Type: pipe.TypeLog, Job: id, Attempt: attempt, Log: &pipe.Log{Data: []byte("first\n")}})
	m.say(pipe.Event{Type: pipe.TypeLog, Job: id, Attempt: attempt, Log: &pipe.Log{Offset: 6, Data: []byte("end\n")}})
}

func (m *machine) start(id string, attempt int) {
	m.runs[fmt.Sprintf("job/%s/%d", id, attempt)]++
	m.running++
	m.mostAtOnce = max(m.mostAtOnce, m.running)
	m.tell(id, attempt)
	if m.hold {
		m.held[fmt.Sprintf("job/%s/%d", id, attempt)] = true
		return
	}
	m.end(id, attempt)
}

func (m *machine) end(id string, attempt int) { m.finish(id, attempt, m.outcome()) }

func (m *machine) finish(id string, attempt int, f pipe.Finished) {
	delete(m.held, fmt.Sprintf("job/%s/%d", id, attempt))
	m.running--
	m.ended[fmt.Sprintf("job/%s/%d", id, attempt)] = f
	if m.beforeEnd != nil {
		m.beforeEnd(id, attempt)
	}
	m.say(pipe.Event{Type: pipe.TypeFinished, Job: id, Attempt: attempt, Finished: &f})
}

// after returns the events from an offset on, waiting until there are some.
func (m *machine) after(ctx context.Context, offset int64) []pipe.Entry {
	for {
		m.mu.Lock()
		events, said, changed := m.events[offset:], m.said[offset:], m.changed
		m.mu.Unlock()
		if len(events) > 0 {
			entries := make([]pipe.Entry, len(events))
			for i, e := range events {
				entries[i] = pipe.Entry{Event: e, Next: pipe.Position{Generation: said[i], Offset: offset + int64(i) + 1}}
			}
			return entries
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
	}
}

// A bench is a dispatcher with all that it needs, and can be started again
// over the same records.
type bench struct {
	t         *testing.T
	state     string
	store     *store.SQLite
	vm        *machine
	cfg       Config
	mu        sync.Mutex
	published map[job.ID]int
	logs      map[job.ID]string // build.log as it was published
	failing   []error           // what the next publishes return
	skew      atomic.Int64      // of the clock

	hole     func(pipe.Entry) bool // events that the link can't read
	noticed  bool                  // and says so
	oneByOne bool                  // the link reads one event at a time
}

func newBench(t *testing.T) *bench {
	b := &bench{t: t, state: t.TempDir(), vm: newMachine(), published: map[job.ID]int{}, logs: map[job.ID]string{}}
	s, err := store.Open(t.Context(), filepath.Join(b.state, "test.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	b.store = s
	b.vm.stored = func() pipe.Position {
		c, err := s.Checkpoint(context.WithoutCancel(t.Context()), "vm")
		if err != nil {
			t.Errorf("read the checkpoint: %v", err)
		}
		return c.Position
	}
	t.Cleanup(func() {
		if len(b.vm.unstored) > 0 {
			t.Errorf("the VM was told that it may forget what was not stored: %v", b.vm.unstored)
		}
	})
	b.cfg = Config{
		Owner: "me", Store: s, Log: zaptest.NewLogger(t),
		Now:           func() time.Time { return time.Now().Add(time.Duration(b.skew.Load())) },
		AnswerTimeout: 100 * time.Millisecond, SyncEvery: 5 * time.Millisecond, RetryAfter: 2 * time.Millisecond,
		Body: func(j job.Job) ([]byte, error) { return []byte("echo " + j.Name), nil },
		OpenLog: func(j job.Job, m job.Mark) (Log, error) {
			return buildlog.Open(b.state, j.ID, m, nil)
		},
		Publish: b.publish,
	}
	return b
}

func (b *bench) publish(_ context.Context, j job.Job, _ Builder) (string, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.failing) > 0 {
		err := b.failing[0]
		b.failing = b.failing[1:]
		return "", err
	}
	log, err := os.ReadFile(buildlog.Path(b.state, j.ID))
	if err != nil && j.Attempt > 0 { // one that was never claimed has none
		return "", err
	}
	b.published[j.ID]++
	b.logs[j.ID] = string(log)
	return j.Name + "/" + string(j.ID), nil
}

func (b *bench) add(name string) job.ID {
	b.t.Helper()
	id := job.NewID(time.Now(), rand.Uint64())
	_, err := b.store.Create(b.t.Context(), job.Job{
		ID: id, Name: name, Drop: name + ".sh", DropKey: string(id), Recipe: job.RecipeScript, Entry: name + ".sh",
		State: job.Queued, Created: time.Now(), Updated: time.Now(),
		History: []job.Step{{Time: time.Now(), Event: job.Created, State: job.Queued}},
	})
	if err != nil {
		b.t.Fatal(err)
	}
	return id
}

// run starts a dispatcher and its link; the returned function stops them.
func (b *bench) run() (d *Dispatcher, stop func()) {
	b.t.Helper()
	d = New(b.cfg, b.unsettled())
	d.Add(b.vm)
	return d, b.start(d)
}

func (b *bench) start(d *Dispatcher) (stop func()) {
	return b.startWith(d, b.link)
}

func (b *bench) startWithoutLink(d *Dispatcher) (stop func()) {
	return b.startWith(d, func(context.Context, *Dispatcher) error { return nil })
}

func (b *bench) startWith(d *Dispatcher, link func(context.Context, *Dispatcher) error) (stop func()) {
	ctx, cancel := context.WithCancel(b.t.Context())
	var group sync.WaitGroup
	group.Go(func() {
		if err := d.Run(ctx, nil); err != nil {
			b.t.Errorf("Run: %v", err)
		}
	})
	group.Go(func() {
		if err := link(ctx, d); err != nil && ctx.Err() == nil {
			b.t.Errorf("link: %v", err)
		}
	})
	return func() {
		cancel()
		group.Wait()
	}
}

func (b *bench) link(ctx context.Context, d *Dispatcher) error {
	return b.linkTo(ctx, d, b.vm, "vm")
}

// linkTo is the link to a machine, under the name that the dispatcher knows it
// by.
func (b *bench) linkTo(ctx context.Context, d *Dispatcher, m *machine, name string) error {
	if err := d.Up(ctx, name); err != nil {
		return err
	}
	p, err := d.Position(ctx, name)
	if err != nil {
		return err
	}
	m.mu.Lock()
	end := int64(len(m.events))
	if !slices.Contains(m.said, p.Generation) { // another disk
		p = pipe.Position{}
	}
	m.mu.Unlock()
	caughtUp := false
	for ctx.Err() == nil {
		if !caughtUp && p.Offset >= end {
			caughtUp = true
			if err := d.CaughtUp(ctx, name); err != nil {
				return err
			}
		}
		entries := m.after(ctx, p.Offset)
		if len(entries) == 0 {
			break
		}
		for _, batch := range b.readable(entries) {
			if batch.damaged {
				if b.noticed {
					err = d.Damaged(ctx, name, p, errors.New("nothing but zeros"))
				}
			} else {
				err = d.Entries(ctx, name, batch.entries)
			}
			if err != nil {
				return err
			}
			p = batch.entries[len(batch.entries)-1].Next
		}
	}
	return ctx.Err()
}

// A batch is what is read at once, or can't be.
type batch struct {
	entries []pipe.Entry
	damaged bool
}

// readable cuts entries where they can't be read.
func (b *bench) readable(entries []pipe.Entry) []batch {
	var all []batch
	for _, e := range entries {
		damaged := b.hole != nil && b.hole(e)
		if n := len(all); n > 0 && all[n-1].damaged == damaged && !b.oneByOne {
			all[n-1].entries = append(all[n-1].entries, e)
			continue
		}
		all = append(all, batch{[]pipe.Entry{e}, damaged})
	}
	return all
}

// until waits for a record to be as wanted.
func (b *bench) until(id job.ID, what string, ok func(job.Job) bool) (j job.Job) {
	b.t.Helper()
	b.wait("job that is "+what, func() bool {
		var err error
		if j, err = b.store.Get(b.t.Context(), id); err != nil {
			b.t.Fatalf("waiting for %s: %v", what, err)
		}
		return ok(j)
	})
	return j
}

func (b *bench) running(id job.ID) {
	b.t.Helper()
	b.until(id, "running", func(j job.Job) bool { return j.State == job.Running })
}

func (b *bench) settled(id job.ID) job.Job {
	b.t.Helper()
	return b.until(id, "settled", job.Job.Settled)
}

func story(j job.Job) []job.Event {
	events := make([]job.Event, len(j.History))
	for i, s := range j.History {
		events[i] = s.Event
	}
	return events
}

func TestOneJob(t *testing.T) {
	b := newBench(t)
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	j := b.settled(id)
	want := []job.Event{job.Created, job.Claimed, job.Accepted, job.Finished, job.PublishedDone}
	if diff := cmp.Diff(want, story(j)); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	if j.State != job.Done || j.Attempt != 1 || j.Output != "hello/"+string(id) || j.Why != "" {
		t.Errorf("%s, attempt %d, output %q, why %q", j.State, j.Attempt, j.Output, j.Why)
	}
	if got := b.logs[id]; got != "first\nend\n" {
		t.Errorf("build.log: %q", got)
	}
	if !b.vm.forgot("job/" + string(id) + "/1") {
		t.Error("the VM was not told that it may forget the job")
	}
}

func TestTaken(t *testing.T) {
	b := newBench(t)
	d := New(b.cfg, nil)
	d.Add(b.vm)
	ctx, cancel := context.WithCancel(t.Context())
	taken := make(chan job.ID)
	var group sync.WaitGroup
	group.Go(func() {
		if err := d.Run(ctx, taken); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	group.Go(func() { _ = b.link(ctx, d) })
	defer group.Wait()
	defer cancel()
	id := b.add("late")
	taken <- id
	taken <- id // a second notice of the same job changes nothing
	b.settled(id)
	if err := d.Probe(ctx); err != nil {
		t.Errorf("Probe: %v", err)
	}
}

func TestUnansweredIsWrittenAgain(t *testing.T) {
	b := newBench(t)
	b.vm.mute = 2
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	b.settled(id)
	if n := b.vm.ran()["job/"+string(id)+"/1"]; n != 1 {
		t.Errorf("ran %d times", n)
	}
}

func TestRefused(t *testing.T) {
	for name, tt := range map[string]struct {
		refusals []pipe.Refused
		want     []job.Event
		state    job.State
		attempts int
	}{
		"for now": {
			[]pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}},
			[]job.Event{job.Created, job.Claimed, job.Deferred, job.Claimed, job.Accepted, job.Finished, job.PublishedDone},
			job.Done, 1,
		},
		"for good": {
			[]pipe.Refused{{Reason: pipe.ReasonMalformed, Message: "no"}},
			[]job.Event{job.Created, job.Claimed, job.Finished, job.PublishedFailed},
			job.Failed, 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.vm.refuse = tt.refusals
			id := b.add("hello")
			_, stop := b.run()
			defer stop()
			j := b.settled(id)
			if diff := cmp.Diff(tt.want, story(j)); diff != "" {
				t.Errorf("story (-want +got):\n%s", diff)
			}
			if j.State != tt.state || j.Attempt != tt.attempts {
				t.Errorf("%s after %d attempts, want %s after %d", j.State, j.Attempt, tt.state, tt.attempts)
			}
			if b.published[id] != 1 {
				t.Errorf("published %d times", b.published[id])
			}
		})
	}
}

func TestOwner(t *testing.T) {
	b := newBench(t)
	b.vm.owner = "somebody"
	b.vm.events = nil
	b.vm.hello()
	id := b.add("hello")
	_, stop := b.run()
	j := b.until(id, "waiting for the owner", func(j job.Job) bool { return strings.Contains(j.Why, "owned by somebody") })
	if !strings.Contains(j.Why, "TAKE_OVER") {
		t.Errorf("the reason doesn't say what to do: %q", j.Why)
	}
	stop()
	if len(b.vm.spool) > 0 {
		t.Error("a job was sent to another's VM")
	}

	b.cfg.TakeOver = true
	_, stop = b.run()
	defer stop()
	b.settled(id)
	if b.vm.owner != "me" {
		t.Errorf("the owner is %q", b.vm.owner)
	}
}

func TestInterrupted(t *testing.T) {
	for deaths, want := range map[int]job.State{1: job.Done, 2: job.Done, 3: job.Failed} {
		t.Run(fmt.Sprint(deaths), func(t *testing.T) {
			b := newBench(t)
			left := deaths
			b.vm.outcome = func() pipe.Finished {
				if left--; left >= 0 {
					return pipe.Finished{Status: pipe.StatusInterrupted, Reason: "the VM was reset", LogLength: 10}
				}
				return pipe.Finished{Status: pipe.StatusSucceeded, LogLength: 10}
			}
			id := b.add("hello")
			_, stop := b.run()
			defer stop()
			j := b.settled(id)
			if j.State != want {
				t.Errorf("%s, want %s", j.State, want)
			}
			log := "first\nend\n"
			for attempt := 2; attempt <= min(deaths+1, job.MaxAttempts); attempt++ {
				log += fmt.Sprintf("[osbuilder: attempt %d begins, attempt %d did not end]\nfirst\nend\n", attempt, attempt-1)
			}
			if diff := cmp.Diff(log, b.logs[id]); diff != "" {
				t.Errorf("build.log (-want +got):\n%s", diff)
			}
			for key, n := range b.vm.ran() {
				if n != 1 {
					t.Errorf("%s ran %d times", key, n)
				}
			}
		})
	}
}

// The VM's data disk was replaced: its hello doesn't list the job.
func TestLostWithTheDisk(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	b.running(id)
	b.vm.mu.Lock()
	b.vm.hold = false
	b.vm.spool = map[string]string{}
	b.vm.hello()
	b.vm.mu.Unlock()
	j := b.settled(id)
	if j.State != job.Done || j.Attempt != 2 {
		t.Errorf("%s after %d attempts", j.State, j.Attempt)
	}
}

func TestSlots(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	var ids []job.ID
	for i := range 5 {
		ids = append(ids, b.add(fmt.Sprint("job-", i)))
	}
	_, stop := b.run()
	defer stop()
	for _, id := range ids[2:] {
		b.until(id, "waiting for a slot", func(j job.Job) bool { return j.State == job.Queued && strings.Contains(j.Why, "free slot") })
	}
	// The oldest two run; as they end, the next ones follow.
	for _, id := range ids {
		b.running(id)
		b.vm.mu.Lock()
		b.vm.end(string(id), 1)
		b.vm.mu.Unlock()
		b.settled(id)
	}
	if b.vm.mostAtOnce > 2 {
		t.Errorf("%d jobs at once, in 2 slots", b.vm.mostAtOnce)
	}
}

func TestPublishIsTriedAgain(t *testing.T) {
	full := errors.New("no space left on device")
	for name, tt := range map[string]struct {
		failing []error
		want    job.State
	}{
		"a full disk, for long":  {slices.Repeat([]error{full}, 8), job.Done},
		"a damaged copy":         {[]error{ErrDamaged, ErrDamaged}, job.Done},
		"the artifact is gone":   {[]error{fmt.Errorf("image: %w", ErrGone)}, job.Failed},
		"gone, then a full disk": {[]error{ErrGone, full}, job.Failed},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.failing = tt.failing
			id := b.add("hello")
			_, stop := b.run()
			defer stop()
			j := b.settled(id)
			if j.State != tt.want {
				t.Errorf("%s, want %s", j.State, tt.want)
			}
			if tt.want == job.Failed && !strings.Contains(j.Result.Reason, "could not be fetched") {
				t.Errorf("the reason is %q", j.Result.Reason)
			}
			if b.published[id] != 1 {
				t.Errorf("published %d times", b.published[id])
			}
		})
	}
}

// Stopped and started at random moments, with answers lost now and then: each
// job runs once, is published, and its log is whole.
func TestStopsAtRandom(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			b := newBench(t)
			b.cfg.AnswerTimeout = 10 * time.Millisecond
			var ids []job.ID
			for i := range 8 {
				ids = append(ids, b.add(fmt.Sprint("job-", i)))
			}
			open := func() bool {
				jobs, _, err := b.store.Unsettled(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				return len(jobs) > 0
			}
			rounds := 0
			for open() {
				b.vm.mu.Lock()
				b.vm.mute = random.IntN(2)
				b.vm.mu.Unlock()
				_, stop := b.run()
				<-time.After(time.Duration(random.IntN(20*(1+rounds/50))) * time.Millisecond)
				stop()
				if rounds++; rounds > 500 {
					t.Fatal("no end in sight")
				}
			}
			t.Logf("%d rounds", rounds)
			for _, id := range ids {
				j, err := b.store.Get(t.Context(), id)
				if err != nil {
					t.Fatal(err)
				}
				if j.State != job.Done || b.vm.ran()["job/"+string(id)+"/1"] != 1 || j.Attempt != 1 {
					t.Errorf("%s: %s, attempt %d, runs %v", id, j.State, j.Attempt, b.vm.ran())
				}
				if b.logs[id] != "first\nend\n" {
					t.Errorf("%s: log %q", id, b.logs[id])
				}
			}
		})
	}
}

// A hello is stored at once: read again after a crash, it would count as lost
// what was accepted after it.
func TestHelloIsNotReadAgain(t *testing.T) {
	b := newBench(t)
	b.cfg.SyncEvery = time.Hour
	_, stop := b.run()
	defer stop()
	b.vm.mu.Lock()
	b.vm.hello()
	end := int64(len(b.vm.events))
	b.vm.mu.Unlock()
	b.wait("stored position behind the hello", func() bool { return b.vm.stored().Offset >= end })
}

// A builder that left the Compose project takes no log with it.
func TestBuilderGone(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	_, stop := b.run()
	b.running(id)
	b.wait("lines of the job", func() bool { return b.log(id) == "first\nend\n" })
	stop()

	without := New(b.cfg, b.unsettled())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- without.Run(ctx, nil) }()
	if err := without.Probe(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if got := b.log(id); got != "first\nend\n" {
		t.Errorf("build.log: %q", got)
	}

	_, stop = b.run()
	defer stop()
	b.vm.mu.Lock()
	b.vm.end(string(id), 1)
	b.vm.mu.Unlock()
	b.settled(id)
	if got := b.logs[id]; got != "first\nend\n" {
		t.Errorf("build.log as published: %q", got)
	}
}

// A VM without room is asked again, ever more seldom, whatever waits.
func TestRefusalsDoNotStorm(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = 10 * time.Millisecond
	const refusals = 6
	b.vm.refuse = slices.Repeat([]pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}, refusals)
	var ids []job.ID
	for i := range 20 {
		ids = append(ids, b.add(fmt.Sprint("job-", i)))
	}
	began := time.Now()
	_, stop := b.run()
	defer stop()
	for _, id := range ids {
		if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
			t.Errorf("%s after %d attempts", j.State, j.Attempt)
		}
	}
	// 10, 20, 40, 80, 160, 320 ms: the pauses can take longer, never less.
	if took := time.Since(began); took < 630*time.Millisecond {
		t.Errorf("%d refusals were asked for within %s", refusals, took)
	}
}

// The request was written twice. The first was refused for now, the second
// accepted: the VM has the job, and there is no second attempt.
func TestAcceptedAfterARefusal(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter = time.Minute
	b.vm.refuse = []pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	b.until(id, "refused", job.Job.Deferred)
	key := "job/" + string(id) + "/1"
	b.vm.mu.Lock()
	b.vm.spool[key] = "whatever"
	b.vm.say(pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: key}})
	b.vm.start(string(id), 1)
	b.vm.mu.Unlock()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 || b.vm.ran()[key] != 1 {
		t.Errorf("%s after %d attempts, runs %v", j.State, j.Attempt, b.vm.ran())
	}
}

// The VM has the attempt from an older sidecar, which wrote it differently.
func TestConflictMeansThatItIsThere(t *testing.T) {
	b := newBench(t)
	id := b.add("hello")
	b.vm.spool["job/"+string(id)+"/1"] = "another digest"
	_, stop := b.run()
	defer stop()
	b.running(id)
	b.vm.mu.Lock()
	b.vm.start(string(id), 1)
	b.vm.mu.Unlock()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s after %d attempts", j.State, j.Attempt)
	}
}

// What nobody asked for changes nothing.
func TestUnaskedAnswers(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	b.running(id)
	b.vm.mu.Lock()
	for _, key := range []string{"acknowledge/" + string(id) + "/1", "job/" + string(id) + "/1", "job/" + string(id) + "/7", "take-over/me", "", "x/y/z"} {
		b.vm.say(pipe.Event{Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: key}})
		b.vm.say(pipe.Event{Type: pipe.TypeRefused, Refused: &pipe.Refused{Request: key, Reason: pipe.ReasonMalformed}})
	}
	b.vm.end(string(id), 1)
	b.vm.mu.Unlock()
	if j := b.settled(id); j.State != job.Done || b.published[id] != 1 {
		t.Errorf("%s, published %d times", j.State, b.published[id])
	}
}

// Many artifacts are one write of the record, and none is lost.
func TestManyArtifacts(t *testing.T) {
	b := newBench(t)
	b.vm.hold = true
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	b.running(id)
	const files = 2000
	b.vm.mu.Lock()
	for i := range files {
		b.vm.say(pipe.Event{Type: pipe.TypeArtifact, Job: string(id), Attempt: 1, Artifact: &pipe.Artifact{
			Name: fmt.Sprint(i), SHA256: strings.Repeat("0", 64),
		}})
	}
	b.vm.end(string(id), 1)
	b.vm.mu.Unlock()
	if j := b.settled(id); len(j.Artifacts) != files {
		t.Errorf("%d artifacts on record, %d announced", len(j.Artifacts), files)
	}
}

func (b *bench) log(id job.ID) string {
	b.t.Helper()
	log, err := os.ReadFile(buildlog.Path(b.state, id))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(log)
}

func (b *bench) unsettled() []job.Job {
	b.t.Helper()
	jobs, damaged, err := b.store.Unsettled(b.t.Context())
	if err != nil || len(damaged) > 0 {
		b.t.Fatal(err, damaged)
	}
	return jobs
}

func (b *bench) wait(what string, done func() bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), bound)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			b.t.Fatalf("no %s", what)
		case <-tick.C:
		}
	}
}
