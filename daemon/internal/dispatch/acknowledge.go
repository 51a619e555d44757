package dispatch

import (
	"slices"
	"time"

	"go.uber.org/zap"

	"osbuilder/pipe"
)

// An ack tells the VM that it may forget an attempt of a job.
type ack struct {
	ref       pipe.JobRef
	abandoned bool      // nobody waits for its outcome: it is cancelled first, or it would keep its slot until it ends
	told      bool      // that it is cancelled, or it has ended
	notBefore time.Time // refused, it waits and lets others pass
}

// kind is what is to be asked for next.
func (a *ack) kind() pipe.Kind {
	if a.abandoned && !a.told {
		return pipe.KindCancel
	}
	return pipe.KindAcknowledge
}

// acknowledge has the VM forget an attempt whose outcome is known.
func (w *worker) acknowledge(r pipe.JobRef) {
	if a := w.ackOf(r); a != nil {
		a.told = true
		return
	}
	w.acks = append(w.acks, &ack{ref: r})
}

// abandon has the VM end an attempt that nobody waits for, and forget it when
// it has. What it was told of it before may have come too early: one that it
// doesn't have yet can be neither ended nor forgotten.
func (w *worker) abandon(r pipe.JobRef) {
	a := w.ackOf(r)
	if a == nil {
		a = &ack{ref: r}
		w.acks = append(w.acks, a)
	}
	a.abandoned, a.told, a.notBefore = true, false, time.Time{}
}

// ackOf returns what is to be sent of an attempt, or nil.
func (w *worker) ackOf(r pipe.JobRef) *ack {
	if i := slices.IndexFunc(w.acks, func(a *ack) bool { return a.ref == r }); i >= 0 {
		return w.acks[i]
	}
	return nil
}

// nextAck returns an acknowledgement that may be sent now.
func (w *worker) nextAck(now time.Time) *ack {
	for _, a := range w.acks {
		if !now.Before(a.notBefore) {
			return a
		}
	}
	return nil
}

// abandonedEnds notes that an attempt which nobody waits for was told to end,
// or has ended: it may be forgotten. Where it still runs the VM says so, and
// its end is waited for.
func (w *worker) abandonedEnds(r pipe.JobRef) bool {
	a := w.ackOf(r)
	if a == nil || !a.abandoned {
		return false
	}
	a.told, a.notBefore = true, time.Time{}
	return true
}

// forgot notes that the VM doesn't have an attempt any more, which its hello
// listed: read again after a restart, that would be dealt with anew.
func (w *worker) forgot(r pipe.JobRef) {
	w.acks = slices.DeleteFunc(w.acks, func(a *ack) bool { return a.ref == r })
	if w.hello == nil || !slices.Contains(w.hello.Jobs, r) {
		return
	}
	h := *w.hello // a copy: a checkpoint may hold the old one
	h.Jobs = slices.DeleteFunc(slices.Clone(h.Jobs), func(j pipe.JobRef) bool { return j == r })
	w.hello, w.dirty = &h, true
}

// ackRefused puts off what the VM did not take.
func (d *Dispatcher) ackRefused(w *worker, key pipe.JobRef, r pipe.Refused, log *zap.Logger) {
	a := w.ackOf(key)
	if a == nil {
		return
	}
	a.notBefore = d.cfg.Now().Add(maxPause)
	if r.Reason == pipe.ReasonConflict {
		// It has not ended, and nobody waits for it. That it was to end, it may have been told before it was there.
		a.abandoned, a.told = true, false
		log.Info("a job that nobody waits for is being ended in the VM, and forgotten then")
		return
	}
	log.Warn("acknowledgement refused, trying again", zap.Duration("in", maxPause))
}
