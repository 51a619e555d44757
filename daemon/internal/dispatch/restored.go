package dispatch

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// A record that comes from a copy of the store may be behind: since the copy
// was made the job can have been sent, have run, ended and been published.
// Until that is found out it waits, marked with job.Restored:
//
//   - What is published has its outcome in output/.
//   - What a VM has it lists, asked to tell everything again: the job goes on
//     with the attempt that is there.
//   - What none has counts on from an attempt that nobody can have had.

// untouched is added to the attempts of a job that may have had more of them
// than its record says: so no attempt runs twice.
const untouched = 100

// takeUpRestored begins to find out what became of a job.
func (d *Dispatcher) takeUpRestored(ctx context.Context, f *flight) error {
	log := d.cfg.Log.With(zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)))
	outcome, published, err := d.cfg.Published(f.job)
	if err != nil {
		log.Warn("output/ does not say whether the job is published", zap.Error(err))
	}
	switch {
	case published:
		f.asLeft = true
		log.Info("job is published already, as output/ says", zap.String("status", string(outcome.Result.Status)))
		return d.update(ctx, f, job.Finished, "found in output/", func(j *job.Job) {
			j.Restored, j.Why, j.Result = false, "", &outcome.Result
			j.Attempt, j.Builder, j.Artifacts = max(j.Attempt, outcome.Attempt), outcome.Builder, nil
		})
	case f.job.State == job.Collecting: // it has its outcome
		j := f.job
		j.Restored = false
		return d.write(ctx, f, j)
	}
	f.asLeft = true
	log.Info("record of the job comes from a copy: what became of it since is found out", zap.Int("attempt", f.job.Attempt))
	return nil
}

// restored reports whether jobs wait for what a builder has to say of them.
func (d *Dispatcher) restored() bool {
	return slices.ContainsFunc(d.order, func(f *flight) bool { return f.job.Restored })
}

// askOfRestored has a builder tell everything again, once it has been read to
// its end.
func (d *Dispatcher) askOfRestored(w *worker) {
	if w.toldAll || w.repeat != nil || !w.caughtUp || !d.restored() {
		return
	}
	w.repeat, w.dirty, w.asked = &repeat{place: w.position}, true, true
}

// whyRestored says why a job waits to be found out about.
func (d *Dispatcher) whyRestored() string {
	why := "a VM's word of what it has of it, since its record comes from a copy"
	for _, name := range d.builderNames() {
		if w := d.workers[name]; !w.toldAll && w.why != "" {
			return why + ": " + w.why
		}
	}
	return why
}

// findRestored looks for jobs in what a builder lists in answer to that.
func (d *Dispatcher) findRestored(ctx context.Context, builder string, w *worker) error {
	if w.repeat == nil || !w.asked || !later(w.hello.Generation, w.repeat.place.Generation) {
		return nil
	}
	for _, r := range w.hello.Jobs {
		f := d.flights[job.ID(r.Job)]
		if f == nil || r.Attempt < f.job.Attempt {
			continue
		}
		// Of two builders that have it, the one with the later attempt counts.
		further := f.found && r.Attempt > f.job.Attempt && underWay(f.job)
		if !f.job.Restored && !further {
			continue
		}
		if f.log != nil {
			if err := f.log.Close(); err != nil {
				return fmt.Errorf("close log of job %s: %w", f.job.ID, err)
			}
		}
		// Its output is told from the beginning.
		if err := d.openLog(f, job.Mark{Attempt: r.Attempt, Again: true}); err != nil {
			return err
		}
		f.found = true
		d.cfg.Log.Info("builder has a job whose record comes from a copy: it goes on", zap.String("builder", builder),
			zap.String("job", f.job.Name), zap.String("id", r.Job), zap.Int("attempt", r.Attempt))
		if err := d.update(ctx, f, job.Found, "on "+builder, func(j *job.Job) {
			j.Restored, j.Why, j.Builder, j.Attempt = false, "", builder, r.Attempt
			j.Artifacts, j.Result, j.Started = nil, nil, time.Time{}
			j.Image, j.Runner = w.hello.Image, w.hello.Runner
			if step := &j.History[len(j.History)-1]; step.Event == job.Found {
				step.Attempt = r.Attempt
			}
		}); err != nil {
			return err
		}
	}
	return nil
}

func later(a, b pipe.Generation) bool {
	n, ok := a.Number()
	m, known := b.Number()
	return ok && (!known || n > m)
}

// releaseRestored lets the jobs go that no builder has, once all have told.
// One that can't be asked, since it is another's, has none of ours to tell of.
func (d *Dispatcher) releaseRestored(ctx context.Context) error {
	for _, w := range d.workers {
		if !w.toldAll && !w.foreign(d.cfg.Owner) {
			return nil
		}
	}
	for _, f := range slices.Clone(d.order) {
		if f.job.Restored {
			if err := d.release(ctx, f); err != nil {
				return err
			}
		}
	}
	return nil
}

// release lets a job be claimed again that no builder is known to have.
func (d *Dispatcher) release(ctx context.Context, f *flight) error {
	if f.job.Cancel != nil {
		j := f.job
		j.Restored = false
		if err := d.write(ctx, f, j); err != nil {
			return err
		}
		return d.cancelled(ctx, f, f.job.Cancel)
	}
	attempt, reason := f.job.Attempt, "no VM has it"
	if attempt > 0 || d.cfg.Begun(f.job) {
		attempt = (attempt/untouched + 1) * untouched
		reason = fmt.Sprintf("no VM has it; its attempts go on from %d, which none can have been", attempt)
		if f.log == nil {
			if err := d.openLog(f, job.Mark{Attempt: max(f.job.Attempt, 1), Whole: true}); err != nil {
				return err
			}
		}
	}
	return d.update(ctx, f, job.Restored, reason, func(j *job.Job) { j.Restored, j.Why, j.Attempt = false, "", attempt })
}
