package dispatch

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// Entries implements the link's sink: what a builder said, in order. It
// returns when the entries took effect.
func (d *Dispatcher) Entries(ctx context.Context, builder string, entries []pipe.Entry) error {
	return d.do(ctx, func(ctx context.Context) error {
		w, err := d.worker(builder)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := d.event(ctx, builder, w, e); err != nil {
				return fmt.Errorf("event %d of %s: %w", e.Event.Seq, builder, err)
			}
			w.advance(e.Next)
			if e.Event.Type == pipe.TypeHello {
				// What a hello lists holds for its moment only: read again after
				// a restart, it would count later jobs as lost.
				if err := d.save(ctx, builder, w); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

func (d *Dispatcher) event(ctx context.Context, builder string, w *worker, entry pipe.Entry) error {
	e := entry.Event
	switch e.Type {
	case pipe.TypeHello:
		return d.hello(ctx, builder, w, *e.Hello)
	case pipe.TypeAccepted:
		return d.accepted(ctx, builder, w, e.Accepted.Request, entry.Next.Generation)
	case pipe.TypeRefused:
		return d.refused(ctx, builder, w, *e.Refused)
	default:
		return d.jobEvent(ctx, builder, w, entry)
	}
}

// jobEvent takes what a builder says of a job.
func (d *Dispatcher) jobEvent(ctx context.Context, builder string, w *worker, entry pipe.Entry) error {
	e, in := entry.Event, entry.Next.Generation
	f, ours := d.flights[job.ID(e.Job)]
	at := pipe.JobRef{Job: e.Job, Attempt: e.Attempt}
	left := ours && d.left(f.job, builder, at)
	if !ours || left || f.job.Builder != builder || f.job.Attempt != e.Attempt {
		d.cfg.Log.Debug("event of a job that is not in flight here", zap.String("builder", builder),
			zap.String("type", string(e.Type)), zap.String("id", e.Job), zap.Int("attempt", e.Attempt))
		switch {
		case e.Type == pipe.TypeFinished:
			w.abandonedEnds(at)
		case e.Type == pipe.TypeStarted && left:
			w.abandon(at)
		case e.Type == pipe.TypeStarted && !ours:
			// A request that was given up, and taken long after it: the job may be over. No hello lists it yet.
			if j, err := d.cfg.Store.Get(ctx, job.ID(e.Job)); err == nil {
				d.leftover(builder, w, at, j)
			}
		}
		return nil
	}
	delete(w.missing, ref(f.job))
	switch e.Type {
	case pipe.TypeStarted:
		return d.started(ctx, f, e)
	case pipe.TypeLog:
		if !underWay(f.job) { // ended already: a repeat
			return nil
		}
		if f.log.Lacks(e.Attempt, e.Log.Offset) > 0 && d.incomplete(builder, w, f, in, "a part of the output") {
			return nil
		}
		if err := f.log.Append(e.Attempt, *e.Log); err != nil {
			return fmt.Errorf("append to log of job %s: %w", f.job.ID, err)
		}
		f.pulse.heard(d.cfg.Now(), e.Log.Data)
		return nil
	case pipe.TypeProgress:
		f.pulse.heard(d.cfg.Now(), nil)
		d.cfg.Log.Info("progress", zap.String("job", f.job.Name), zap.String("phase", e.Progress.Phase),
			zap.Int64("done", e.Progress.Done), zap.Int64("expected", e.Progress.Expected), zap.String("unit", e.Progress.Unit))
		return nil
	case pipe.TypeArtifact:
		return d.artifact(f, *e.Artifact)
	case pipe.TypeFinished:
		unnamed := e.Finished.Status == pipe.StatusSucceeded && len(f.job.Artifacts) < e.Finished.Artifacts
		if underWay(f.job) && (unnamed || f.log.Lacks(e.Attempt, e.Finished.LogLength) > 0) &&
			d.incomplete(builder, w, f, in, "all output and artifacts") {
			return nil
		}
		return d.finished(ctx, builder, w, f, *e.Finished)
	default: // of a later version of the protocol, and no more than a hint
		return nil
	}
}

// hello begins a generation, or tells that the runner was started anew, or
// whether the VM can build has changed.
func (d *Dispatcher) hello(ctx context.Context, builder string, w *worker, h pipe.Hello) error {
	d.cfg.Log.Info("builder says hello", zap.String("builder", builder), zap.String("image", h.Image),
		zap.String("runner", h.Runner), zap.Int("slots", h.Slots), zap.Strings("systems", h.Systems),
		zap.Int64("free_bytes", h.Free), zap.String("generation", string(h.Generation)))
	w.hello, w.why = &h, ""
	doubted, replaced, begun := w.missing, w.replaced(h.Generation), w.position.Generation != h.Generation
	w.missing = make(map[pipe.JobRef]bool)
	listed := make(map[pipe.JobRef]bool, len(h.Jobs))
	for _, r := range h.Jobs {
		listed[r] = true
	}
	for _, f := range slices.Clone(d.order) {
		if f.job.Builder != builder {
			continue
		}
		doubt := replaced || doubted[ref(f.job)] || begun && f.unread
		f.unread = f.unread && !begun
		if err := d.greeted(ctx, builder, w, f, listed[ref(f.job)], doubt); err != nil {
			return err
		}
	}
	if err := d.toldRestored(ctx, builder, w); err != nil {
		return err
	}
	if err := d.ownerChanged(ctx, builder, w); err != nil || !w.caughtUp {
		return err
	}
	d.leftovers(ctx, builder, w)
	return nil
}

// greeted takes what a hello says, or doesn't, of a job. With doubt the VM may
// have another data disk than the one that the job's request was written to.
func (d *Dispatcher) greeted(ctx context.Context, builder string, w *worker, f *flight, here, doubt bool) error {
	switch {
	case f.job.State == job.Sending && here:
		// It has the job, and said so where we could not read it.
		return d.update(ctx, f, job.Accepted, "the VM lists it", func(j *job.Job) { j.Why = "" })
	case here:
		return nil
	case f.job.State == job.Running, f.job.State == job.Sending && f.sent && doubt,
		// Written twice, a request may have been refused and then accepted all the same.
		f.job.Deferred() && doubt:
		if w.caughtUp {
			return d.lost(ctx, builder, w, f)
		}
		// The record may be ahead of what is read: after a checkpoint was
		// lost, of a hello that is older than the job.
		w.missing[ref(f.job)] = true
	}
	return nil
}

// replaced reports that a hello may come from another data disk than what was
// read before: on one disk each generation has a higher number than the one
// before it, and what of that was not read stays. Where nothing is known to
// have been read nobody can tell.
func (w *worker) replaced(next pipe.Generation) bool {
	before := w.position.Generation
	return before == "" || before != next && !later(next, before)
}

// underWay reports that a VM has the job, or is about to.
func underWay(j job.Job) bool { return j.State == job.Running || j.State == job.Sending }

// splitKey takes apart the key of a request about a job.
func splitKey(key string) (kind pipe.Kind, id job.ID, attempt int) {
	k, rest, _ := strings.Cut(key, "/")
	i, a, ok := strings.Cut(rest, "/")
	n, err := strconv.Atoi(a)
	if !ok || err != nil {
		return pipe.Kind(k), "", 0
	}
	return pipe.Kind(k), job.ID(i), n
}

// answered ends the wait for an answer, if key is that of the request, and
// reports whether it is.
func (w *worker) answered(key string) bool {
	if w.waiting == nil || w.waiting.key != key {
		return false
	}
	w.told = w.waiting.stored
	w.waiting, w.unanswered = nil, 0
	return true
}

// accepted takes an answer, which was said in a generation.
func (d *Dispatcher) accepted(ctx context.Context, builder string, w *worker, key string, in pipe.Generation) error {
	ours := w.answered(key)
	if owner, ok := strings.CutPrefix(key, string(pipe.KindTakeOver)+"/"); ok {
		d.cfg.Log.Info("builder taken over", zap.String("builder", builder), zap.String("owner", owner))
		return d.ownedBy(ctx, builder, w, owner)
	}
	if ours { // nobody else's is accepted
		if err := d.ownedBy(ctx, builder, w, d.cfg.Owner); err != nil {
			return err
		}
	}
	if key == (pipe.Header{Kind: pipe.KindRepeat, Owner: d.cfg.Owner}).Key() {
		d.repeatsNow(builder, w, in)
		return nil
	}
	return d.acceptedJob(ctx, builder, w, key)
}

// acceptedJob takes the answer to a request about a job.
func (d *Dispatcher) acceptedJob(ctx context.Context, builder string, w *worker, key string) error {
	kind, id, attempt := splitKey(key)
	at := pipe.JobRef{Job: string(id), Attempt: attempt}
	if kind == pipe.KindAcknowledge {
		w.forgot(at)
	}
	f, ours := d.flights[id]
	if kind == pipe.KindCancel { // given up, and then cancelled, it can be on either account
		w.abandonedEnds(at)
		if ours && f.job.Builder == builder && f.job.Attempt == attempt {
			f.recalled = true
		}
		return nil
	}
	if ours && kind == pipe.KindJob && d.left(f.job, builder, at) {
		w.abandon(at)
		return nil
	}
	if !ours || f.job.Builder != builder || f.job.Attempt != attempt {
		return nil
	}
	delete(w.missing, ref(f.job))
	switch {
	case kind == pipe.KindJob && (f.job.State == job.Sending || f.job.Deferred()):
		// Deferred after a refusal, it can be the answer to the same request
		// written again: the VM has the job.
		w.tookJob(builder, f)
		return d.update(ctx, f, job.Accepted, "", func(j *job.Job) { j.Why = "" })
	case kind == pipe.KindAcknowledge && f.job.State.Terminal():
		j := f.job
		j.Acknowledged = true
		if err := d.write(ctx, f, j); err != nil {
			return err
		}
		d.remove(f)
	}
	return nil // a repeat, or what nobody asked for
}

func (d *Dispatcher) refused(ctx context.Context, builder string, w *worker, r pipe.Refused) error {
	asked := w.answered(r.Request)
	kind, id, attempt := splitKey(r.Request)
	f, ours := d.flights[id]
	ours = ours && f.job.Builder == builder && f.job.Attempt == attempt
	log := d.cfg.Log.With(zap.String("builder", builder), zap.String("request", r.Request),
		zap.String("reason", string(r.Reason)), zap.String("said", r.Message))

	if ours && kind == pipe.KindJob && f.job.Deferred() && w.missing[ref(f.job)] {
		// Read again: this is the data disk that its request was written to.
		delete(w.missing, ref(f.job))
		if err := d.waits(ctx, f, r.Message); err != nil {
			return err
		}
	}
	switch {
	case r.Reason == pipe.ReasonOwner && r.OwnedBy == d.cfg.Owner:
		d.stranger(builder, w, r)
	case r.Reason == pipe.ReasonOwner:
		if asked {
			log.Warn("request refused: the builder is another sidecar's")
			w.refuse(d.cfg.Now(), d.cfg.RetryAfter)
		}
		if err := d.ownedBy(ctx, builder, w, r.OwnedBy); err != nil {
			return err
		}
		if ours && kind == pipe.KindJob && f.job.State == job.Sending {
			return d.withdrawn(ctx, f, cmp.Or(d.whose(builder, w), r.Message))
		}
	case kind == pipe.KindJob && ours && f.job.State == job.Sending:
		log.Warn("request refused")
		if r.Reason == pipe.ReasonConflict {
			// The VM has this very attempt, from a sidecar that wrote it in
			// other words, before an upgrade. It runs there.
			return d.update(ctx, f, job.Accepted, r.Message, nil)
		}
		if f.job.Cancel != nil {
			return d.cancelled(ctx, f, f.job.Cancel)
		}
		if !r.Retryable {
			return d.fail(ctx, w, f, r.Message)
		}
		if r.Reason == pipe.ReasonInputs {
			// Gone with a disk, or damaged on it: a later upload can't build on them.
			f.uploaded, f.fresh = delivered{}, true
		}
		w.refuseJob(builder, f, r.Reason, d.cfg.Now(), d.cfg.RetryAfter)
		return d.update(ctx, f, job.Deferred, r.Message, func(j *job.Job) { j.Why = r.Message })
	case kind == pipe.KindRepeat && asked:
		d.repeatRefused(w, r, log)
	case asked && (kind == pipe.KindAcknowledge || kind == pipe.KindCancel && !ours):
		d.ackRefused(w, pipe.JobRef{Job: string(id), Attempt: attempt}, r, log)
	case kind == pipe.KindCancel && ours:
		d.recallRefused(f, log)
		d.ackRefused(w, ref(f.job), r, log)
	case d.unnamedRefusal(w, r, log):
	default:
		log.Info("builder refused what lay in pipe_in")
	}
	return nil
}

func (d *Dispatcher) started(ctx context.Context, f *flight, e pipe.Event) error {
	if !underWay(f.job) || !f.job.Started.IsZero() {
		return nil
	}
	d.cfg.Log.Info("job started", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
		zap.String("builder", f.job.Builder), zap.Int("slot", e.Started.Slot))
	f.pulse = pulse{}
	f.pulse.heard(d.cfg.Now(), nil)
	j := f.job
	j.Started = e.Time
	if now := d.cfg.Now(); j.Started.After(now) {
		j.Started = now.UTC() // the VM's clock is its own
	}
	return d.write(ctx, f, j)
}

func (d *Dispatcher) artifact(f *flight, a pipe.Artifact) error {
	if !underWay(f.job) {
		return nil
	}
	if slices.ContainsFunc(f.job.Artifacts, func(b pipe.Artifact) bool { return a.Name == b.Name }) {
		return nil
	}
	d.cfg.Log.Info("artifact ready", zap.String("job", f.job.Name), zap.String("artifact", a.Name),
		zap.Int64("bytes", a.Size), zap.String("sha256", a.SHA256), zap.String("download", a.Download))
	f.job.Artifacts = append(f.job.Artifacts, a)
	f.unsaved = true // there can be thousands: written with the checkpoint, or with the outcome
	return nil
}

func (d *Dispatcher) finished(ctx context.Context, builder string, w *worker, f *flight, r pipe.Finished) error {
	if !underWay(f.job) {
		return nil
	}
	if n := len(f.job.Artifacts); r.Status == pipe.StatusSucceeded && n < r.Artifacts {
		// Said twice, and short both times.
		r.Status, r.Reason = pipe.StatusFailed, fmt.Sprintf("the VM named %d of its %d artifacts", n, r.Artifacts)
	}
	if err := f.log.Finish(r.LogLength); err != nil {
		return fmt.Errorf("finish log of job %s: %w", f.job.ID, err)
	}
	// Once collecting, the job is published from its log as it lies on disk, and
	// a restart cuts the log to the checkpoint: so the checkpoint goes first.
	if err := d.save(ctx, builder, w); err != nil {
		return err
	}
	if r.Status == pipe.StatusInterrupted {
		return d.interrupted(ctx, f, r.Reason)
	}
	if r.Status == pipe.StatusCancelled && f.job.Cancel != nil && f.job.Cancel.Reason != "" {
		r.Reason = f.job.Cancel.Reason // who asked for it; the VM knows only that it was asked
	}
	failure, reported := job.ReportedFailure(r.Report)
	if reported && r.Status == pipe.StatusFailed && r.Reason == "" {
		r.Reason = failure.Text()
	}
	d.cfg.Log.Info("job finished", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
		zap.String("status", string(r.Status)), exitCode(r), said("signal", r.Signal), said("reason", r.Reason),
		zap.Duration("duration", time.Duration(r.Duration)*time.Millisecond))
	return d.update(ctx, f, job.Finished, r.Reason, func(j *job.Job) { j.Result, j.Why = &r, "" })
}

// said is a field that is left out where there is nothing to say.
func said(key, value string) zap.Field {
	if value == "" {
		return zap.Skip()
	}
	return zap.String(key, value)
}

func exitCode(r pipe.Finished) zap.Field {
	if r.ExitCode == nil {
		return zap.Skip()
	}
	return zap.Int("exit_code", *r.ExitCode)
}

// interrupted ends an attempt that the VM's death ended: the next one waits,
// up to a limit.
func (d *Dispatcher) interrupted(ctx context.Context, f *flight, reason string) error {
	if reason == "" {
		reason = "the VM stopped under it"
	}
	log := d.cfg.Log.With(zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
		zap.Int("attempt", f.job.Attempt), zap.String("reason", reason))
	if f.job.Cancel != nil {
		return d.cancelled(ctx, f, f.job.Cancel)
	}
	if f.job.Interruptions()+1 >= job.MaxAttempts {
		log.Warn("job interrupted, no attempt left", zap.Int("attempts", job.MaxAttempts))
		return d.update(ctx, f, job.Finished, reason, func(j *job.Job) {
			j.Result = &pipe.Finished{Status: pipe.StatusInterrupted, Reason: reason}
		})
	}
	log.Warn("job interrupted, it runs again")
	if w := d.workers[f.job.Builder]; w != nil {
		w.acknowledge(ref(f.job)) // the next attempt may run elsewhere
	}
	return d.update(ctx, f, job.Interrupted, reason, nil)
}

// fail ends a job that no VM can run.
func (d *Dispatcher) fail(ctx context.Context, w *worker, f *flight, reason string) error {
	if err := d.save(ctx, f.job.Builder, w); err != nil {
		return err
	}
	d.cfg.Log.Warn("job failed before it ran", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
		zap.String("reason", reason))
	return d.update(ctx, f, job.Finished, reason, func(j *job.Job) {
		j.Result, j.Why = &pipe.Finished{Status: pipe.StatusFailed, Reason: reason}, ""
	})
}
