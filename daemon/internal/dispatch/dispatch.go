// Package dispatch gives jobs to builders and takes from them what they say.
//
// One goroutine, [Dispatcher.Run], owns the jobs in flight and all that is
// known of the builders. Everyone else hands it a function to run (see do).
// What takes long — writing to a VM, copying from it — runs in goroutines
// that it starts, waits for, and that report back the same way.
//
//	inbox ──id──▶ ┌──────────┐ ──Send──▶ builder
//	              │   Run    │
//	links ─event─▶│ (owner)  │ ─Publish─▶ output/
//	              └──────────┘
//	                 │ records first, then effects
//	                 ▼
//	               store
//
// Order makes it safe to stop at any point: a record is written before what
// it says is acted upon; a checkpoint is stored only when everything before
// it has taken effect and is on disk. Started again, it goes on from the
// records, and events it has seen before change nothing.
package dispatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// maxPublishing bounds how many jobs are fetched at once.
const maxPublishing = 2

// A Dispatcher owns the jobs in flight.
type Dispatcher struct {
	cfg      Config
	commands chan command

	// Owned by Run's goroutine.
	group      *sync.WaitGroup
	flights    map[job.ID]*flight
	order      []*flight // the same, oldest first
	workers    map[string]*worker
	publishing int
	reminder   reminder
}

// A flight is a job that is not settled.
type flight struct {
	job        job.Job
	log        Log  // from the first claim on, until it is published
	unsaved    bool // the record here is ahead of the store's
	publishing bool
	uploading  bool      // its inputs are on their way
	stopUpload func()    // ends that, for nothing
	uploaded   delivered // where its inputs lie, as far as is known
	fresh      bool      // they have to be uploaded from the beginning
	sent       bool      // its request may have been written, by this process or one before
	unread     bool      // since then, the answer to it may be gone, and nobody read it
	failures   int       // uploads or publishes that failed in a row
	notBefore  time.Time // of the next try to send or to publish
	pulse      pulse     // while it runs
	gap        gap       // in what the VM said of the attempt

	refused map[string]refusal // by the builder that did not take it for now

	asLeft bool // its log is, and not opened

	recalled    bool      // its VM was told that it is cancelled, and said yes
	recallAfter time.Time // of the next try to tell it
}

// delivered names an attempt and the builder that has its inputs.
type delivered struct {
	builder string
	attempt int
}

type command struct {
	do   func(ctx context.Context) error
	done chan error
}

// New returns a Dispatcher that takes up jobs, the ones that are not settled.
func New(cfg Config, jobs []job.Job) *Dispatcher {
	d := &Dispatcher{
		cfg:      cfg,
		commands: make(chan command),
		group:    new(sync.WaitGroup),
		flights:  make(map[job.ID]*flight),
		workers:  make(map[string]*worker),
	}
	for _, j := range jobs {
		d.add(&flight{job: j})
	}
	return d
}

// Add makes a builder known. It must not be called once Run was.
func (d *Dispatcher) Add(b Builder) {
	why := "no link to " + b.Name() + " yet"
	d.workers[b.Name()] = &worker{builder: b, why: why, down: obstacle{rung: "link", why: why}, sending: make(map[*request]func())}
}

// add and remove keep flights and order alike.
func (d *Dispatcher) add(f *flight) {
	d.flights[f.job.ID] = f
	i, _ := slices.BinarySearchFunc(d.order, f.job.ID, byID)
	d.order = slices.Insert(d.order, i, f)
}

func (d *Dispatcher) remove(f *flight) {
	delete(d.flights, f.job.ID)
	if i, found := slices.BinarySearchFunc(d.order, f.job.ID, byID); found {
		d.order = slices.Delete(d.order, i, i+1)
	}
}

func byID(f *flight, id job.ID) int { return cmp.Compare(f.job.ID, id) }

// ErrStopped answers whoever calls while Run is ending.
var ErrStopped = errors.New("the dispatcher has stopped")

