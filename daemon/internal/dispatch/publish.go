package dispatch

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

const (
	// Fetches that bring other bytes than announced are tried again: so many
	// times soon, for what is wrong on the way, then so many times every
	// slowly, for what somebody has to mend. Then the job fails.
	quickFetches = 5
	slowFetches  = 24
	slowly       = time.Hour
	// maxPause between two tries to publish.
	maxPause = time.Minute
)

// publish starts to bring a job's outcome into output/.
func (d *Dispatcher) publish(work context.Context, f *flight) {
	if f.publishing || d.publishing >= maxPublishing || d.cfg.Now().Before(f.notBefore) {
		return
	}
	w := d.workers[f.job.Builder]
	var from Builder
	if w != nil {
		from = w.builder
	}
	if needsVM(f.job) && (w == nil || !w.up) {
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

// needsVM reports that a job's outcome can't be published without its VM.
func needsVM(j job.Job) bool {
	return j.Result.Status == pipe.StatusSucceeded && len(j.Artifacts) > 0
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
	if f.log != nil { // cancelled before it was claimed, it has none
		err := f.log.Close()
		f.log = nil
		if err != nil {
			return fmt.Errorf("close log of job %s: %w", f.job.ID, err)
		}
	}
	if w := d.workers[f.job.Builder]; w != nil && f.job.Attempt > 0 {
		w.acknowledge(ref(f.job))
		return nil
	}
	if f.job.Settled() {
		d.remove(f)
	}
	return nil
}

// sayOutcome is the last that the log says of a job: how long it ran, which
// image came out of it and how large, or of a failure the cause and what to do.
func (d *Dispatcher) sayOutcome(j job.Job) {
	fields := []zap.Field{zap.String("job", j.Name)}
	if ran := j.Result.Duration; ran > 0 {
		fields = append(fields, zap.Duration("duration", time.Duration(ran)*time.Millisecond))
	}
	if j.State == job.Done {
		if image, ok := largest(j.Artifacts); ok {
			fields = append(fields, zap.String("image", image.Name), zap.Int64("bytes", image.Size))
		}
		fields = append(fields, zap.Int("artifacts", len(j.Artifacts)))
	} else {
		failure, _ := job.ReportedFailure(j.Result.Report)
		fields = append(fields, said("reason", j.Result.Reason), exitCode(*j.Result), said("advice", failure.Advice))
	}
	d.cfg.Log.Info("job is "+string(j.State), append(fields, zap.String("output", j.Output), zap.String("id", string(j.ID)),
		zap.Duration("after", j.Updated.Sub(j.Created).Round(time.Millisecond)))...)
}

// largest returns the artifact that is the image, as far as size can tell.
func largest(artifacts []pipe.Artifact) (a pipe.Artifact, ok bool) {
	for i, b := range artifacts {
		if i == 0 || b.Size > a.Size {
			a = b
		}
	}
	return a, len(artifacts) > 0
}

// unpublished plans the next try, or gives up where none can help.
func (d *Dispatcher) unpublished(ctx context.Context, f *flight, w *worker, err error) error {
	if errors.Is(err, context.Canceled) {
		return nil
	}
	log := d.cfg.Log.With(zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.Error(err))
	if needsVM(f.job) && w != nil && !w.up {
		log.Info("the link broke while the job was fetched, going on when it is back")
		return nil
	}
	f.failures++
	damaged := damagedFetches(f.job)
	if errors.Is(err, ErrDamaged) {
		damaged++
	}
	if errors.Is(err, ErrGone) || damaged >= quickFetches+slowFetches {
		log.Error("artifacts can't be had, the job failed")
		r := *f.job.Result
		r.Status, r.Reason = pipe.StatusFailed, fmt.Sprintf("its artifacts could not be fetched: %v", err)
		f.failures = 0
		return d.update(ctx, f, job.PublishFailed, r.Reason, func(j *job.Job) { j.Result, j.Artifacts = &r, nil })
	}
	if errors.Is(err, ErrDamaged) {
		return d.fetchedDamaged(ctx, f, damaged, err)
	}
	pause := min(d.cfg.RetryAfter<<min(f.failures-1, 10), maxPause)
	f.notBefore = d.cfg.Now().Add(pause)
	log.Warn("job not published yet, trying again", zap.Duration("in", pause), said("hint", strings.Join(hint.Of(err), " ")))
	return d.waits(ctx, f, "to be published: "+err.Error())
}

// fetchedDamaged puts on record that other bytes came than were announced, and
// plans the next try.
func (d *Dispatcher) fetchedDamaged(ctx context.Context, f *flight, tries int, err error) error {
	if err := d.update(ctx, f, job.PublishFailed, err.Error(), func(j *job.Job) {
		j.Why = fmt.Sprintf("to be fetched again: what came is not what the VM announced (try %d of %d)", tries, quickFetches+slowFetches)
	}); err != nil {
		return err
	}
	f.notBefore = d.publishAfter(f.job)
	d.cfg.Log.Warn("job not published, what came is damaged: trying again", zap.String("job", f.job.Name),
		zap.String("id", string(f.job.ID)), zap.Int("try", tries), zap.Int("of", quickFetches+slowFetches),
		zap.Time("next", f.notBefore), zap.Error(err))
	return nil
}

// damagedFetches counts the fetches of a job's outcome that brought other
// bytes than were announced.
func damagedFetches(j job.Job) int {
	n := 0
	for _, s := range j.History {
		switch s.Event {
		case job.PublishFailed:
			n++
		case job.Claimed:
			n = 0
		default:
		}
	}
	return n
}

// publishAfter is when a job whose last fetch was damaged is fetched again. It
// is made from the record, so that a restart is no way to hurry; but for one
// from when the clock was ahead, which would have it wait until then.
func (d *Dispatcher) publishAfter(j job.Job) time.Time {
	n := damagedFetches(j)
	if j.State != job.Collecting || n == 0 || j.History[len(j.History)-1].Event == job.RetryAsked {
		return time.Time{}
	}
	pause := slowly
	if n < quickFetches {
		pause = min(d.cfg.RetryAfter<<(n-1), maxPause)
	}
	after, latest := j.Updated.Add(pause), d.cfg.Now().Add(pause)
	if latest.Before(after) {
		return latest
	}
	return after
}
