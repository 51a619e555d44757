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

// A record that comes from a copy of the store may be behind: since the copy
// was made the job can have been sent, have run, ended and been published.
// Until that is found out it waits, marked with job.Restored:
//
//   - What is published has its outcome in output/.
//   - What a VM has it lists, asked to tell everything again: the job goes on
//     with the attempt that is there, the highest one if several have it. So
//     all have to be heard first.
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
	var silent []string
	for _, name := range d.builderNames() {
		switch w := d.workers[name]; {
		case w.toldAll || w.foreign(d.cfg.Owner):
		case w.why != "":
			silent = append(silent, name+" ("+w.why+")")
		default:
			silent = append(silent, name)
		}
	}
	return strings.Join(silent, " and ") + " to say what it has of it, since its record comes from a copy; " +
		"osbuilder retry goes on without, or ends it if it is to be cancelled"
}

// toldRestored notes that a builder lists all that it has, in answer to that.
func (d *Dispatcher) toldRestored(ctx context.Context, builder string, w *worker) error {
	if w.repeat == nil || !w.asked || !later(w.hello.Generation, w.repeat.place.Generation) {
		return nil
	}
	w.toldAll = true
	return d.decideRestored(ctx, builder)
}

// decideRestored says of each job that waits for it where it goes on, once all
// builders have told what they have. One that can't be asked, since it is
// another's, has none of ours to tell of. telling is the builder whose hello,
// and all that it tells again, is being read; empty if none is.
func (d *Dispatcher) decideRestored(ctx context.Context, telling string) error {
	if !d.restored() {
		return nil
	}
	for _, w := range d.workers {
		if !w.toldAll && !w.foreign(d.cfg.Owner) {
			return nil
		}
	}
	for _, f := range slices.Clone(d.order) {
		if !f.job.Restored {
			continue
		}
		var err error
		if name, attempt := d.holder(f); name != "" {
			err = d.adopt(ctx, f, name, attempt, name == telling)
		} else {
			err = d.release(ctx, f)
		}
		if err != nil {
			return err
		}
	}
	for name, w := range d.workers {
		if name != telling && w.toldAll { // that one's turn comes when its hello is through
			d.leftovers(ctx, name, w)
		}
	}
	return nil
}

// holder returns the builder that has the highest attempt of a job, and which
// that is. Attempts before the recorded one are over.
func (d *Dispatcher) holder(f *flight) (name string, attempt int) {
	for _, builder := range d.builderNames() {
		w := d.workers[builder]
		if !w.toldAll {
			continue
		}
		for _, r := range w.hello.Jobs {
			if r.Job == string(f.job.ID) && r.Attempt >= f.job.Attempt && r.Attempt > attempt {
				name, attempt = builder, r.Attempt
			}
		}
	}
	return name, attempt
}

// adopt goes on with an attempt that a builder has. What the builder told of it
// nobody took so far: unless it is about to be read, it is asked for again.
func (d *Dispatcher) adopt(ctx context.Context, f *flight, builder string, attempt int, telling bool) error {
	w := d.workers[builder]
	if !telling {
		if w.repeat == nil {
			w.repeat = &repeat{place: w.position}
		}
		// On disk before the record: a job that counts as found is not asked for again.
		if err := d.save(ctx, builder, w); err != nil {
			return err
		}
	}
	if f.log != nil {
		if err := f.log.Close(); err != nil {
			return fmt.Errorf("close log of job %s: %w", f.job.ID, err)
		}
	}
	// Its output is told from the beginning.
	if err := d.openLog(f, job.Mark{Attempt: attempt, Again: true}); err != nil {
		return err
	}
	d.cfg.Log.Info("builder has a job whose record comes from a copy: it goes on", zap.String("builder", builder),
		zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.Int("attempt", attempt))
	return d.update(ctx, f, job.Found, "on "+builder, func(j *job.Job) {
		j.Restored, j.Why, j.Builder, j.Attempt = false, "", builder, attempt
		j.Artifacts, j.Result, j.Started = nil, nil, time.Time{}
		j.Image, j.Runner = w.hello.Image, w.hello.Runner
		j.History[len(j.History)-1].Attempt = attempt
	})
}

func later(a, b pipe.Generation) bool {
	n, ok := a.Number()
	m, known := b.Number()
	return ok && (!known || n > m)
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
