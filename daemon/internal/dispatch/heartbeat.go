package dispatch

import (
	"bytes"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
)

const (
	// firstBeat is the silence after which the log says that a job still runs.
	// The next beats come ever more seldom, up to maxBeat apart.
	firstBeat = time.Minute
	maxBeat   = 16 * time.Minute
	// maxLastLine bounds what is kept of a job's last line, in bytes.
	maxLastLine = 200
)

// A pulse is when a running job was last heard of.
type pulse struct {
	since time.Time     // its last output; or when it was seen to run
	beat  time.Time     // of the last line about its silence, or since
	pause time.Duration // until the next one
	tail  []byte        // the end of its output
}

// heard ends a silence. said is output, if that ended it.
func (p *pulse) heard(now time.Time, said []byte) {
	p.since, p.beat, p.pause = now, now, firstBeat
	if len(said) >= maxLastLine {
		p.tail = p.tail[:0]
		said = said[len(said)-maxLastLine:]
	} else if over := len(p.tail) + len(said) - maxLastLine; over > 0 {
		p.tail = append(p.tail[:0], p.tail[over:]...)
	}
	p.tail = append(p.tail, said...)
}

// due reports whether the silence is worth a line now.
func (p *pulse) due(now time.Time) bool {
	if p.since.IsZero() { // this sidecar has not heard of it yet
		p.heard(now, nil)
	}
	if now.Sub(p.beat) < p.pause {
		return false
	}
	p.beat, p.pause = now, min(2*p.pause, maxBeat)
	return true
}

// last returns the last line that has something in it.
func (p *pulse) last() string {
	text := bytes.TrimRight(p.tail, " \t\r\n")
	text = text[bytes.LastIndexAny(text, "\r\n")+1:]
	return string(bytes.ToValidUTF8(text, nil))
}

// beat says of each running job that has been silent for long that it still
// runs. While there is no link, the link's own lines say so.
func (d *Dispatcher) beat() {
	now := d.cfg.Now()
	for _, f := range d.order {
		w := d.workers[f.job.Builder]
		if f.job.State != job.Running || f.job.Started.IsZero() || w == nil || !w.up || !f.pulse.due(now) {
			continue
		}
		d.cfg.Log.Info("job still runs", zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)),
			zap.Duration("running", now.Sub(f.job.Started).Round(time.Second)),
			zap.Duration("silent", now.Sub(f.pulse.since).Round(time.Second)), said("last", f.pulse.last()))
	}
}
