package inbox

import (
	"context"
	"errors"
	"fmt"
	"io"
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

// errChanged: the drop is not the one that stood still.
var errChanged = errors.New("drop changed while it was taken")

// A refusal is why a drop can't be a job.
type refusal struct{ error }

func (r *refusal) Unwrap() error { return r.error }

func refuse(hintText, format string, args ...any) error {
	return &refusal{hint.With(fmt.Errorf(format, args...), hintText)}
}

// stuck: all is done for a drop, but it can't be moved away.
type stuck struct {
	what string
	err  error
}

func (s *stuck) Error() string { return s.what + ": " + s.err.Error() }
func (s *stuck) Unwrap() error { return s.err }

// take makes a job of a drop that stood still, or moves one away that became a
// job before.
func (b *Inbox) take(ctx context.Context, name string, s stamp, taken chan<- job.ID) error {
	key := s.key(name)
	id, err := b.store.FindDrop(ctx, key)
	switch {
	case err == nil:
		j, err := b.store.Get(ctx, id)
		if err != nil {
			return fmt.Errorf("read the drop's job: %w", err)
		}
		err = b.shelve(name, s, id)
		// One that was begun is known to whoever began it.
		if j.State == job.Queued && j.Attempt == 0 {
			b.send(ctx, taken, id)
		}
		return err
	case !errors.Is(err, b.cfg.NotFound):
		return fmt.Errorf("look for the drop's job: %w", err)
	}
	recipe, err := b.classify(name, s)
	if err != nil {
		return err
	}
	j, err := b.record(ctx, name, s, recipe)
	if err != nil {
		return err
	}
	b.log.Info("drop taken", zap.String("job", j.Name), zap.String("id", string(j.ID)), zap.String("drop", name))
	err = b.shelve(name, s, j.ID)
	b.send(ctx, taken, j.ID)
	b.did("sent")
	return err
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

// record copies the drop and puts its job on record.
func (b *Inbox) record(ctx context.Context, name string, s stamp, recipe job.Recipe) (job.Job, error) {
	now := b.cfg.Now().UTC()
	id := job.NewID(now, b.cfg.Random())
	if err := b.place(id, func(temp string) error { return b.copy(ctx, name, s, temp) }); err != nil {
		return job.Job{}, err
	}
	final := filepath.Join(b.cfg.State, "jobs", string(id))
	j := job.Job{
		ID: id, Name: job.OutputName(name), Drop: name, DropKey: s.key(name), Recipe: recipe, Entry: name,
		State: job.Queued, Created: now, Updated: now, Timeout: b.cfg.JobTimeout,
		History: []job.Step{{Time: now, Event: job.Created, State: job.Queued}},
	}
	if s.kind.IsDir() {
		j.Name = job.FolderName(name)
	}
	if err := b.cfg.Prepare(&j, filepath.Join(final, sourceDir)); err != nil {
		return job.Job{}, errors.Join(unfit("prepare the job", err), effect.RemoveAll(final))
	}
	b.did("prepared")
	return b.create(ctx, j)
}

// place makes a job's folder out of what fill puts into a temporary one.
func (b *Inbox) place(id job.ID, fill func(temp string) error) error {
	jobs := filepath.Join(b.cfg.State, "jobs")
	temp := filepath.Join(jobs, newPrefix+string(id))
	final := filepath.Join(jobs, string(id))
	if err := fill(temp); err != nil {
		return errors.Join(err, effect.RemoveAll(temp))
	}
	if err := disk.MoveNew(temp, final); err != nil {
		return errors.Join(fmt.Errorf("move the copy into place: %w", err), effect.RemoveAll(temp))
	}
	b.did("copy in place")
	if err := disk.SyncDir(jobs); err != nil {
		return errors.Join(fmt.Errorf("sync the copy: %w", err), effect.RemoveAll(final))
	}
	b.did("copy synced")
	return nil
}

// create puts a job on record whose folder is in place.
func (b *Inbox) create(ctx context.Context, j job.Job) (job.Job, error) {
	id, final := j.ID, filepath.Join(b.cfg.State, "jobs", string(j.ID))
	j, err := b.store.Create(ctx, j)
	if err != nil {
		err = fmt.Errorf("record the job: %w", err)
		// It may be on record all the same: then the next look finds it by its
		// key. Where nobody can tell now, the next start does.
		if _, getErr := b.store.Get(ctx, id); errors.Is(getErr, b.cfg.NotFound) {
			err = errors.Join(err, effect.RemoveAll(final))
		}
		return job.Job{}, err
	}
	b.did("recorded")
	if err := effect.Remove(filepath.Join(final, unrecorded)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.log.Debug("marker stays until the next start", zap.String("id", string(id)), zap.Error(err))
	}
	b.did("marker removed")
	return j, nil
}

// copy makes a synced copy of the drop in the folder temp, and sees to it that
// the drop did not change meanwhile.
func (b *Inbox) copy(ctx context.Context, name string, s stamp, temp string) error {
	if err := effect.MkdirAll(filepath.Join(temp, sourceDir), 0o700); err != nil {
		return fmt.Errorf("make folder for the copy: %w", err)
	}
	if err := effect.WriteFile(filepath.Join(temp, unrecorded), nil, 0o600); err != nil {
		return fmt.Errorf("mark the copy: %w", err)
	}
	b.did("folder made")
	from, to := filepath.Join(b.cfg.Dir, name), filepath.Join(temp, sourceDir, name)
	copyDrop := b.copyFile
	if s.kind.IsDir() {
		copyDrop = func(ctx context.Context, from, to string, _ stamp) error { return b.copyTree(ctx, from, to) }
	}
	if err := copyDrop(ctx, from, to, s); err != nil {
		return err
	}
	b.did("copied")
	for _, dir := range []string{filepath.Join(temp, sourceDir), temp} {
		if err := disk.SyncDir(dir); err != nil {
			return fmt.Errorf("sync the copy: %w", err)
		}
	}
	b.did("folders synced")
	again, err := stampOf(from)
	if err != nil {
		return fmt.Errorf("compare the drop: %w", err)
	}
	if again != s {
		return errChanged
	}
	b.did("compared")
	return nil
}

// copyFile makes a synced copy of a drop that is a file.
func (b *Inbox) copyFile(ctx context.Context, from, to string, s stamp) error {
	// Neither a link that took its place is followed, nor a pipe waited for.
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return errChanged
	}
	if err != nil {
		return fmt.Errorf("read the drop: %w", err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return fmt.Errorf("read the drop: %w", err)
	}
	if stampInfo(info) != s {
		return errChanged
	}
	if err := copyTo(ctx, to, in, s.size); err != nil {
		return fmt.Errorf("copy the drop: %w", err)
	}
	return nil
}

// copyTo writes a new file, synced, with what in holds: size bytes.
func copyTo(ctx context.Context, to string, in io.Reader, size int64) error {
	out, err := effect.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	const chunk = 1 << 20
	for n := int64(0); n < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		k, err := io.CopyN(out, in, min(chunk, size-n))
		n += k
		if errors.Is(err, io.EOF) {
			return errChanged
		}
		if err != nil {
			return err
		}
	}
	if err := out.Sync(); err != nil {
		return err
	}
	return out.Close()
}

// shelve moves a drop whose job is on record out of the users' way.
func (b *Inbox) shelve(name string, s stamp, id job.ID) error {
	from := filepath.Join(b.cfg.Dir, name)
	dir := filepath.Join(b.cfg.Dir, takenDir, string(id))
	to := filepath.Join(dir, name)
	now, err := stampOf(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && now != s {
		return errChanged // the next job, under the same name
	}
	const what = "drop was taken but can't be moved away; it stays and is not taken again until it changes"
	if err := disk.MkdirAll(dir, 0o755); err != nil {
		return &stuck{what, b.unmovable(err)}
	}
	b.did("shelf made")
	if err := disk.MoveNew(from, to); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return &stuck{what, b.unmovable(err)}
	}
	b.did("moved")
	// Somebody may have saved it anew between the look and the move.
	if now, err = stampOf(to); err == nil && !now.moved(s) {
		if err := disk.MoveNew(to, from); err == nil {
			return errChanged
		}
		b.log.Warn("drop was changed twice while it was taken; the version in between is kept in "+takenDir,
			zap.String("drop", name), zap.String("kept", to))
	}
	for _, d := range []string{dir, filepath.Dir(dir), b.cfg.Dir} {
		if err := disk.SyncDir(d); err != nil {
			// Should the move be lost, the drop is known by its key.
			b.log.Debug("move of a drop not synced", zap.String("drop", name), zap.Error(err))
		}
	}
	b.did("move synced")
	return nil
}

func (b *Inbox) unmovable(err error) error {
	return hint.With(err, "The jobs folder must be writable for PUID:PGID.")
}
