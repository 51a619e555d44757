package inbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

const (
	// A few files are synced one by one; more of them by syncing their whole
	// file system, which takes a fiftieth of the time.
	maxSyncedSingly = 8
	maxTries        = 1000 // to find a free ID
)

// copyOf is the folder of a candidate's copy: final, or with newPrefix the one
// that it grows in.
func (b *Inbox) copyOf(c *candidate, prefix string) string {
	return filepath.Join(b.cfg.State, "jobs", prefix+string(c.job.ID))
}

// copyAll makes a synced copy of each drop, in place, and sees to it that the
// drop did not change meanwhile.
func (b *Inbox) copyAll(ctx context.Context, all []*candidate) {
	if len(all) == 0 {
		return
	}
	jobs := filepath.Join(b.cfg.State, "jobs")
	// Opened before anything is written: so a sync tells of all that failed since.
	whole, err := effect.Open(jobs)
	if err != nil {
		each(ctx, all, func(context.Context, *candidate) error { return fmt.Errorf("copy the drop: %w", err) })
		return
	}
	defer whole.Close()
	files := 0
	each(ctx, all, func(ctx context.Context, c *candidate) error {
		n, err := b.copy(ctx, c)
		files += n
		return err
	})
	b.sync(ctx, all, files, whole)
	each(ctx, all, func(_ context.Context, c *candidate) error {
		again, err := stampOf(filepath.Join(b.cfg.Dir, c.name))
		if err != nil {
			return fmt.Errorf("compare the drop: %w", err)
		}
		if again != c.stamp {
			return errChanged
		}
		b.did("compared")
		return nil
	})
	b.place(ctx, all)
}

// sync syncs copies that have so many files in all. whole is the folder that
// they are in.
func (b *Inbox) sync(ctx context.Context, all []*candidate, files int, whole *effect.File) {
	var err error
	if files > maxSyncedSingly {
		effect.Before("sync", whole.Name())
		err = unix.Syncfs(int(whole.Fd()))
	}
	each(ctx, all, func(_ context.Context, c *candidate) error {
		if files <= maxSyncedSingly {
			err = syncTree(b.copyOf(c, newPrefix))
		}
		if err != nil {
			return fmt.Errorf("sync the copy: %w", err)
		}
		return nil
	})
	b.did("copies synced")
}

// place gives synced copies their names.
func (b *Inbox) place(ctx context.Context, all []*candidate) {
	each(ctx, all, func(_ context.Context, c *candidate) error {
		if err := disk.MoveNew(b.copyOf(c, newPrefix), b.copyOf(c, "")); err != nil {
			return fmt.Errorf("move the copy into place: %w", err)
		}
		b.did("copy in place")
		return nil
	})
	if err := disk.SyncDir(filepath.Join(b.cfg.State, "jobs")); err != nil {
		each(ctx, all, func(context.Context, *candidate) error { return fmt.Errorf("sync the copy: %w", err) })
	}
	b.did("names synced")
}

// copy copies one drop into a folder of its own and returns how many files it
// wrote. They are not synced.
func (b *Inbox) copy(ctx context.Context, c *candidate) (files int, err error) {
	recipe, err := b.classify(c.name, c.stamp)
	if err != nil {
		return 0, err
	}
	if err := b.room(c.stamp.size); err != nil {
		return 0, err
	}
	j := job.Job{Name: job.OutputName(c.name), Drop: c.name, DropKey: c.stamp.key(c.name), Recipe: recipe, Entry: c.name, Timeout: b.cfg.JobTimeout}
	if c.stamp.kind.IsDir() {
		j.Name = job.FolderName(c.name)
	}
	if err := b.begin(c, j, ""); err != nil {
		return 0, err
	}
	source := filepath.Join(b.copyOf(c, newPrefix), sourceDir)
	if err := effect.Mkdir(source, 0o700); err != nil {
		return 0, fmt.Errorf("make folder for the copy: %w", err)
	}
	b.did("folder made")
	from, to := filepath.Join(b.cfg.Dir, c.name), filepath.Join(source, c.name)
	if c.stamp.kind.IsDir() {
		files, err = copyTree(ctx, from, to)
	} else {
		files, err = 1, copyFile(ctx, from, to, c.stamp)
	}
	if err != nil {
		return files, err
	}
	b.did("copied")
	return files, nil
}

// room reports before anything is copied if it can't be kept.
func (b *Inbox) room(need int64) error {
	free, err := disk.Free(b.cfg.State)
	if err != nil {
		return fmt.Errorf("look for room: %w", err)
	}
	if need > free {
		return &disk.NoRoom{Path: b.cfg.State, Need: need, Free: free}
	}
	return nil
}

// begin makes a job's folder, in which its copy grows, and with it the job's
// ID. Of ten thousand in one second, two draw the same one now and then.
func (b *Inbox) begin(c *candidate, j job.Job, reason string) error {
	for range maxTries {
		now := b.cfg.Now().UTC()
		c.job = j
		c.job.ID, c.job.State, c.job.Created, c.job.Updated = job.NewID(now, b.cfg.Random()), job.Queued, now, now
		c.job.History = []job.Step{{Time: now, Event: job.Created, State: job.Queued, Reason: reason}}
		temp := b.copyOf(c, newPrefix)
		_, err := os.Lstat(b.copyOf(c, ""))
		if errors.Is(err, fs.ErrNotExist) {
			err = effect.Mkdir(temp, 0o700)
		} else if err == nil {
			err = fs.ErrExist
		}
		switch {
		case errors.Is(err, fs.ErrExist):
			continue
		case err != nil:
			c.job.ID = "" // nothing here is ours to remove
			return fmt.Errorf("make folder for the copy: %w", err)
		}
		if err := effect.WriteFile(filepath.Join(temp, unrecorded), nil, 0o600); err != nil {
			return fmt.Errorf("mark the copy: %w", err)
		}
		return nil
	}
	c.job.ID = ""
	return errors.New("make folder for the copy: no free ID was found")
}

// copyFile copies a drop that is a file.
func copyFile(ctx context.Context, from, to string, s stamp) error {
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
	if written(in) {
		return errOpen
	}
	if err := copyTo(ctx, to, in, s.size); err != nil {
		return fmt.Errorf("copy the drop: %w", err)
	}
	return nil
}

// written reports whether a program has the file open for writing. The kernel
// tells only the file's owner, and not on every file system: then nobody has.
func written(f *os.File) bool {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if err == nil {
		_, _ = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK) // else it ends when the file is closed
		return false
	}
	return errors.Is(err, unix.EAGAIN)
}

// copyTo writes a new file with what in holds: size bytes. It is not synced.
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
	return out.Close()
}

// syncTree syncs everything in a folder, and the folder.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return disk.SyncDir(name)
		case !d.Type().IsRegular():
			return nil
		}
		f, err := effect.Open(name)
		if err != nil {
			return err
		}
		return errors.Join(f.Sync(), f.Close())
	})
}
