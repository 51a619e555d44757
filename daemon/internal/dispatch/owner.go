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

// strangersEvery is how often it is said that somebody else writes to a VM of
// ours.
const strangersEvery = 10 * time.Minute

// foreign reports that the builder is known to be another's.
func (w *worker) foreign(me string) bool {
	return w.hello != nil && w.hello.Owner != "" && w.hello.Owner != me
}

// ownedBy notes whose the builder is now. The one that loses it says so, and
// doesn't fight for it.
func (d *Dispatcher) ownedBy(ctx context.Context, builder string, w *worker, owner string) error {
	if w.hello == nil || w.hello.Owner == owner {
		w.owned = w.owned || owner == d.cfg.Owner
		return nil
	}
	h := *w.hello // a copy: a checkpoint may hold the old one
	h.Owner = owner
	w.hello, w.dirty = &h, true
	return d.ownerChanged(ctx, builder, w)
}

// ownerChanged acts on what the last hello, or what came since, says of the
// owner.
func (d *Dispatcher) ownerChanged(ctx context.Context, builder string, w *worker) error {
	switch {
	case w.hello.Owner == d.cfg.Owner:
		w.owned = true
		return nil
	case !w.owned || !w.foreign(d.cfg.Owner) || w.lost == w.hello.Owner:
		return nil
	}
	w.lost = w.hello.Owner
	d.cfg.Log.Warn("this builder was taken over by another sidecar: nothing more is sent to it; jobs that run there go on, and are read",
		zap.String("builder", builder), zap.String("owner", w.lost))
	// What it has not accepted by now it never will.
	for _, f := range slices.Clone(d.order) {
		if f.job.Builder != builder || f.job.State != job.Sending {
			continue
		}
		if err := d.withdrawn(ctx, f, d.whose(builder, w)); err != nil {
			return err
		}
	}
	return nil
}

// withdrawn takes back a job whose request was not accepted.
func (d *Dispatcher) withdrawn(ctx context.Context, f *flight, why string) error {
	if f.job.Cancel != nil {
		return d.cancelled(ctx, f, f.job.Cancel)
	}
	d.cfg.Log.Info("job waits", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.String("for", why))
	return d.update(ctx, f, job.Deferred, why, func(j *job.Job) { j.Why = why })
}

// whose says why a builder that is another's takes no job of ours; empty if it
// is none, or is to be taken over.
func (d *Dispatcher) whose(builder string, w *worker) string {
	if !w.foreign(d.cfg.Owner) {
		return ""
	}
	owner := w.hello.Owner
	switch {
	case w.owned:
		return fmt.Sprintf("%s was taken over by %s; only one of the two can have it", builder, owner)
	case !d.cfg.TakeOver:
		return fmt.Sprintf("%s is owned by %s; set TAKE_OVER=Y to take it over on purpose", builder, owner)
	}
	return ""
}

// stranger says, now and then, that a request was refused which is not ours.
func (d *Dispatcher) stranger(builder string, w *worker, r pipe.Refused) {
	now := d.cfg.Now()
	if !w.strangers.IsZero() && now.Sub(w.strangers) < strangersEvery {
		return
	}
	w.strangers = now
	d.cfg.Log.Warn("another sidecar writes to this builder, and is refused: it needs a VM of its own",
		zap.String("builder", builder), zap.String("request", r.Request))
}
