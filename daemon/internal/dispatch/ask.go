package dispatch

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// What Cancel, Retry and Prioritize refuse with. The job is as it was.
var (
	// ErrUnknown: no such job is in flight: it is settled, or there is none.
	ErrUnknown = errors.New("not in flight")
	// ErrEnded: how the job ended is known.
	ErrEnded = errors.New("already ended")
	// ErrRunning: the job runs, so there is nothing to try again.
	ErrRunning = errors.New("is running")
)

// Cancel makes that a job does not run, or not run on, and returns it. One
// that no VM has, or one whose VM is not there any more, ends at once, another
// one when its VM has said so. The wish is on record when it returns.
// Repeated, it changes nothing.
func (d *Dispatcher) Cancel(ctx context.Context, id job.ID, reason string) (job.Job, error) {
	return d.ask(ctx, id, func(ctx context.Context, f *flight) error {
		switch {
		case ended(f.job) && f.job.Cancel != nil && f.job.Result.Status == pipe.StatusCancelled:
			return nil
		case d.unreachable(f.job): // whatever was wished before
		case ended(f.job):
			return ErrEnded
		case f.job.Cancel != nil:
			return nil
		}
		wish := &job.CancelWish{Time: d.cfg.Now().UTC(), Reason: reason}
		if f.stopUpload != nil {
			f.stopUpload()
		}
		switch {
		case f.job.State == job.Queued && !f.job.Restored, f.job.State == job.Sending && !f.sent, underWay(f.job) && d.gone(f.job):
			return d.cancelled(ctx, f, wish)
		case f.job.State == job.Collecting:
			return d.givenUp(ctx, f, wish)
		}
		d.cfg.Log.Info("job is to be cancelled", zap.String("job", f.job.Name), zap.String("id", string(id)),
			zap.String("state", string(f.job.State)), said("reason", reason))
		return d.update(ctx, f, job.CancelAsked, reason, func(j *job.Job) { j.Cancel = wish })
	})
}

// Retry tries at once what a job waits to be tried again: its request, its
// upload, or the bringing of its outcome into output/.
func (d *Dispatcher) Retry(ctx context.Context, id job.ID) (job.Job, error) {
	return d.ask(ctx, id, func(ctx context.Context, f *flight) error {
		switch {
		case f.job.State.Terminal():
			return ErrEnded
		case f.job.State == job.Running:
			return ErrRunning
		}
		if f.job.Restored {
			return d.release(ctx, f)
		}
		if w := d.workers[f.job.Builder]; w != nil && w.current && w.missing[ref(f.job)] {
			if err := d.lost(ctx, f.job.Builder, w, f); err != nil {
				return err
			}
		}
		f.notBefore, f.refused = time.Time{}, nil
		if f.job.State != job.Collecting {
			for _, w := range d.workers {
				w.notBefore, w.claimBefore, w.refusals, w.refusedLast = time.Time{}, time.Time{}, 0, ""
			}
		}
		return d.update(ctx, f, job.RetryAsked, "", nil)
	})
}

// Prioritize says which of the waiting jobs is next. For a job that runs it
// holds should it have to run again.
func (d *Dispatcher) Prioritize(ctx context.Context, id job.ID, priority int) (job.Job, error) {
	return d.ask(ctx, id, func(ctx context.Context, f *flight) error {
		switch {
		case ended(f.job):
			return ErrEnded
		case f.job.Priority == priority:
			return nil
		}
		return d.update(ctx, f, job.PriorityChanged, fmt.Sprintf("from %d to %d", f.job.Priority, priority),
			func(j *job.Job) { j.Priority = priority })
	})
}

// Take makes a job known that was recorded by somebody else than the inbox.
func (d *Dispatcher) Take(ctx context.Context, id job.ID) error {
	return d.do(ctx, func(ctx context.Context) error { return d.take(ctx, id) })
}

// Heal writes the record of a job in flight anew, as it is known here: for one
// that was found damaged in the store. ErrUnknown: it is not in flight.
func (d *Dispatcher) Heal(ctx context.Context, id job.ID) error {
	unknown := make(chan bool, 1) // the caller may leave before it is answered
	err := d.do(ctx, func(ctx context.Context) error {
		f := d.flights[id]
		unknown <- f == nil
		if f == nil {
			return nil
		}
		return d.write(ctx, f, f.job)
	})
	if err == nil && <-unknown {
		err = fmt.Errorf("job %s: %w", id, ErrUnknown)
	}
	return err
}

// InFlight returns the jobs that are not settled, those that wait in the
// order in which they will be claimed.
func (d *Dispatcher) InFlight(ctx context.Context) ([]job.Job, error) {
	jobs := make(chan []job.Job, 1)
	err := d.do(ctx, func(context.Context) error {
		all := make([]job.Job, len(d.order))
		for i, f := range d.order {
			all[i] = f.job
		}
		jobs <- all
		return nil
	})
	if err != nil {
		return nil, err
	}
	return <-jobs, nil
}

func ended(j job.Job) bool { return j.State.Terminal() || j.State == job.Collecting }

