package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// Again records a new job that does again what an ended one did: from the same
// source, with the same settings. It may be called while Run runs.
func (b *Inbox) Again(ctx context.Context, ended job.Job) (job.Job, error) {
	b.copying.RLock()
	defer b.copying.RUnlock()
	from := filepath.Join(b.cfg.State, "jobs", string(ended.ID), sourceDir)
	if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
		return job.Job{}, hint.With(fmt.Errorf("do job %s again: its source is not there any more: %w", ended.ID, err), "Drop it again.")
	}
	c := &candidate{name: ended.Drop}
	c.err = b.again(ctx, c, ended, from)
	if c.err == nil {
		b.create(ctx, []*candidate{c})
	}
	b.removeCopy(c)
	if c.err != nil {
		return job.Job{}, fmt.Errorf("do job %s again: %w", ended.ID, b.explain(c.err, ended.Drop, 0))
	}
	j := c.job
	b.log.Info("ended job is done again, as a new one", zap.String("job", j.Name), zap.String("id", string(j.ID)), zap.String("ended", string(ended.ID)))
	return j, nil
}

// again makes the copy of the source.
func (b *Inbox) again(ctx context.Context, c *candidate, ended job.Job, from string) error {
	whole, err := effect.Open(filepath.Join(b.cfg.State, "jobs"))
	if err != nil {
		return fmt.Errorf("make folder for the copy: %w", err)
	}
	defer whole.Close()
	if err := b.begin(c, job.Job{
		Name: ended.Name, Drop: ended.Drop, Recipe: ended.Recipe, Entry: ended.Entry, Priority: ended.Priority, RetryOf: ended.ID,
		Timeout: ended.Timeout, Inputs: ended.Inputs, NixOS: ended.NixOS,
	}, "does again "+string(ended.ID)); err != nil {
		return err
	}
	files, err := copyTree(ctx, from, filepath.Join(b.copyOf(c, newPrefix), sourceDir))
	if err != nil {
		return err
	}
	all := []*candidate{c}
	b.sync(ctx, all, files, whole)
	b.place(ctx, all)
	return c.err
}
