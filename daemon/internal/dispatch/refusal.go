package dispatch

import (
	"time"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// A refusal is that a builder did not take a job for now. Each job has pauses
// of its own, so that one which is refused again and again, for inputs that
// never fit, say, holds nobody else up.
type refusal struct {
	times int       // in a row
	until time.Time // not asked again before
}

func (r refusal) again(now time.Time, pause time.Duration) refusal {
	return refusal{r.times + 1, now.Add(min(pause<<min(r.times, 10), maxPause))}
}

// refuseJob puts off the next try of a job, and what else the refusal
// concerns. A VM that has no room for the request alone has none for the
// others' either. Where more than that was asked for the first refusal is the
// job's alone; that of another one right after it is taken for the VM's: else
// thousands would be tried in turn, each with its upload.
func (w *worker) refuseJob(builder string, f *flight, reason pipe.Reason, now time.Time, pause time.Duration) {
	if f.refused == nil {
		f.refused = make(map[string]refusal)
	}
	f.refused[builder] = f.refused[builder].again(now, pause)
	lacks := reason == pipe.ReasonDisk || reason == pipe.ReasonInternal
	another := w.refusedLast != "" && w.refusedLast != f.job.ID
	w.refusedLast = f.job.ID
	if lacks && (f.job.Inputs == nil || another) {
		w.refuse(now, pause)
	}
}

// refuse puts off the next claim of whatever job, longer each time in a row.
func (w *worker) refuse(now time.Time, pause time.Duration) {
	r := refusal{times: w.refusals}.again(now, pause)
	w.claimBefore, w.refusals = r.until, r.times
}

// tookJob ends the rows of refusals.
func (w *worker) tookJob(builder string, f *flight) {
	w.refusals, w.refusedLast = 0, ""
	delete(f.refused, builder)
}

// takes reports whether a builder may be given a job that waits.
func (w *worker) takes(builder string, f *flight, now time.Time) bool {
	return f.job.State == job.Queued && !f.job.Restored && w.buildsFor(f.job.System()) && !now.Before(f.refused[builder].until)
}

// prefers reports whether a job is to be tried before other. While a builder
// refuses whatever comes, those that it refused less often are tried first:
// one of them may be what it can take.
func (w *worker) prefers(builder string, f, other *flight) bool {
	if a, b := f.refused[builder].times, other.refused[builder].times; w.refusals > 0 && a != b {
		return a < b
	}
	return f.job.Before(other.job)
}
