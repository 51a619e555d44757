package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unicode/utf8"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

const (
	newPrefix  = ".new-"      // of a copy that is not whole yet
	unrecorded = "unrecorded" // in a copy's folder: its job may not be on record
	sourceDir  = "source"
)

var (
	// errChanged: the drop is not the one that stood still.
	errChanged = errors.New("drop changed while it was taken")
	// errOpen: it stands still, but somebody may go on writing it.
	errOpen = errors.New("a program has it open for writing")
)

// A refusal is why a drop can't be a job.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

func refuse(hintText, format string, args ...any) error {
	return &refusal{hint.With(fmt.Errorf(format, args...), hintText)}
}

// stuck: all is done for a drop, but it can't be moved away.
type stuck struct {
	what  string
	err   error
	again bool // it is tried again by itself, else when the drop changes
}

func (s *stuck) Error() string { return s.what + ": " + s.err.Error() }
func (s *stuck) Unwrap() error { return s.err }

// A candidate is a drop that stood still, on its way to become a job.
type candidate struct {
	name  string
	stamp stamp
	drop  *drop

	job      job.Job // made on the way; its ID names the copy
	recorded bool    // it is on record, from now or from before
	begun    bool    // and known to whoever began it
	unsure   bool    // it may be on record, and nobody can tell now
	err      error   // why it went no further
}

// take makes jobs of drops that stood still, and moves those away that became
// jobs before. All go through each step together: what is slow is to sync, and
// one sync does for many.
func (b *Inbox) take(ctx context.Context, all []*candidate, taken chan<- job.ID) {
	each(ctx, all, func(ctx context.Context, c *candidate) error {
		if c.recorded {
			return nil
		}
		return b.find(ctx, c)
	})
	var fresh []*candidate
	for _, c := range all {
		if c.err == nil && !c.recorded {
			fresh = append(fresh, c)
		}
	}
	b.copyAll(ctx, fresh)
	b.recordAll(ctx, fresh)
	for _, c := range fresh {
		b.removeCopy(c)
	}
	b.shelveAll(all)
	for _, c := range all {
		if c.recorded && !c.begun {
			b.send(ctx, taken, c.job.ID)
			b.did("sent")
		}
	}
}

// each does a step for all that came so far.
func each(ctx context.Context, all []*candidate, step func(context.Context, *candidate) error) {
	for _, c := range all {
		if c.err == nil {
			c.err = ctx.Err()
		}
		if c.err == nil {
			c.err = step(ctx, c)
		}
	}
}

// find looks whether a drop became a job before.
func (b *Inbox) find(ctx context.Context, c *candidate) error {
	id, err := b.store.FindDrop(ctx, c.stamp.key(c.name))
	switch {
	case errors.Is(err, b.cfg.NotFound):
		return nil
	case err != nil:
		return fmt.Errorf("look for the drop's job: %w", err)
	}
	j, err := b.store.Get(ctx, id)
	if errors.Is(err, b.cfg.NotFound) {
		return hint.With(fmt.Errorf("it became job %s, which is not on record any more: %w", id, err), "To have it built, give it another name.")
	}
	if err != nil {
		return fmt.Errorf("read the drop's job: %w", err)
	}
	c.job, c.recorded, c.begun = j, true, j.State != job.Queued || j.Attempt > 0
	return nil
}

func (b *Inbox) send(ctx context.Context, taken chan<- job.ID, id job.ID) {
	select {
	case taken <- id:
	case <-ctx.Done(): // it is on record; the next start finds it there
	}
}

// classify returns the drop's recipe, or a refusal.
func (b *Inbox) classify(name string, s stamp) (job.Recipe, error) {
	switch {
	case !utf8.ValidString(name):
		return "", refuse("Rename it.", "its name is not valid UTF-8")
	case s.kind&fs.ModeSymlink != 0:
		return "", refuse("Drop the file itself, not a link to it.", "it is a symbolic link")
	case !s.kind.IsDir() && !s.kind.IsRegular():
		return "", refuse("Drop a regular file.", "it is neither a file nor a folder, but a %s", special(s.kind))
	}
	recipe, err := b.cfg.Classify(name, s.kind.IsDir())
	if err != nil {
		return "", &refusal{err}
	}
	if err := b.cfg.Check(recipe, filepath.Join(b.cfg.Dir, name)); err != nil {
		return "", unfit("read the drop", err)
	}
	b.did("checked")
	return recipe, nil
}

// unfit makes an error of Check or Prepare a refusal, unless it says that
// something could not be read.
func unfit(what string, err error) error {
	var unreadable *fs.PathError
	if errors.As(err, &unreadable) {
		return fmt.Errorf("%s: %w", what, err)
	}
	return &refusal{err}
}

func special(kind fs.FileMode) string {
	switch {
	case kind&fs.ModeNamedPipe != 0:
		return "named pipe"
	case kind&fs.ModeSocket != 0:
		return "socket"
	default:
		return "device"
	}
}

// recordAll puts the jobs of copied drops on record.
func (b *Inbox) recordAll(ctx context.Context, all []*candidate) {
	each(ctx, all, func(_ context.Context, c *candidate) error {
		if err := b.cfg.Prepare(&c.job, filepath.Join(b.copyOf(c, ""), sourceDir)); err != nil {
			return unfit("prepare the job", err)
		}
		b.did("prepared")
		return nil
	})
	var ready []*candidate
	for _, c := range all {
		if c.err == nil {
			ready = append(ready, c)
		}
	}
	if len(ready) > 0 {
		b.create(ctx, ready)
	}
	for _, c := range ready {
		if c.recorded {
			b.log.Info("drop taken", zap.String("job", c.job.Name), zap.String("id", string(c.job.ID)), zap.String("drop", c.name))
		}
	}
}

