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
	"slices"
	"strings"
	"time"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"osbuilder/daemon/internal/disk"
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

// whatIsNext is what will be put into the store's place. From when it is whole
// until it is there, no store is opened that is not in its place.
func whatIsNext(path string) string { return path + ".restoring" }

// restoring exchanges the store for what choose names. Stopped at any point it
// can be done again, and nothing is lost: the old file leaves its place whole,
// and the new one comes when nothing of the old is left there.
func restoring(ctx context.Context, path string, choose func() (string, error)) (r Restoring, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("restore %s: %w", path, advise(ctx, full(err), path))
		}
	}()
	held, err := hold(path)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, held.Close()) }()
	if err := fold(ctx, path); err != nil {
		return r, err
	}
	if r.From, err = choose(); err != nil {
		return r, err
	}
	next := whatIsNext(path)
	brokenOff := fileExists(next) && !fileExists(path)
	if err := prepareNext(ctx, r.From, next); err != nil {
		return r, err
	}
	if r.Kept, err = setFileAside(path); err != nil {
		return r, err
	}
	if r.Kept == "" && brokenOff {
		r.Kept = lastAside(path)
	}
	if err := effect.Rename(next, path); err != nil {
		return r, err
	}
	return r, syncPath(filepath.Dir(path))
}

// fold puts into the file what was written ahead of it: else it would be judged,
// and kept, without that. A file that can't be read so far stays as it is.
func fold(ctx context.Context, path string) (err error) {
	if info, err := os.Stat(path); err != nil || info.Size() == 0 {
		return nil // opened, an empty file would lose what was written ahead of it
	}
	defer func() {
		var e *sqlite.Error
		if errors.As(err, &e) && !slices.Contains(mendable, e.Code()&0xff) && !disk.Full(full(err)) {
			err = nil
		}
	}()
	db, err := connect(path, url.Values{"mode": {"rw"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var version int
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	effect.Before("write", path)
	_, err = db.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`)
	return err
}

// mendable are the kinds of errors that say nothing about what is in a file.
var mendable = []int{
	sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_FULL,
	sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM,
}

// prepareNext makes what will be put in the store's place, whole under its name.
func prepareNext(ctx context.Context, from, next string) (err error) {
	temp := next + ".tmp"
	for _, left := range []string{temp, temp + "-journal"} {
		if err := removeIfThere(left); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeIfThere(temp))
		}
	}()
	if from == "" {
		err = blank(ctx, temp)
	} else {
		err = copyCopy(ctx, from, temp)
	}
	if err != nil {
		return err
	}
	if err := syncPath(temp); err != nil {
		return err
	}
	if err := effect.Rename(temp, next); err != nil {
		return err
	}
	return syncPath(filepath.Dir(next))
}

// besides are the files that belong to a database: what is written ahead of it,
// and what undoes a change that was broken off.
var besides = []string{"-wal", "-journal"}

// setFileAside moves the file out of its place, with what belongs to it, and
// returns under which name it is kept; "" if there was none. What belongs to it
// has both names until the file itself has left: no other database is ever
// beside it, and the file never without it.
func setFileAside(path string) (string, error) {
	aside := path + asidePart + time.Now().UTC().Format(copyStamp)
	for fileExists(aside) || fileExists(aside+"-wal") || fileExists(aside+"-journal") {
		aside += "x"
	}
	for _, suffix := range besides {
		if err := keepToo(path, suffix, aside); err != nil {
			return "", err
		}
	}
	err := effect.Rename(path, aside)
	if errors.Is(err, fs.ErrNotExist) {
		aside = ""
	} else if err != nil {
		return "", err
	}
	if err := syncPath(filepath.Dir(path)); err != nil {
		return "", err
	}
	for _, suffix := range append([]string{"-shm"}, besides...) { // the first one only caches
		if err := removeIfThere(path + suffix); err != nil {
			return "", err
		}
	}
	return aside, syncPath(filepath.Dir(path))
}

const asidePart = ".damaged-"

// keepToo gives what belongs to the file a name beside the one that the file
// will have. Stopped before, it has one already.
func keepToo(path, suffix, aside string) error {
	info, err := os.Stat(path + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range asides(path, suffix) {
		if other, err := os.Stat(name); err != nil || !os.SameFile(info, other) {
			continue
		}
		if !fileExists(path) {
			return nil // beside the file, which has left
		}
		if err := effect.Remove(name); err != nil { // beside nothing
			return err
		}
	}
	return effect.Link(path+suffix, aside+suffix)
}

// asides returns what was set aside before and ends in suffix, oldest first.
func asides(path, suffix string) []string {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, filepath.Base(path)+asidePart) && strings.HasSuffix(name, suffix) {
			names = append(names, filepath.Join(filepath.Dir(path), name))
		}
	}
	return names
}

// lastAside is the file that was set aside last.
func lastAside(path string) string {
	names := databases(asides(path, ""))
	if len(names) == 0 {
		return ""
	}
	return names[len(names)-1]
}

// databases leaves out what belongs to them.
func databases(names []string) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		return slices.ContainsFunc(append([]string{"-shm"}, besides...), func(suffix string) bool { return strings.HasSuffix(name, suffix) })
	})
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
