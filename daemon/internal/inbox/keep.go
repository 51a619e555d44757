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
	logName   = "build.log" // in a job's folder; see package buildlog
)

// keep removes the copies of ended jobs' drops, and their logs, when their time is over, until
// ctx is. It doesn't begin at once: a host without a clock that goes on while it
// is off has the time only after a while. Nor does it trust a clock that was put
// forward since: jobs that ended before would seem to be old.
func (b *Inbox) keep(ctx context.Context) {
	if b.cfg.Keep <= 0 {
		return
	}
	tick := time.NewTicker(b.keepEvery)
	defer tick.Stop()
	start, running := b.cfg.Now(), time.Now()
	said := make(map[string]string) // the last word about each folder
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := b.cfg.Now()
		if passed := start.Add(time.Since(running)); passed.Before(now) {
			now = passed
		}
		b.expire(ctx, now.Add(-b.cfg.Keep), said)
		b.did("expired")
	}
}

// expire removes what is kept of jobs that ended before a time: the source and
// the log in the state folder, which were published, and the drop itself in
// .taken. The record and output/ stay. Of a job that may still need it, or of
// which nothing is known, nothing is touched.
func (b *Inbox) expire(ctx context.Context, before time.Time, said map[string]string) {
	n := 0
	for _, place := range []struct {
		dir, below string
		shelf      shelf
	}{
		{b.cfg.State, "jobs", shelf{hasCopy, func(root *effect.Root, id string) (bool, error) {
			return b.expireCopy(ctx, root, id)
		}}},
		{b.cfg.Dir, takenDir, shelf{
			func(*effect.Root, string) bool { return true },
			func(root *effect.Root, id string) (bool, error) {
				err := removeAll(ctx, root, id)
				return err == nil, err
			},
		}},
	} {
		removed, err := b.expireIn(ctx, filepath.Join(place.dir, place.below), before, place.shelf)
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
		b.log.Info("copies of drops and logs removed, whose jobs ended long enough ago", zap.Int("removed", n))
	}
}

// A shelf is a folder of folders that are named like jobs.
type shelf struct {
	has    func(root *effect.Root, id string) bool // something that may be removed
	remove func(root *effect.Root, id string) (removed bool, err error)
}

// expireIn goes through the folders in dir that are named like jobs. It returns
// how many it dealt with, and the first error: as a rule all have the same.
func (b *Inbox) expireIn(ctx context.Context, dir string, before time.Time, s shelf) (int, error) {
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
		if !e.IsDir() || !pipe.ValidID(id) || !s.has(root, id) || !b.over(ctx, job.ID(id), before) {
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

// over reports that a job ended before a time.
func (b *Inbox) over(ctx context.Context, id job.ID, before time.Time) bool {
	// Made later, it can't have ended before. That saves most looks.
	if made, ok := id.Made(); ok && !made.Before(before) {
		return false
	}
	j, err := b.store.Get(ctx, id)
	return err == nil && j.State.Terminal() && j.Updated.Before(before)
}

// hasCopy reports whether there is something of a job to be removed.
func hasCopy(root *effect.Root, id string) bool { return hasSource(root, id) || hasLog(root, id) }

func hasLog(root *effect.Root, id string) bool {
	info, err := root.Lstat(id + "/" + logName)
	return err == nil && !info.IsDir()
}

// expireCopy removes a job's source, and then its log: that the job had ended
// is known from then on without it.
func (b *Inbox) expireCopy(ctx context.Context, root *effect.Root, id string) (removed bool, err error) {
	if hasSource(root, id) {
		if removed, err := b.expireSource(ctx, root, id); err != nil || !removed {
			return false, err
		}
	}
	if hasLog(root, id) {
		err = root.Remove(id + "/" + logName)
	}
	return err == nil, err
}

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
// to do the job again, is left for the next time. What stays of it is an empty
// folder, which says that the job had ended, also to whoever has no record of
// it; as a new file it would need room, where there may be none.
func (b *Inbox) expireSource(ctx context.Context, root *effect.Root, id string) (removed bool, err error) {
	if !b.copying.TryLock() {
		return false, nil
	}
	err = root.Rename(id+"/"+sourceDir, id+"/"+outdated)
	b.copying.Unlock()
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // stopped before, it has that name
		return false, err
	}
	if err := removeBelow(ctx, root, id+"/"+outdated); err != nil {
		return false, err
	}
	err = root.Rename(id+"/"+outdated, id+"/"+endedDir)
	if errors.Is(err, fs.ErrExist) { // put back by hand, and expired again
		err = root.Remove(id + "/" + outdated)
	}
	return err == nil, err
}

// removeAll removes what has that name in root, and all in it, until ctx ends:
// whoever stops the daemon doesn't wait for a large tree.
func removeAll(ctx context.Context, root *effect.Root, name string) error {
	switch info, err := root.Lstat(name); {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case info.IsDir():
		if err := removeBelow(ctx, root, name); err != nil {
			return err
		}
	}
	if err := root.Remove(name); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// removeBelow removes all that is in a folder. What can't be removed keeps
// nothing else; the first such error comes back.
func removeBelow(ctx context.Context, root *effect.Root, name string) error {
	dir, err := root.Open(name)
	if err != nil {
		return err
	}
	entries, first := dir.ReadDir(-1)
	if err := dir.Close(); first == nil {
		first = err
	}
	for _, e := range entries {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := removeAll(ctx, root, name+"/"+e.Name()); first == nil {
			first = err
		}
	}
	return first
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
