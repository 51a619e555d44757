package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// Again records a new job that does again what an ended one did: from the same
// source, with the same settings. It may be called while Run runs.
func (b *Inbox) Again(ctx context.Context, ended job.Job) (job.Job, error) {
	now := b.cfg.Now().UTC()
	j := job.Job{
		ID: job.NewID(now, b.cfg.Random()), Name: ended.Name, Drop: ended.Drop, Recipe: ended.Recipe, Entry: ended.Entry,
		State: job.Queued, Priority: ended.Priority, Created: now, Updated: now, RetryOf: ended.ID,
		Timeout: ended.Timeout, Inputs: ended.Inputs, NixOS: ended.NixOS,
		History: []job.Step{{Time: now, Event: job.Created, State: job.Queued, Reason: "does again " + string(ended.ID)}},
	}
	from := filepath.Join(b.cfg.State, "jobs", string(ended.ID), sourceDir)
	if _, err := os.Stat(from); errors.Is(err, fs.ErrNotExist) {
		return job.Job{}, hint.With(fmt.Errorf("do job %s again: its source is not there any more: %w", ended.ID, err), "Drop it again.")
	}
	if err := b.place(j.ID, func(temp string) error {
		if err := effect.MkdirAll(temp, 0o700); err != nil {
			return fmt.Errorf("make folder for the copy: %w", err)
		}
		if err := effect.WriteFile(filepath.Join(temp, unrecorded), nil, 0o600); err != nil {
			return fmt.Errorf("mark the copy: %w", err)
		}
		if err := b.copyTree(ctx, from, filepath.Join(temp, sourceDir)); err != nil {
			return err
		}
		return disk.SyncDir(temp)
	}); err != nil {
		return job.Job{}, fmt.Errorf("do job %s again: %w", ended.ID, b.explain(err, 0))
	}
	j, err := b.create(ctx, j)
	if err != nil {
		return job.Job{}, fmt.Errorf("do job %s again: %w", ended.ID, err)
	}
	b.log.Info("ended job is done again, as a new one", zap.String("job", j.Name), zap.String("id", string(j.ID)), zap.String("ended", string(ended.ID)))
	return j, nil
}
