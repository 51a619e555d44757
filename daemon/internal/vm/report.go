package vm

import (
	"errors"
	"slices"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/console"
	"osbuilder/pipe"
)

// maxRemind is how far apart the lines about a rung that goes on failing come
// to lie.
const maxRemind = 16 * time.Minute

// A reporter turns a row of failures into few log lines: one when another
// rung fails than before, and a reminder now and then, with what the VM's
// console says.
type reporter struct {
	log     *zap.Logger
	builder string
	first   time.Duration // until the first reminder
	console console.Console

	rung  Rung   // that failed last; empty after a success
	steps string // of the image's making, likewise
	last  time.Time
	pause time.Duration // until the next reminder
	told  []string      // of the console
}

// up notes that the link is there.
func (r *reporter) up(current *generation, from pipe.Position) {
	r.rung, r.told = "", nil
	h := current.hello
	r.log.Info("builder is up",
		zap.String("generation", string(current.id)), zap.String("image", h.Image),
		zap.String("runner", h.Runner), zap.Int("slots", h.Slots), zap.Int64("from", from.Offset))
}

// failed notes why there is no link, and reports whether that is news.
func (r *reporter) failed(err error, wasUp bool, now time.Time) bool {
	var broken *RungError
	if !errors.As(err, &broken) {
		broken = &RungError{RungLink, err}
	}
	rung, steps := broken.Rung, imageSteps(err)
	fields := []zap.Field{zap.String("rung", string(rung)), zap.Error(broken.Err), zap.String("hint", broken.Hint(r.builder))}
	switch {
	case wasUp:
		r.log.Warn("link to the builder lost", fields...)
	case rung != r.rung || steps != r.steps:
		r.log.Warn("builder can't be reached yet", fields...)
	case now.Sub(r.last) >= r.pause:
		r.log.Warn("builder still can't be reached", fields...)
		r.tail()
		r.last, r.pause = now, min(2*r.pause, maxRemind)
		return false
	default:
		return false
	}
	r.rung, r.steps, r.last, r.pause = rung, steps, now, r.first
	return true
}

// tail shows the end of the VM's console, unless it is what was shown before.
func (r *reporter) tail() {
	lines := r.console.Tail()
	if slices.Equal(lines, r.told) {
		return
	}
	r.told = lines
	for _, line := range lines {
		r.log.Info("console of the VM", zap.String("line", line))
	}
}
