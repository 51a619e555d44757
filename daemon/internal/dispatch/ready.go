package dispatch

import (
	"errors"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
)

// remindEvery is how often the log says why the drops wait while no VM is
// ready.
const remindEvery = time.Minute

// The rungs of the way to a VM that is ready that are climbed behind the link.
const (
	rungHello  = "hello"  // the runner says what it is
	rungOwner  = "owner"  // the VM is ours
	rungNix    = "nix"    // the VM's Nix works
	rungAnswer = "answer" // the runner answers requests
)

// A rung is what [Builder]'s link gives as the reason to [Dispatcher.Down]
// where it knows which step of the way to the VM failed, and what to do.
type rung interface {
	error
	Step() string
	Hint(builder string) string
	Unwrap() error
}

// An obstacle is why a VM takes no job.
type obstacle struct {
	rung string
	why  string // for people, on its own
	hint string // what to do, if that is known
}

// noLink is the obstacle while a builder can't be reached.
func noLink(builder string, reason error) obstacle {
	o := obstacle{rung: "link", why: "no link to " + builder + ": " + reason.Error()}
	var r rung
	if errors.As(reason, &r) {
		o = obstacle{rung: r.Step(), why: "no link to " + builder + ": " + r.Unwrap().Error(), hint: r.Hint(builder)}
	}
	return o
}

// obstacle says what keeps a builder from being ready; why is empty where
// nothing does, however busy it is.
func (d *Dispatcher) obstacle(name string, w *worker) obstacle {
	switch {
	case !w.up:
		return w.down
	case w.why != "":
		return obstacle{rungOwner, w.why, "one VM, one sidecar: stop the other one, or set TAKE_OVER=Y once"}
	case w.hello == nil:
		return obstacle{rungHello, "the runner of " + name + " to say hello", "its console says why it doesn't: docker compose logs " + name}
	case w.hello.Unfit != "":
		return obstacle{
			rungNix, name + " builds nothing: " + w.hello.Unfit,
			"its console may say more: docker compose logs " + name + ". To start it anew: docker compose restart " + name +
				"; if that does not help, its store is damaged: remove the volume vm-storage, and all is built from new",
		}
	case w.unanswered > 0:
		return obstacle{rungAnswer, name + " to answer: it left a request unanswered", "its runner stands still; its console: docker compose logs " + name}
	}
	return obstacle{}
}

// A reminder is when the log last said why drops wait.
type reminder struct{ last time.Time }

// due reports whether it is time to say so again. The first time is a while
// after the waiting began: each job has said then for what it waits.
func (r *reminder) due(now time.Time, waiting bool) bool {
	switch {
	case !waiting:
		r.last = time.Time{}
	case r.last.IsZero():
		r.last = now
	case now.Sub(r.last) >= remindEvery:
		r.last = now
		return true
	}
	return false
}

// remind says, each minute in which no VM is ready, why the drops wait, if
// there are any.
func (d *Dispatcher) remind() {
	now, ready := d.cfg.Now(), false
	obstacles := map[string]obstacle{}
	for name, w := range d.workers {
		o := d.obstacle(name, w)
		if o.why == "" {
			ready, w.notReady = true, time.Time{}
			continue
		}
		if w.notReady.IsZero() {
			w.notReady = now
		}
		obstacles[name] = o
	}
	drops := 0
	for _, f := range d.order {
		if f.job.State == job.Queued || f.job.State == job.Sending {
			drops++
		}
	}
	if !d.reminder.due(now, !ready && drops > 0) {
		return
	}
	for _, name := range d.builderNames() {
		o := obstacles[name]
		d.cfg.Log.Warn("drops wait, for no VM is ready", zap.Int("drops", drops), zap.String("builder", name),
			zap.String("rung", o.rung), zap.String("for", o.why), zap.Time("since", d.workers[name].notReady), said("hint", o.hint))
	}
}
