package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

const (
	keepEvery = time.Hour   // between two looks for copies whose time is over
	outdated  = ".outdated" // a copy that is being removed
)

// keep removes the copies of ended jobs' drops when their time is over, until
// ctx is.
func (b *Inbox) keep(ctx context.Context) {
	if b.cfg.Keep <= 0 {
		return
	}
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	said := make(map[string]string) // the last word about each folder
	for {
		b.expire(ctx, said)
		b.did("expired")
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// expire removes what is kept of the drops of jobs that ended long enough ago:
// the source in the state folder, and the drop itself in .taken. The record,
// the log and output/ stay. Of a job that may still need it, or of which
// nothing is known, nothing is touched.
func (b *Inbox) expire(ctx context.Context, said map[string]string) {
	n := 0
	for _, place := range []struct {
		dir, below string
		shelf      shelf
	}{
		{b.cfg.State, "jobs", shelf{hasSource, b.expireSource}},
		{b.cfg.Dir, takenDir, shelf{
			func(*effect.Root, string) bool { return true },
			func(root *effect.Root, id string) (bool, error) { err := root.RemoveAll(id); return err == nil, err },
		}},
	} {
		removed, err := b.expireIn(ctx, filepath.Join(place.dir, place.below), place.shelf)
		n += removed
		if ctx.Err() != nil {
			return
		}
		text := ""
		if err != nil {
			text = anyID.ReplaceAllString(err.Error(), "ID")
		}
		if text != "" && said[place.below] != text {
			b.log.Warn("copies of ended jobs' drops can't be removed, trying again", zap.Duration("in", keepEvery), zap.Error(err))
		}
		said[place.below] = text
	}
	if n > 0 {
		b.log.Info("copies of drops removed, whose jobs ended long enough ago", zap.Int("removed", n))
	}
}

// A shelf is a folder of folders that are named like jobs.
type shelf struct {
	has    func(root *effect.Root, id string) bool // something that may be removed
	remove func(root *effect.Root, id string) (removed bool, err error)
}

// expireIn goes through the folders in dir that are named like jobs. It returns
// how many it dealt with, and the first error: as a rule all have the same.
func (b *Inbox) expireIn(ctx context.Context, dir string, s shelf) (int, error) {
	root, err := openReal(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return 0, err
	}
	n := 0
	var first error
	for _, e := range entries {
		if ctx.Err() != nil {
			return n, first
		}
		id := e.Name()
		if !e.IsDir() || !pipe.ValidID(id) || !s.has(root, id) || !b.over(ctx, job.ID(id)) {
			continue
		}
		switch removed, err := s.remove(root, id); {
		case errors.Is(err, unix.EROFS): // the others can't be removed either
			return n, err
		case err != nil && first == nil:
			first = err
		case removed:
			n++
		}
	}
	return n, first
}

// over reports that a job ended longer ago than its copies are kept.
func (b *Inbox) over(ctx context.Context, id job.ID) bool {
	before := b.cfg.Now().Add(-b.cfg.Keep)
	// Made later, it can't have ended before. That saves most looks.
	if len(id) > len(idTime) {
		if made, err := time.Parse(idTime, string(id[:len(idTime)])); err == nil && !made.Before(before) {
			return false
		}
	}
	j, err := b.store.Get(ctx, id)
	return err == nil && j.State.Terminal() && j.Updated.Before(before)
}

// idTime is how a job's ID begins; see [job.NewID].
const idTime = "20060102-150405"

func hasSource(root *effect.Root, id string) bool {
	for _, name := range []string{sourceDir, outdated} {
		if info, err := root.Lstat(id + "/" + name); err == nil && info.IsDir() {
			return true
		}
	}
	return false
}

// expireSource removes a job's source. It gets another name first: half a
// source must not be taken for a whole one. One that is being copied just now,
// to do the job again, is left for the next time.
func (b *Inbox) expireSource(root *effect.Root, id string) (removed bool, err error) {
	if !b.copying.TryLock() {
		return false, nil
	}
	err = root.Rename(id+"/"+sourceDir, id+"/"+outdated)
	b.copying.Unlock()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // stopped before, it has that name
		return false, err
	}
	err = root.RemoveAll(id + "/" + outdated)
	return err == nil, err
}

// openReal opens a folder that is one, and no link to one.
func openReal(dir string) (*effect.Root, error) {
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s is no folder, but a %s", dir, strings.TrimSpace(info.Mode().Type().String()))
	}
	root, err := effect.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if opened, err := root.Stat("."); err != nil || !os.SameFile(info, opened) {
		return nil, errors.Join(fmt.Errorf("%s was exchanged while it was opened", dir), err, root.Close())
	}
	return root, nil
}