// do runs f on the owner's goroutine and returns its error. The context that f
// gets is the owner's: a caller who leaves early doesn't tear off a write.
func (d *Dispatcher) do(ctx context.Context, f func(ctx context.Context) error) error {
	c := command{do: f, done: make(chan error, 1)}
	select {
	case d.commands <- c:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Probe reports whether the owner's goroutine answers.
func (d *Dispatcher) Probe(ctx context.Context) error {
	return d.do(ctx, func(context.Context) error { return nil })
}

// Run works until ctx is done. taken names the jobs that the inbox recorded.
// It returns nil after a clean stop, or the first error that makes going on
// unsafe: a record or a log that can't be written.
func (d *Dispatcher) Run(ctx context.Context, taken <-chan job.ID) (err error) {
	// The owner's last writes must not be torn off by the stop itself.
	own := context.WithoutCancel(ctx)
	if err := d.takeUp(own); err != nil {
		return err
	}
	work, stopWork := context.WithCancel(ctx)
	defer func() {
		stopWork()
		err = errors.Join(err, d.drain(own), d.closeLogs())
	}()

	tick := time.NewTicker(d.cfg.SyncEvery)
	defer tick.Stop()
	for {
		if err := d.pump(own, work); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return nil
		case id := <-taken:
			if err := d.take(own, id); err != nil {
				return err
			}
		case c := <-d.commands:
			err := c.do(own)
			c.done <- err
			if err != nil {
				return err
			}
		case <-tick.C:
			if err := d.saveDirty(own); err != nil {
				return err
			}
			d.beat()
			d.remind()
		}
	}
}

// takeUp opens what the jobs on record had open.
func (d *Dispatcher) takeUp(ctx context.Context) error {
	marks := make(map[job.ID]job.Mark)
	names := slices.Collect(maps.Keys(d.workers))
	for _, f := range d.order { // a builder that is gone still has marks of its jobs
		if f.job.Builder != "" && !slices.Contains(names, f.job.Builder) {
			names = append(names, f.job.Builder)
		}
	}
	for _, name := range names {
		c, err := d.cfg.Store.Checkpoint(ctx, name)
		if err != nil && d.cfg.Damaged != nil && errors.Is(err, d.cfg.Damaged) {
			d.cfg.Log.Error("how far the builder's events were read is not known any more: they are read again, and what is missing is asked for",
				zap.String("builder", name), zap.Error(err))
			err = nil
		}
		if err != nil {
			return fmt.Errorf("read checkpoint of %s: %w", name, err)
		}
		if w := d.workers[name]; w != nil {
			w.resume(c)
		}
		for id, m := range c.Logs {
			// Begun on one builder and claimed on another, an attempt has two
			// marks: the log only grows, so the longer one is the later.
			if have := marks[id]; m.Attempt > have.Attempt || m.Attempt == have.Attempt && m.File > have.File {
				marks[id] = m
			}
		}
	}
	for _, f := range d.order {
		if f.job.Restored {
			if err := d.takeUpRestored(ctx, f); err != nil {
				return err
			}
		}
		w, known := d.workers[f.job.Builder]
		f.sent = f.job.State == job.Sending
		f.notBefore = d.publishAfter(f.job)
		if f.job.State.Terminal() {
			if known {
				w.acknowledge(ref(f.job))
			}
			continue
		}
		if d.gone(f.job) && f.job.State != job.Queued {
			d.cfg.Log.Warn("job waits for a builder that the Compose project no longer has",
				zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.String("builder", f.job.Builder))
		}
		// The log of a restored one is as it was left, and can be ahead of the
		// mark: it is opened when that is known.
		if f.job.Attempt > 0 && !f.asLeft {
			mark, known := marks[f.job.ID]
			if !known { // with the checkpoint
				mark = job.Mark{Attempt: f.job.Attempt, Whole: !underWay(f.job), Again: underWay(f.job)}
			}
			if err := d.openLog(f, mark); err != nil {
				return err
			}
		}
		d.cfg.Log.Info("job taken up again", zap.String("job", f.job.Name),
			zap.String("id", string(f.job.ID)), zap.String("state", string(f.job.State)))
		if f.job.Cancel != nil && underWay(f.job) && d.gone(f.job) {
			if err := d.cancelled(ctx, f, f.job.Cancel); err != nil {
				return err
			}
		}
	}
	return nil
}

// take adds a job that the inbox has just recorded.
func (d *Dispatcher) take(ctx context.Context, id job.ID) error {
	if _, known := d.flights[id]; known {
		return nil
	}
	j, err := d.cfg.Store.Get(ctx, id)
	if err != nil {
		// The others go on. If its record is sound, the next start takes it up.
		d.cfg.Log.Error("the record of a job that was just taken can't be read", zap.String("id", string(id)), zap.Error(err))
		return nil
	}
	if j.State != job.Queued || j.Attempt > 0 {
		return nil // a late notice of a job that went its way already
	}
	d.add(&flight{job: j})
	return nil
}

func (d *Dispatcher) openLog(f *flight, m job.Mark) (err error) {
	f.log, err = d.cfg.OpenLog(f.job, m)
	if err != nil {
		return fmt.Errorf("open log of job %s: %w", f.job.ID, err)
	}
	return nil
}

// update applies event to the job's record, after edit, and keeps the result.
func (d *Dispatcher) update(ctx context.Context, f *flight, event job.Event, reason string, edit func(*job.Job)) error {
	j, err := f.job.Apply(event, d.cfg.Now(), reason)
	if err != nil {
		return err
	}
	if edit != nil {
		edit(&j)
	}
	return d.write(ctx, f, j)
}

func (d *Dispatcher) write(ctx context.Context, f *flight, j job.Job) error {
	j, err := d.cfg.Store.Update(ctx, j)
	if err != nil {
		return fmt.Errorf("record job %s: %w", f.job.ID, err)
	}
	f.job, f.unsaved = j, false
	return nil
}

// waits puts on record why a job waits, once for each new reason.
func (d *Dispatcher) waits(ctx context.Context, f *flight, why string) error {
	if sameReason(f.job.Why, why) {
		return nil
	}
	j := f.job
	j.Why = why
	if why != "" {
		d.cfg.Log.Info("job waits", zap.String("job", j.Name), zap.String("id", string(j.ID)), zap.String("for", why))
	}
	return d.write(ctx, f, j)
}

// sameReason reports whether two reasons to wait are the same, but for how much
// room there is: that is another each time, and no news.
func sameReason(a, b string) bool {
	return a == b || amount.ReplaceAllString(a, "") == amount.ReplaceAllString(b, "")
}

var amount = regexp.MustCompile(`[0-9.]+ (bytes|kB|MB|GB|TB)`) // as pipe.Size writes it

// saveDirty stores the checkpoint of every builder that said something.
func (d *Dispatcher) saveDirty(ctx context.Context) error {
	for name, w := range d.workers {
		if !w.dirty {
			continue
		}
		if err := d.save(ctx, name, w); err != nil {
			return err
		}
	}
	return nil
}

// save syncs the logs and writes the records that are ahead of the store, and
// only then stores the builder's checkpoint.
func (d *Dispatcher) save(ctx context.Context, name string, w *worker) error {
	c := job.Checkpoint{Position: w.position, Hello: w.hello, Logs: make(map[job.ID]job.Mark)}
	for r := range w.missing {
		c.Missing = append(c.Missing, r)
	}
	if w.repeat != nil {
		c.Repeat = &w.repeat.place
	}
	for id, f := range d.flights {
		if f.job.Builder != name || f.log == nil {
			continue
		}
		if f.unsaved {
			if err := d.write(ctx, f, f.job); err != nil {
				return err
			}
		}
		m, err := f.log.Sync()
		if err != nil {
			return fmt.Errorf("sync log of job %s: %w", id, err)
		}
		c.Logs[id] = m
	}
	if err := d.cfg.Store.SaveCheckpoint(ctx, name, c); err != nil {
		return fmt.Errorf("store checkpoint of %s: %w", name, err)
	}
	w.dirty, w.saved, w.stored = false, w.position, w.read
	return nil
}

// resume goes on where the last life of the sidecar left off.
func (w *worker) resume(c job.Checkpoint) {
	w.position, w.saved, w.hello = c.Position, c.Position, c.Hello
	w.missing = make(map[pipe.JobRef]bool)
	for _, r := range c.Missing {
		w.missing[r] = true
	}
	if c.Repeat != nil {
		w.repeat = &repeat{place: *c.Repeat}
	}
}

// drain waits for the goroutines that Run started and lets them report.
func (d *Dispatcher) drain(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		d.group.Wait()
		close(done)
	}()
	var err error
	for {
		select {
		case <-done:
			return errors.Join(err, d.saveDirty(ctx))
		case c := <-d.commands:
			// A report that comes this late is not acted upon: the records say
			// what is left to do, and the next start does it.
			c.done <- ErrStopped
		}
	}
}