// create puts jobs on record whose copies are in place.
func (b *Inbox) create(ctx context.Context, ready []*candidate) {
	jobs := make([]job.Job, len(ready))
	for i, c := range ready {
		jobs[i] = c.job
	}
	made, err := b.store.CreateAll(ctx, jobs)
	switch {
	case err == nil:
		for i, c := range ready {
			c.job, c.recorded = made[i], true
		}
	case len(ready) == 1:
		b.unrecorded(ctx, ready[0], err)
	default: // one of them may be why: the others need not wait for it
		for _, c := range ready {
			if made, err := b.store.CreateAll(ctx, []job.Job{c.job}); err == nil {
				c.job, c.recorded = made[0], true
			} else {
				b.unrecorded(ctx, c, err)
			}
		}
	}
	b.did("recorded")
	for _, c := range ready {
		if !c.recorded {
			continue
		}
		if err := effect.Remove(filepath.Join(b.copyOf(c, ""), unrecorded)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			b.log.Debug("marker stays until the next start", zap.String("id", string(c.job.ID)), zap.Error(err))
		}
		b.did("marker removed")
	}
}

// removeCopy removes what was copied for a job that is not on record.
func (b *Inbox) removeCopy(c *candidate) {
	if c.err != nil && c.job.ID != "" && !c.recorded && !c.unsure {
		c.err = errors.Join(c.err, effect.RemoveAll(b.copyOf(c, newPrefix)), effect.RemoveAll(b.copyOf(c, "")))
	}
}

// unrecorded deals with a job that could not be recorded. It may be on record
// all the same: then the next look finds it by its key. Where nobody can tell
// now, the next start does.
func (b *Inbox) unrecorded(ctx context.Context, c *candidate, err error) {
	c.err = fmt.Errorf("record the job: %w", err)
	_, err = b.store.Get(ctx, c.job.ID)
	c.unsure = !errors.Is(err, b.cfg.NotFound)
}

// shelveAll moves the drops whose jobs are on record out of the users' way.
func (b *Inbox) shelveAll(all []*candidate) {
	moved := false
	for _, c := range all {
		if !c.recorded {
			continue
		}
		var gone bool
		gone, c.err = b.shelve(c)
		moved = moved || gone
	}
	if !moved {
		return
	}
	for _, d := range []string{filepath.Join(b.cfg.Dir, takenDir), b.cfg.Dir} {
		if err := disk.SyncDir(d); err != nil {
			// Should a move be lost, the drop is known by its key.
			b.log.Debug("moves of drops not synced", zap.Error(err))
		}
	}
	b.did("moves synced")
}

// shelve reports whether it moved the drop.
func (b *Inbox) shelve(c *candidate) (bool, error) {
	from := filepath.Join(b.cfg.Dir, c.name)
	dir := filepath.Join(b.cfg.Dir, takenDir, string(c.job.ID))
	to := filepath.Join(dir, c.name)
	now, err := stampOf(from)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil && now != c.stamp {
		return false, errChanged // the next job, under the same name
	}
	stays := func(err error) error {
		what := "drop was taken but can't be moved away; it stays and is not taken again until it changes"
		if disk.Full(err) {
			what = "drop was taken but can't be moved away yet, trying again"
		}
		return &stuck{what, b.unmovable(c.name, err), disk.Full(err)}
	}
	if err := b.makeShelf(dir); err != nil {
		return false, stays(err)
	}
	b.did("shelf made")
	if err := disk.MoveNew(from, to); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		_ = effect.Remove(dir) // it would only stay empty
		return false, stays(err)
	}
	b.did("moved")
	// Somebody may have saved it anew between the look and the move.
	if now, err = stampOf(to); err == nil && !now.moved(c.stamp) {
		if err := disk.MoveNew(to, from); err == nil {
			return true, errChanged
		}
		b.log.Warn("drop was changed twice while it was taken; the version in between is kept in "+takenDir,
			zap.String("drop", c.name), zap.String("kept", to))
	}
	return true, nil
}

// makeShelf makes the folder that a drop is moved to.
func (b *Inbox) makeShelf(dir string) error {
	if err := disk.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := effect.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return effect.Chmod(dir, 0o755) // whatever the umask is
}

// unmovable says what keeps a drop where it is.
func (b *Inbox) unmovable(name string, err error) error {
	if disk.Full(err) {
		free, _ := disk.Free(b.cfg.Dir)
		err = fmt.Errorf("%w: %w", &disk.NoRoom{Path: b.cfg.Dir, Free: free}, err)
		return hint.With(err, "Make room on the disk of the jobs folder. The drop is moved by itself then.")
	}
	text := "The jobs folder must be writable for PUID:PGID. Who mounts it read-only has to remove what was taken himself."
	path := filepath.Join(b.cfg.Dir, name)
	if info, err := os.Lstat(path); err == nil && info.IsDir() && !writable(path) && writable(b.cfg.Dir) {
		text = fmt.Sprintf("It belongs to user %d, and a folder can be moved only by who may write in it. On the host, in the jobs folder: sudo chown -R %d:%d %s",
			ownerOf(info), os.Geteuid(), os.Getegid(), shellQuote(name))
	}
	return hint.With(err, text)
}

func writable(path string) bool {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS) == nil
}
