package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

// A Restoring says what Restore did.
type Restoring struct {
	From string // the copy; empty: the store is empty now
	Kept string // where the file lies now that was in the store's place; empty: there was none
}

// Restore puts a copy in the place of the store at path, while no daemon runs.
// Without a name it takes the newest sound copy, and refuses if the store
// itself is sound. What was in its place is kept.
func Restore(ctx context.Context, path, name string) (Restoring, error) {
	return restoring(ctx, path, func() (string, error) {
		if name != "" {
			if err := checkCopy(ctx, name); err != nil {
				return "", fmt.Errorf("the copy %s can't be used: %w", name, err)
			}
			return name, nil
		}
		if err := unusable(ctx, path); err != nil {
			return "", err
		}
		c, ok := soundCopy(ctx, path)
		if !ok {
			return "", hint.With(errors.New("there is no sound copy"), "Begin anew, without the jobs that were under way: "+steps("restore --empty"))
		}
		return c.Path, nil
	})
}

// RestoreEmpty puts an empty store in the place of the one at path. It refuses
// if that is sound.
func RestoreEmpty(ctx context.Context, path string) (Restoring, error) {
	return restoring(ctx, path, func() (string, error) { return "", unusable(ctx, path) })
}

// unusable is an error if the store at path can be used as it is.
func unusable(ctx context.Context, path string) error {
	if err := checkCopy(ctx, path); err != nil {
		return nil //nolint:nilerr // that is what was to be found out
	}
	return hint.With(errors.New("the records are sound, there is nothing to restore"),
		"To go back to a copy all the same, name it. They lie in "+copiesDir(path)+".")
}

// restoring exchanges the store for what choose names. At every moment there is
// a file in its place, if there was one before.
func restoring(ctx context.Context, path string, choose func() (string, error)) (r Restoring, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore %s: %w", path, advise(ctx, err, path))
		}
	}()
	held, err := hold(path)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if r.From, err = choose(); err != nil {
		return r, err
	}
	temp := path + ".restoring"
	for _, left := range []string{temp, temp + "-journal"} {
		if err := removeIfThere(left); err != nil {
			return r, err
		}
	}
	if r.From == "" {
		err = blank(ctx, temp)
	} else {
		err = copyCopy(ctx, r.From, temp)
	}
	if err == nil {
		err = syncPath(temp)
	}
	if err != nil {
		return r, errors.Join(err, removeIfThere(temp))
	}
	if r.Kept, err = setFileAside(path); err != nil {
		return r, errors.Join(err, removeIfThere(temp))
	}
	if err := effect.Rename(temp, path); err != nil {
		return r, err
	}
	return r, syncPath(filepath.Dir(path))
}

// setFileAside gives the file a second name, under which it stays. What it has
// written ahead goes along: it must not be taken for the next file's.
func setFileAside(path string) (string, error) {
	aside := path + ".damaged-" + time.Now().UTC().Format(copyStamp)
	for fileExists(aside) || fileExists(aside+"-wal") {
		aside += "x"
	}
	for _, suffix := range []string{"-wal", "-shm"} {
		if err := effect.Rename(path+suffix, aside+suffix); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	switch err := effect.Link(path, aside); {
	case err == nil:
		return aside, nil
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	default:
		return "", err
	}
}

// blank makes a store with nothing in it.
func blank(ctx context.Context, path string) error {
	db, err := connect(path, url.Values{"_pragma": {"journal_mode(DELETE)", "synchronous(FULL)"}})
	if err != nil {
		return err
	}
	s := SQLite{path: path, db: db}
	return errors.Join(s.prepare(ctx, migrations), s.Close())
}

// copyCopy copies a copy, and sees to it that the result is known as one.
func copyCopy(ctx context.Context, from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := effect.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		return errors.Join(err, out.Close())
	}
	if err := out.Close(); err != nil {
		return err
	}
	return mark(ctx, to, info.ModTime()) // one that older code made doesn't say so
}
