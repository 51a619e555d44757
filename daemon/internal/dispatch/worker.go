package dispatch

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// maxExplained bounds how many records are written at once for no more than a
// new reason to wait: with thousands of jobs it would hold up everything else.
const maxExplained = 64

// A worker is what the dispatcher knows of one builder.
type worker struct {
	builder  Builder
	up       bool
	why      string        // it can't take a job, in words; "" where it can
	down     obstacle      // while there is no link
	notReady time.Time     // since when it isn't ready; zero while it is
	position pipe.Position // up to which its events took effect
	saved    pipe.Position // of the last checkpoint: what is on disk here
	dirty    bool          // position or logs moved since then
	hello    *pipe.Hello   // the last one before position

	upSince     time.Time           // of the link
	current     bool                // all is read that it had said when the link came up
	sending     map[*request]func() // ends the writing of each that is under way
	waiting     *request            // written, not yet answered
	unanswered  int                 // requests in a row that were not answered in time
	acks        []*ack              // to be sent, in this order
	notBefore   time.Time           // of the next request, after one that could not be written
	claimBefore time.Time           // no job is claimed before, after a refusal that concerns them all
	refusals    int                 // of that kind, in a row
	refusedLast job.ID              // of those that it did not take since it took one

	// Bytes of events: read, of these stored, of these the VM was told about.
	read, stored, told int64

	owned     bool      // was ours since we started: it is taken over once, and not taken back
	lost      string    // to whom, as was said
	strangers time.Time // when it was last said that others write to it

	caughtUp bool                 // all that it had said before we started is read
	missing  map[pipe.JobRef]bool // job.Checkpoint.Missing

	repeat   *repeat // what it has to be asked to tell again; nil: nothing
	repeats  int     // in a row
	asked    bool    // for the sake of records that come from a copy
	toldAll  bool    // and listed them
	repeated time.Time
}

// A request is what lies in pipe_in and was not answered.
type request struct {
	key     string
	written time.Time
	stored  int64 // what of the events was stored then
}

// advance notes how far events were read.
func (w *worker) advance(to pipe.Position) {
	n := to.Offset
	if to.Generation == w.position.Generation {
		n -= w.position.Offset
	}
	w.read += max(0, n)
	w.position, w.dirty = to, true
}

// Up implements the link's sink: requests can be sent.
func (d *Dispatcher) Up(ctx context.Context, builder string) error {
	return d.do(ctx, func(context.Context) error {
		w, err := d.worker(builder)
		if err != nil {
			return err
		}
		w.up, w.current, w.why, w.waiting = true, false, "", nil
		w.upSince, w.unanswered = d.cfg.Now(), 0
		if w.repeat != nil {
			w.repeat.notBefore = w.repeated
		}
		return nil
	})
}

// Down implements the link's sink: the builder can't be reached. Its jobs go
// on there, so nothing changes for them.
func (d *Dispatcher) Down(ctx context.Context, builder string, reason error) error {
	return d.do(ctx, func(context.Context) error {
		w, err := d.worker(builder)
		if err != nil {
			return err
		}
		w.up, w.current, w.why, w.waiting = false, false, fmt.Sprintf("no link to %s: %v", builder, reason), nil
		w.down = noLink(builder, reason)
		if w.down.hint != "" {
			w.why += "; " + w.down.hint
		}
		for _, stop := range w.sending {
			stop() // the next link may lead to another disk
		}
		return nil
	})
}

// pump does whatever can be done now: one request a builder, publishes.
func (d *Dispatcher) pump(ctx, work context.Context) error {
	for _, f := range d.order {
		if f.job.State == job.Collecting {
			d.publish(work, f)
		}
	}
	for name, w := range d.workers {
		if err := d.pumpWorker(ctx, work, name, w); err != nil {
			return err
		}
	}
	if err := d.decideRestored(ctx, ""); err != nil {
		return err
	}
	return d.explain(ctx)
}

func (d *Dispatcher) pumpWorker(ctx, work context.Context, name string, w *worker) error {
	now := d.cfg.Now()
	if w.waiting != nil && now.Sub(w.waiting.written) >= d.cfg.AnswerTimeout {
		d.cfg.Log.Warn("request not answered, writing it again",
			zap.String("builder", name), zap.String("request", w.waiting.key), zap.Duration("after", now.Sub(w.waiting.written)))
		w.waiting = nil
		w.unanswered++
	}
	if !w.up || w.waiting != nil || now.Before(w.notBefore) {
		return nil
	}
	if w.hello == nil {
		if w.repeatDue(now) { // its hello is among what can't be read
			return d.askRepeat(ctx, work, name, w)
		}
		return nil
	}
	if w.foreign(d.cfg.Owner) {
		if w.why = d.whose(name, w); w.why != "" {
			return nil
		}
		return d.send(work, w, pipe.Header{Kind: pipe.KindTakeOver, Owner: d.cfg.Owner}, nil)
	}
	w.why = ""
	d.askOfRestored(w)
	if w.repeatDue(now) {
		return d.askRepeat(ctx, work, name, w)
	}
	if f := d.nextCancel(name, now); f != nil {
		return d.send(work, w, pipe.Header{
			Kind: pipe.KindCancel, Owner: d.cfg.Owner, Job: string(f.job.ID), Attempt: f.job.Attempt,
		}, nil)
	}
	if a := w.nextAck(now); a != nil {
		return d.send(work, w, pipe.Header{
			Kind: a.kind(), Owner: d.cfg.Owner, Job: a.ref.Job, Attempt: a.ref.Attempt,
		}, nil)
	}
	if d.cfg.ConsumeEvery > 0 && w.stored-w.told >= d.cfg.ConsumeEvery {
		return d.send(work, w, pipe.Header{Kind: pipe.KindConsume, Owner: d.cfg.Owner}, nil)
	}

	if !w.current {
		// What is not read yet tells which jobs it has. With another data disk it
		// doesn't know those that it ran before.
		return nil
	}
	return d.pumpJobs(ctx, work, name, w, now)
}

