package runner

import (
	"context"
	"time"

	"osbuilder/pipe"
)

// cancel notes that a job is to end. What comes of it is the attendant's, and
// of one that waits takeUp's.
func (r *Runner) cancel(ref pipe.JobRef) *pipe.Refused {
	j := r.jobs[ref]
	if j == nil || j.outcome != nil || j.wish != nil {
		return nil // it ended, or is about to
	}
	now, err := uptime()
	if err != nil {
		return r.unable(err)
	}
	w := wish{Boot: r.cfg.Boot, Uptime: now, Time: time.Now().UTC()}
	if err := r.spool.wish(ref, w); err != nil {
		return r.unable(err)
	}
	j.wish = &w
	r.logf("job %s is to end", folder(ref))
	return nil
}

// dismiss gives a job that never ran its outcome.
func (r *Runner) dismiss(ctx context.Context, j *job) {
	j.attended = true
	a := r.attendant(j, 0)
	r.work.Go(func() {
		err := a.settle(ctx, neverRan)
		r.leave(ctx, j, func() {}, err)
	})
}

// neverRan is the outcome of a job that was cancelled while it waited.
var neverRan = outcome{Finished: pipe.Finished{
	Status: pipe.StatusCancelled, Reason: "it was cancelled before it ran",
}}

// wished reads whether, and since when, the job is to end; nil if it isn't.
func (a *attendant) wished() *wish {
	if !exists(a.path.cancel()) {
		return nil
	}
	w := &wish{}
	if err := readJSON(a.path.cancel(), maxResult, w); err != nil {
		return &wish{} // since when nobody knows
	}
	return w
}

// cancelled makes f the end of a job that was to end, unless it had come to
// one of its own before.
func (a *attendant) cancelled(f *pipe.Finished, result *Result) {
	w := a.wished()
	if w == nil || result != nil && w.after(*a.ran, *result) {
		return
	}
	f.Status, f.Reason = pipe.StatusCancelled, "it was cancelled while it ran"
}