// ask runs f on the owner's goroutine for a job in flight. What f refuses is
// the caller's; any other error of it stops Run.
func (d *Dispatcher) ask(ctx context.Context, id job.ID, f func(context.Context, *flight) error) (job.Job, error) {
	type answer struct {
		job job.Job
		err error
	}
	answers := make(chan answer, 1) // the caller may leave before it is answered
	err := d.do(ctx, func(ctx context.Context) error {
		// It may be on record, and the inbox's word of it still under way.
		if err := d.take(ctx, id); err != nil {
			return err
		}
		asked := d.flights[id]
		if asked == nil {
			answers <- answer{err: ErrUnknown}
			return nil
		}
		err := f(ctx, asked)
		answers <- answer{asked.job, err}
		if errors.Is(err, ErrEnded) || errors.Is(err, ErrRunning) {
			return nil
		}
		return err
	})
	if err != nil {
		return job.Job{}, err
	}
	a := <-answers
	if a.err != nil {
		return a.job, fmt.Errorf("job %s: %w", id, a.err)
	}
	return a.job, nil
}

// cancelled ends a job that no VM is to run: none has it, or the one that had
// it is done with it.
func (d *Dispatcher) cancelled(ctx context.Context, f *flight, wish *job.CancelWish) error {
	// As with every outcome, the log's checkpoint goes first.
	if w := d.workers[f.job.Builder]; w != nil && f.log != nil {
		if err := d.save(ctx, f.job.Builder, w); err != nil {
			return err
		}
	}
	d.cfg.Log.Info("job cancelled", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
		zap.String("state", string(f.job.State)), said("reason", wish.Reason))
	return d.update(ctx, f, job.Finished, wish.Reason, func(j *job.Job) {
		j.Cancel, j.Why, j.Artifacts = wish, "", nil
		j.Result = &pipe.Finished{Status: pipe.StatusCancelled, Reason: wish.Reason}
	})
}

// gone reports that a job's builder left the Compose project: nobody will say
// what becomes of the job there.
func (d *Dispatcher) gone(j job.Job) bool { return j.Builder != "" && d.workers[j.Builder] == nil }

// unreachable reports that a job's artifacts lie in a VM that is gone.
func (d *Dispatcher) unreachable(j job.Job) bool {
	return j.State == job.Collecting && needsVM(j) && d.gone(j)
}

// givenUp ends a job as cancelled whose artifacts can't be had.
func (d *Dispatcher) givenUp(ctx context.Context, f *flight, wish *job.CancelWish) error {
	return d.update(ctx, f, job.PublishFailed, wish.Reason, func(j *job.Job) {
		r := *j.Result
		r.Status, r.Reason = pipe.StatusCancelled, wish.Reason
		j.Cancel, j.Why, j.Artifacts, j.Result = wish, "", nil, &r
	})
}

// cancelWanted reports that the job's VM is to be told not to run it. One that
// ended here as cancelled is among them: refused for now, its request may have
// been written twice, and the second one accepted.
func (f *flight) cancelWanted() bool {
	if f.job.Cancel == nil || f.job.Attempt == 0 || f.recalled {
		return false
	}
	return f.job.State == job.Running || ended(f.job) && f.job.Result != nil && f.job.Result.Status == pipe.StatusCancelled
}

// nextCancel returns a job of the builder that its VM is to be told to cancel
// now.
func (d *Dispatcher) nextCancel(builder string, now time.Time) *flight {
	for _, f := range d.order {
		if f.job.Builder == builder && f.cancelWanted() && !now.Before(f.recallAfter) {
			return f
		}
	}
	return nil
}

// recallRefused puts off a request to cancel that the VM did not take.
func (d *Dispatcher) recallRefused(f *flight, log *zap.Logger) {
	if f.job.State != job.Running {
		f.recalled = true // it was to be on the safe side, and can't be had
		return
	}
	f.recallAfter = d.cfg.Now().Add(maxPause)
	log.Warn("request to cancel refused, trying again", zap.Duration("in", maxPause))
}

// unnamedRefusal deals with a refusal of what the VM could not read. A runner
// from before there were such requests says so.
func (d *Dispatcher) unnamedRefusal(w *worker, r pipe.Refused, log *zap.Logger) bool {
	if r.Request != "" || r.Reason != pipe.ReasonMalformed || w.waiting == nil {
		return false
	}
	kind, id, attempt := splitKey(w.waiting.key)
	switch f := d.flights[id]; {
	case kind == pipe.KindCancel && w.abandonedEnds(pipe.JobRef{Job: string(id), Attempt: attempt}): // as far as it can be had
		if f != nil && f.job.Attempt == attempt {
			d.recallRefused(f, log)
		}
	case kind == pipe.KindCancel && f != nil:
		d.recallRefused(f, log)
	case kind == pipe.KindConsume:
		log.Info("the builder does not free what is read of its events: its image is older than this sidecar")
	case kind == pipe.KindRepeat:
		d.repeatRefused(w, r, log)
	default:
		return false
	}
	w.answered(w.waiting.key)
	return true
}