// pumpJobs writes the request of the next job, if the builder can take one.
func (d *Dispatcher) pumpJobs(ctx, work context.Context, name string, w *worker, now time.Time) error {
	busy := 0
	var next *flight
	for _, f := range d.order {
		switch f.job.State {
		case job.Sending, job.Running:
			if f.job.Builder != name {
				continue
			}
			busy++
			if f.job.State == job.Sending && !w.missing[ref(f.job)] {
				// Cancelled, it is sent without its inputs: the answer tells
				// whether the VM has it from before.
				if f.job.Cancel == nil && d.upload(work, name, w, f) {
					continue // other jobs need not wait for its inputs
				}
				// Claimed, and no answer on record: write it (again) before anything new.
				return d.sendJob(ctx, work, w, f)
			}
		case job.Queued:
			if !d.doubted(f) && w.takes(name, f, now) && (next == nil || w.prefers(name, f, next)) {
				next = f
			}
		default: // the VM has nothing to do with it any more
		}
	}
	if next == nil || w.hello.Unfit != "" || busy >= w.hello.Slots || now.Before(w.claimBefore) || d.lacksRoom() != "" {
		return nil
	}
	if err := d.claim(ctx, name, w, next); err != nil {
		return err
	}
	if d.upload(work, name, w, next) {
		return nil
	}
	return d.sendJob(ctx, work, w, next)
}

// doubted reports that the builder which refused a job for now may have it all
// the same, and is about to say so: until then nobody is given the job.
func (d *Dispatcher) doubted(f *flight) bool {
	w := d.workers[f.job.Builder]
	return w != nil && w.up && w.missing[ref(f.job)] && f.job.Deferred()
}

// claim puts on record that a builder gets the job, before it gets it.
func (d *Dispatcher) claim(ctx context.Context, name string, w *worker, f *flight) error {
	attempt := f.job.Attempt + 1
	if f.job.Deferred() && f.job.Builder == name {
		attempt = f.job.Attempt // it never ran
	}
	if f.log == nil {
		if err := d.openLog(f, job.Mark{}); err != nil {
			return err
		}
	}
	// The log learns of the attempt first, and the builder's checkpoint with
	// it: stopped in between, the claim is made again and Begin does nothing.
	if err := f.log.Begin(attempt); err != nil {
		return fmt.Errorf("begin attempt %d of job %s: %w", attempt, f.job.ID, err)
	}
	previous := f.job.Builder
	f.job.Builder = name
	if err := d.save(ctx, name, w); err != nil {
		f.job.Builder = previous
		return err
	}
	f.job.Builder = previous
	f.sent = f.sent && attempt == f.job.Attempt
	f.gap = gap{}
	return d.update(ctx, f, job.Claimed, "on "+name, func(j *job.Job) {
		j.Builder, j.Attempt, j.Why = name, attempt, ""
		j.Artifacts, j.Result, j.Started = nil, nil, time.Time{}
		j.Image, j.Runner = w.hello.Image, w.hello.Runner
		j.History[len(j.History)-1].Attempt = attempt
	})
}

// sendJob writes the request of a claimed job.
func (d *Dispatcher) sendJob(ctx, work context.Context, w *worker, f *flight) error {
	body, err := d.cfg.Body(f.job)
	if err != nil && f.job.Cancel != nil {
		return d.cancelled(ctx, f, f.job.Cancel)
	}
	if err != nil {
		return d.fail(ctx, w, f, fmt.Sprintf("make the request: %v", err))
	}
	h := pipe.Header{
		Kind: pipe.KindJob, Owner: d.cfg.Owner, Job: string(f.job.ID), Attempt: f.job.Attempt,
		Name: f.job.Drop, Timeout: int64(f.job.Timeout / time.Second),
	}
	if f.job.Inputs != nil {
		h.Inputs = f.job.Inputs.SHA256
	}
	f.sent, f.unread = true, false
	return d.send(work, w, h, body)
}

