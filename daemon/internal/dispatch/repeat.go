package dispatch

import (
	"context"
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

const (
	// quickRepeats are asked for as soon as there is a reason; with more of
	// them, the pauses grow.
	quickRepeats = 5
	// repeatPause is the longest of them, and what makes a row of repeats end.
	repeatPause = 10 * time.Minute
)

// A repeat is what the VM has to be asked for, or was: to tell everything
// about every job again, since from a place on it can't be read.
type repeat struct {
	place     pipe.Position
	notBefore time.Time // of the next request
}

// Damaged implements the link's sink: what the builder said from place on
// can't be read, and reading goes on behind it. What of it counts has to be
// told again, output from its beginning; the logs take of it what they lack.
func (d *Dispatcher) Damaged(ctx context.Context, builder string, place pipe.Position, reason error) error {
	return d.do(ctx, func(ctx context.Context) error {
		w, err := d.worker(builder)
		if err != nil {
			return err
		}
		log := d.cfg.Log.With(zap.String("builder", builder), zap.String("generation", string(place.Generation)),
			zap.Int64("offset", place.Offset), zap.Error(reason))
		if d.cfg.Gone != nil && errors.Is(reason, d.cfg.Gone) {
			for _, f := range d.order {
				f.unread = f.unread || f.job.Builder == builder
			}
		}
		switch {
		case w.foreign(d.cfg.Owner):
			log.Warn("events of a builder that another sidecar owns can't be read; they are passed over")
			return nil
		case w.repeat != nil && w.repeat.place.Generation == place.Generation:
			log.Debug("more events of the same generation can't be read")
			return nil
		}
		d.askAgain(w, place, log)
		// On disk before reading goes on behind the place.
		return d.save(ctx, builder, w)
	})
}

// askAgain has the VM asked to repeat, at once unless that happens often.
func (d *Dispatcher) askAgain(w *worker, place pipe.Position, log *zap.Logger) {
	now := d.cfg.Now()
	if now.Sub(w.repeated) > repeatPause {
		w.repeats = 0
	}
	pause := time.Duration(0)
	if w.repeats >= quickRepeats {
		pause = min(d.cfg.RetryAfter<<min(w.repeats-quickRepeats, 10), repeatPause)
	}
	w.repeats++
	w.repeated = now.Add(pause)
	w.repeat = &repeat{place: place, notBefore: w.repeated}
	w.waiting = nil // its answer may be among what can't be read; it is written again
	w.dirty = true
	log.Warn("events of the builder can't be read; it is asked to tell everything again, and nothing is lost")
	if pause > 0 {
		log.Error("this happens again and again: somebody writes to /nexus_bootstrap in the VM besides its runner; the builder is asked less often",
			zap.Int("try", w.repeats), zap.Duration("in", pause))
	}
}

// repeatDue reports whether the request to repeat is the next one.
func (w *worker) repeatDue(now time.Time) bool {
	return w.repeat != nil && !now.Before(w.repeat.notBefore)
}

// askRepeat writes the request to repeat. Unanswered, it lets others pass
// before it is written again.
func (d *Dispatcher) askRepeat(ctx, work context.Context, name string, w *worker) error {
	// It tells the VM that what is before the place is stored.
	if err := d.save(ctx, name, w); err != nil {
		return err
	}
	place := w.repeat.place
	w.repeat.notBefore = d.cfg.Now().Add(2 * d.cfg.AnswerTimeout)
	return d.send(work, w, pipe.Header{Kind: pipe.KindRepeat, Owner: d.cfg.Owner, Consumed: &place}, nil)
}

// repeatsNow notes that the VM tells everything again: it says so in a
// generation that it began for it.
func (d *Dispatcher) repeatsNow(builder string, w *worker, in pipe.Generation) {
	if w.repeat == nil || in == w.repeat.place.Generation {
		return
	}
	w.repeat, w.dirty = nil, true
	log := d.cfg.Log.With(zap.String("builder", builder))
	log.Info("builder tells everything again", zap.String("generation", string(in)))
	for _, f := range d.order {
		// What of it came before this answer was taken for the old one's.
		if f.job.Builder == builder && f.gap.in == in {
			f.gap.final = in
			if w.repeat == nil {
				d.askAgain(w, w.position, log)
			}
		}
	}
}

// A gap is where a job's events go on without what was before.
type gap struct {
	in    pipe.Generation // in which an event was left for a repetition
	asked bool            // on this job's account
	final pipe.Generation // was repeated in, and lacked it, too: what comes after is taken as it is
}

// repeatRefused puts the request off.
func (d *Dispatcher) repeatRefused(w *worker, r pipe.Refused, log *zap.Logger) {
	if w.repeat == nil {
		return
	}
	pause := maxPause
	if !r.Retryable {
		pause = repeatPause
	}
	w.repeat.notBefore = d.cfg.Now().Add(pause)
	log.Error("the builder does not tell again what can't be read; if its image is older than this sidecar, make it anew: docker compose up -d --build vmimage, then restart the VM",
		zap.Duration("in", pause))
}

// incomplete reports that something before this event of a job is missing,
// and that the VM is going to repeat both: then the event is not for now. What
// is missing in the repetition, too, is missing for good.
func (d *Dispatcher) incomplete(builder string, w *worker, f *flight, in pipe.Generation, what string) bool {
	switch {
	case w.foreign(d.cfg.Owner): // it would not listen
		return false
	case f.gap.final != "" && f.gap.final != in:
		return false
	case w.repeat == nil && f.gap.asked:
		return false
	}
	f.gap.in = in
	if w.repeat == nil {
		f.gap.asked = true
		d.askAgain(w, w.position, d.cfg.Log.With(zap.String("builder", builder), zap.String("job", f.job.Name),
			zap.String("id", string(f.job.ID)), zap.String("reason", "the VM did not name "+what)))
	}
	return true
}

// CaughtUp implements the link's sink: all that the builder had said is read.
// Jobs that a hello did not list, and that nothing was said of since, are lost.
func (d *Dispatcher) CaughtUp(ctx context.Context, builder string) error {
	return d.do(ctx, func(ctx context.Context) error {
		w, err := d.worker(builder)
		if err != nil {
			return err
		}
		w.current = w.up
		if w.caughtUp || w.hello == nil {
			return nil
		}
		w.caughtUp = true
		if w.repeat != nil {
			return nil // what can't be read may tell of them: the next hello counts
		}
		for _, f := range slices.Clone(d.order) {
			if w.missing[ref(f.job)] {
				if err := d.lost(ctx, builder, w, f); err != nil {
					return err
				}
			}
		}
		d.leftovers(ctx, builder, w)
		return nil
	})
}

// lost ends the attempt of a job that its VM doesn't know.
func (d *Dispatcher) lost(ctx context.Context, builder string, w *worker, f *flight) error {
	delete(w.missing, ref(f.job))
	w.dirty = true
	switch {
	case f.job.Builder != builder:
		return nil
	case f.job.State == job.Running:
		return d.interrupted(ctx, f, "the VM no longer knows the job: its data disk was lost or replaced")
	case f.job.State == job.Sending:
		// Its request may lie there still, and be accepted yet.
		defer w.abandon(ref(f.job))
		return d.interrupted(ctx, f, "the VM's data disk was lost or replaced before it answered: it may have run the job")
	case f.job.Deferred():
		j := f.job
		j.Builder, j.Why = "", "" // the next claim is another attempt
		return d.write(ctx, f, j)
	}
	return nil
}

// leftovers has the VM end and forget attempts that are over for us: of jobs
// that went on elsewhere, say, or whose records are lost.
func (d *Dispatcher) leftovers(ctx context.Context, builder string, w *worker) {
	for _, r := range w.hello.Jobs {
		if f := d.flights[job.ID(r.Job)]; f != nil {
			d.leftover(builder, w, r, f.job)
		} else if j, err := d.cfg.Store.Get(ctx, job.ID(r.Job)); err == nil {
			d.leftover(builder, w, r, j)
		} else {
			d.unrecorded(builder, w, r, err)
		}
	}
}

// leftover does that for one attempt of a job.
func (d *Dispatcher) leftover(builder string, w *worker, r pipe.JobRef, j job.Job) {
	switch {
	case r == ref(j) && j.Builder == builder && j.Settled():
		w.acknowledge(r)
	case d.left(j, builder, r):
		w.abandon(r)
	}
}

// left reports that a job goes on, or went on, with another attempt than the
// one that a builder says it has.
func (d *Dispatcher) left(j job.Job, builder string, r pipe.JobRef) bool {
	switch {
	case r.Attempt != j.Attempt:
		return r.Attempt < j.Attempt
	case j.State == job.Queued && !j.Restored: // of one that was refused, it may be the next answer
		return !j.Deferred() || j.Builder == ""
	}
	return d.elsewhere(j, builder)
}

// elsewhere reports that a job is at another builder of the project. One that
// left it may be this one, under another name.
func (d *Dispatcher) elsewhere(j job.Job, builder string) bool {
	return j.Builder != builder && d.workers[j.Builder] != nil && !j.Restored && j.State != job.Queued
}

// unrecorded deals with a job of the builder's that can't be read here.
func (d *Dispatcher) unrecorded(builder string, w *worker, r pipe.JobRef, err error) {
	log := d.cfg.Log.With(zap.String("builder", builder), zap.String("id", r.Job), zap.Int("attempt", r.Attempt), zap.Error(err))
	if d.cfg.NotFound == nil || !errors.Is(err, d.cfg.NotFound) || !d.cfg.Begun(job.Job{ID: job.ID(r.Job)}) {
		log.Debug("the builder has a job that is not on record here")
		return
	}
	log.Warn("the builder has a job whose record is lost: it is cancelled there")
	w.abandon(r)
}

// ref names the attempt that a job is at.
func ref(j job.Job) pipe.JobRef { return pipe.JobRef{Job: string(j.ID), Attempt: j.Attempt} }
