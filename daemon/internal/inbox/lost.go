package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// toldLost, in the folder of a job that is not on record any more, says that
// its user was told.
const toldLost = "lost"

// endedDir, in a job's folder, says that it had ended when its source was
// removed: nothing of it is lost.
const endedDir = "ended"

// SayLost says, once each, which jobs were taken and are not on record any
// more, as after a copy of the records was put in place or one was damaged:
// their drops have to be dropped again. Those whose outcome is published are
// passed over, and those that ended so long ago that their source was removed. It is for the start, before Run.
func (b *Inbox) SayLost(ctx context.Context, onRecord func(context.Context) (map[job.ID]bool, error), published func() (map[job.ID]bool, error)) error {
	dir := filepath.Join(b.cfg.State, "jobs")
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && len(entries) == 0 {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for lost jobs: %w", err)
	}
	known, err := onRecord(ctx)
	if err != nil {
		return fmt.Errorf("look for lost jobs: %w", err)
	}
	var done map[job.ID]bool // once one is missing
	for _, e := range entries {
		id := job.ID(e.Name())
		path := filepath.Join(dir, e.Name())
		if !e.IsDir() || !pipe.ValidID(e.Name()) || known[id] || there(path, toldLost) || there(path, unrecorded) {
			continue
		}
		if Ended(b.cfg.State, id) {
			continue
		}
		if done == nil {
			if done, err = published(); err != nil {
				return fmt.Errorf("look for lost jobs: %w", err)
			}
		}
		if done[id] {
			continue
		}
		b.sayLost(id, path)
		if err := effect.WriteFile(filepath.Join(path, toldLost), nil, 0o600); err != nil {
			return fmt.Errorf("note that job %s is lost: %w", id, err)
		}
	}
	return nil
}

// Ended reports, without a job's record, that it ended so long ago that its
// source and its log are removed, or are just being.
func Ended(state string, id job.ID) bool {
	dir := filepath.Join(state, "jobs", string(id))
	return there(dir, endedDir) || there(dir, outdated)
}

func there(elem ...string) bool {
	_, err := os.Lstat(filepath.Join(elem...))
	return err == nil
}

func (b *Inbox) sayLost(id job.ID, path string) {
	names, err := os.ReadDir(filepath.Join(path, sourceDir))
	if err != nil || len(names) == 0 {
		b.log.Warn("job is not on record any more, and what was dropped is gone", zap.String("id", string(id)))
		return
	}
	name := names[0].Name()
	again := "Drop it again: cp -r " + shellQuote(filepath.Join("jobs", takenDir, string(id), name)) + " jobs/"
	if !there(b.cfg.Dir, takenDir, string(id), name) {
		again = "Drop it again: docker compose cp " + shellQuote("sidecar:"+filepath.Join(path, sourceDir, name)) + " jobs/"
	}
	b.log.Warn("job is not on record any more: it has to be dropped again", zap.String("drop", name),
		zap.String("id", string(id)), zap.String("hint", again))
}