// send writes a request; its answer comes as an event.
func (d *Dispatcher) send(ctx context.Context, w *worker, h pipe.Header, body []byte) error {
	// What is on disk, not what was read: the VM may forget all before it.
	if consumed := w.saved; h.Consumed == nil && consumed.Generation != "" {
		h.Consumed = &consumed
	}
	data, err := pipe.Marshal(h, body)
	if err != nil {
		return err
	}
	r := &request{key: h.Key(), written: d.cfg.Now(), stored: w.stored}
	w.waiting = r
	link, stop := context.WithCancel(ctx)
	w.sending[r] = stop
	d.begin(ctx, func(context.Context) error {
		return w.builder.Send(link, data)
	}, func(_ context.Context, err error) error {
		stop()
		delete(w.sending, r)
		if err == nil || w.waiting != r {
			return nil
		}
		d.cfg.Log.Warn("request not written, trying again", zap.String("builder", w.builder.Name()),
			zap.String("request", r.key), zap.Error(err))
		w.waiting = nil
		w.notBefore = d.cfg.Now().Add(d.cfg.RetryAfter)
		if h.Kind == pipe.KindRepeat && w.repeat != nil {
			w.repeat.notBefore = w.notBefore
		}
		return nil
	})
	return nil
}

// explain puts on record why the queued jobs wait.
func (d *Dispatcher) explain(ctx context.Context) error {
	type answer struct {
		why   string
		known bool
	}
	room := d.lacksRoom()          // also where nothing waits: it is said when a disk is full, and when there is room again
	reasons := map[string]answer{} // by system
	written := 0
	for _, f := range d.order {
		if f.job.State == job.Sending || f.job.State == job.Collecting || d.doubted(f) {
			if err := d.explainLink(ctx, f); err != nil {
				return err
			}
			continue
		}
		system := f.job.System()
		a, ok := reasons[system]
		if !ok {
			a.why, a.known = d.waitsFor(system, room)
			reasons[system] = a
		}
		if f.job.Restored {
			a.why = d.whyRestored()
		}
		if !a.known || f.job.State != job.Queued || sameReason(f.job.Why, a.why) || f.job.Deferred() && f.job.Why != "" {
			continue
		}
		if written++; written > maxExplained {
			return nil // the others' turn comes with the next pump
		}
		// A request on its way to a builder is no reason worth a record: it
		// takes milliseconds, and the job may be the next.
		if d.answering() && f.job.Why == "" {
			continue
		}
		if err := d.waits(ctx, f, a.why); err != nil {
			return err
		}
	}
	return nil
}

// waitsFor is what jobs for a system wait for: room, if that is lacking, a slot
// of the first builder that is ready for them, or else what is the matter with
// the last one that may have one. Whether that is so may be known in a moment
// only.
func (d *Dispatcher) waitsFor(system, room string) (why string, known bool) {
	if lack := d.unbuildable(system); lack != "" {
		return lack, true
	}
	if room != "" { // whatever else may be the matter: a VM can stand still for it
		return room, true
	}
	known = true
	for _, name := range d.builderNames() {
		w := d.workers[name]
		if w.hello != nil && !w.buildsFor(system) {
			continue
		}
		o := d.obstacle(name, w)
		moment := d.cfg.Now().Sub(w.upSince) < d.cfg.AnswerTimeout
		switch {
		case w.why != "":
			why = w.why
		case moment && (w.hello == nil || !w.current):
			known = false // its hello is the next event, or what it said meanwhile is being read
		case o.why != "":
			why = o.why
		case !w.current:
			why = "all to be read that " + name + " said meanwhile"
		default:
			return "a free slot on " + name, true
		}
	}
	return why, known
}

func (d *Dispatcher) lacksRoom() string {
	if d.cfg.Room == nil {
		return ""
	}
	return d.cfg.Room()
}

// explainLink puts on record that a job which needs its VM can't have it.
func (d *Dispatcher) explainLink(ctx context.Context, f *flight) error {
	const noLink = "no link to "
	w := d.workers[f.job.Builder]
	switch {
	case f.job.Attempt == 0 || f.job.State == job.Collecting && !needsVM(f.job):
		return nil
	case w == nil:
		return d.waits(ctx, f, f.job.Builder+", which the Compose project no longer has")
	case !w.up:
		return d.waits(ctx, f, w.why)
	case w.current && w.missing[ref(f.job)] && (f.job.State == job.Sending || f.job.Deferred()):
		return d.waits(ctx, f, f.job.Builder+" to tell again which jobs it has, since its data disk may be another one; osbuilder retry runs it again without")
	case strings.HasPrefix(f.job.Why, noLink):
		return d.waits(ctx, f, "")
	}
	return nil
}

func (d *Dispatcher) answering() bool {
	for _, w := range d.workers {
		if w.up && w.waiting != nil && w.unanswered == 0 {
			return true
		}
	}
	return false
}

func (d *Dispatcher) builderNames() []string {
	names := make([]string, 0, len(d.workers))
	for name := range d.workers {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
