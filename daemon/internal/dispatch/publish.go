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

const (
	// maxDamaged fetches in a row of artifacts other than announced end in a
	// failed job.
	maxDamaged = 5
	// maxPause between two tries to publish.
	maxPause = time.Minute
)

// publish starts to bring a job's outcome into output/.
func (d *Dispatcher) publish(work context.Context, f *flight) {
	if f.publishing || d.publishing >= maxPublishing || d.cfg.Now().Before(f.notBefore) {
		return
	}
	w := d.workers[f.job.Builder]
	needed := f.job.Result.Status == pipe.StatusSucceeded && len(f.job.Artifacts) > 0
	var from Builder
	if w != nil {
		from = w.builder
	}
	if needed && (w == nil || !w.up) {
		return
	}
	f.publishing = true
	d.publishing++
	j := f.job
	var folder string
	d.begin(work, func(ctx context.Context) (err error) {
		folder, err = d.cfg.Publish(ctx, j, from)
		return err
	}, func(ctx context.Context, err error) error {
		f.publishing = false
		d.publishing--
		if err != nil {
			return d.unpublished(ctx, f, w, err)
		}
		return d.published(ctx, f, folder)
	})
}

// published ends a job whose outcome is in output/.
func (d *Dispatcher) published(ctx context.Context, f *flight, folder string) error {
	event := job.PublishedFailed
	switch f.job.Result.Status {
	case pipe.StatusSucceeded:
		event = job.PublishedDone
	case pipe.StatusCancelled:
		event = job.PublishedCancelled
	case pipe.StatusFailed, pipe.StatusTimeout, pipe.StatusInterrupted:
	}
	if err := d.update(ctx, f, event, "", func(j *job.Job) { j.Output, j.Why = folder, "" }); err != nil {
		return err
	}
	d.sayOutcome(f.job)
	err := f.log.Close()
	f.log = nil
	if err != nil {
		return fmt.Errorf("close log of job %s: %w", f.job.ID, err)
	}
	if w := d.workers[f.job.Builder]; w != nil && f.job.Attempt > 0 {
		w.acknowledge(f.job)
		return nil
	}
	if f.job.Settled() {
		d.remove(f)
	}
	return nil
}

// sayOutcome is the last that the log says of a job: of a failure the cause
// first, and what to do.
func (d *Dispatcher) sayOutcome(j job.Job) {
	fields := []zap.Field{zap.String("job", j.Name)}
	if j.State == job.Done {
		var bytes int64
		for _, a := range j.Artifacts {
			bytes += a.Size
		}
		fields = append(fields, zap.Int("artifacts", len(j.Artifacts)), zap.Int64("bytes", bytes))
	} else {
		failure, _ := job.ReportedFailure(j.Result.Report)
		fields = append(fields, said("reason", j.Result.Reason), exitCode(*j.Result), said("advice", failure.Advice))
	}
	d.cfg.Log.Info("job is "+string(j.State), append(fields, zap.String("output", j.Output), zap.String("id", string(j.ID)),
		zap.Duration("after", j.Updated.Sub(j.Created).Round(time.Millisecond)))...)
}

// unpublished plans the next try, or gives up where none can help.
func (d *Dispatcher) unpublished(ctx context.Context, f *flight, w *worker, err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	log := d.cfg.Log.With(zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.Error(err))
	if w != nil && !w.up {
		log.Info("the link broke while the job was fetched, going on when it is back")
		return nil
	}
	f.failures++
	if errors.Is(err, ErrDamaged) {
		f.damaged++
	}
	if errors.Is(err, ErrGone) || f.damaged >= maxDamaged {
		log.Error("artifacts can't be had, the job failed")
		j := f.job
		r := *j.Result
		r.Status, r.Reason = pipe.StatusFailed, fmt.Sprintf("its artifacts could not be fetched: %v", err)
		j.Result, j.Artifacts = &r, nil
		f.failures, f.damaged = 0, 0
		return d.write(ctx, f, j)
	}
	pause := min(d.cfg.RetryAfter<<min(f.failures-1, 10), maxPause)
	f.notBefore = d.cfg.Now().Add(pause)
	log.Warn("job not published yet, trying again", zap.Duration("in", pause))
	return d.waits(ctx, f, "to be published: "+err.Error())
}