func (d *Dispatcher) closeLogs() error {
	var errs []error
	for _, f := range d.flights {
		if f.log != nil {
			errs = append(errs, f.log.Close())
		}
	}
	return errors.Join(errs...)
}

// begin starts work that takes long; then runs on the owner's goroutine with
// its error, unless Run stopped meanwhile.
func (d *Dispatcher) begin(ctx context.Context, work func(ctx context.Context) error, then func(ctx context.Context, err error) error) {
	d.group.Go(func() {
		err := work(ctx)
		// ErrStopped, or a stop before the owner listened: nothing is left to tell.
		_ = d.do(ctx, func(ctx context.Context) error { return then(ctx, err) })
	})
}

func (d *Dispatcher) worker(builder string) (*worker, error) {
	w, ok := d.workers[builder]
	if !ok {
		return nil, fmt.Errorf("unknown builder %q", builder)
	}
	return w, nil
}

// Position implements the link's sink.
func (d *Dispatcher) Position(ctx context.Context, builder string) (pipe.Position, error) {
	position := make(chan pipe.Position, 1) // the caller may leave before it is answered
	err := d.do(ctx, func(context.Context) error {
		w, err := d.worker(builder)
		if err == nil {
			position <- w.position
		}
		return err
	})
	if err != nil {
		return pipe.Position{}, err
	}
	return <-position, nil
}
