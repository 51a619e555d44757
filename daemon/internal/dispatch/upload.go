package dispatch

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
)

// upload sees to it that the inputs of a claimed job are in its VM. It reports
// true while they are not: then the request has to wait.
func (d *Dispatcher) upload(work context.Context, name string, w *worker, f *flight) bool {
	here := delivered{name, f.job.Attempt}
	if f.job.Inputs == nil || f.uploaded == here {
		return false
	}
	if f.uploading || d.cfg.Now().Before(f.notBefore) {
		return true
	}
	f.uploading = true
	j, fresh := f.job, f.fresh
	work, f.stopUpload = context.WithCancel(work)
	d.begin(work, func(ctx context.Context) error {
		return w.builder.Upload(ctx, j.Inputs.SHA256, j.Inputs.Size, fresh, func(to io.Writer) error { return d.cfg.Inputs(j, to) })
	}, func(ctx context.Context, err error) error {
		f.stopUpload()
		f.uploading, f.stopUpload = false, nil
		switch {
		case f.job.Attempt != here.attempt || f.job.Builder != here.builder || f.job.State != job.Sending || f.job.Cancel != nil:
			return nil // it went on without them
		case err == nil:
			f.uploaded, f.fresh, f.failures = here, false, 0
			return nil
		case errors.Is(err, ErrSource):
			return d.fail(ctx, w, f, err.Error())
		}
		pause := min(d.cfg.RetryAfter<<min(f.failures, 10), maxPause)
		f.failures++
		f.notBefore = d.cfg.Now().Add(pause)
		if !w.up {
			return nil // the link's end was told, and it goes on when it is back
		}
		d.cfg.Log.Warn("inputs not uploaded, trying again", zap.String("builder", name),
			zap.String("job", f.job.Name), zap.String("id", string(f.job.ID)), zap.Duration("in", pause), zap.Error(err))
		return d.waits(ctx, f, "its inputs to be uploaded: "+err.Error())
	})
	return true
}

// buildsFor reports whether a builder takes jobs for a Nix system. Empty is
// any.
func (w *worker) buildsFor(system string) bool {
	return system == "" || slices.Contains(w.hello.Systems, system)
}

// unbuildable says why no builder takes jobs for a system: all have said what
// they build for. While one has not, or one can, it is empty.
func (d *Dispatcher) unbuildable(system string) string {
	if system == "" || len(d.workers) == 0 {
		return ""
	}
	var have []string
	for _, name := range d.builderNames() {
		w := d.workers[name]
		if w.hello == nil || w.buildsFor(system) {
			return ""
		}
		have = append(have, fmt.Sprintf("%s builds for %s", name, strings.Join(w.hello.Systems, ", ")))
	}
	return fmt.Sprintf("no builder for %s: %s; set SYSTEM to one of these, or use a VM that emulates it", system, strings.Join(have, "; "))
}
