// Package disk is what the daemon asks of a file system beyond package os:
// that names last, how much room there is, and a rename that replaces nothing.
package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// SyncDir makes the names in a folder last. File systems that have nothing to
// sync there (some network and FUSE ones) count as synced.
func SyncDir(path string) error {
	d, err := effect.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	err = d.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	return err
}

// MkdirAll makes a folder and its parents, with exactly perm whatever the
// umask is, and makes every name that it adds last.
func MkdirAll(path string, perm fs.FileMode) error {
	if info, err := os.Stat(path); err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: unix.ENOTDIR}
		}
		return nil
	}
	parent := filepath.Dir(path)
	if parent != path {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := effect.Mkdir(path, perm); err != nil {
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return nil
		}
		return err
	}
	if err := effect.Chmod(path, perm); err != nil {
		return err
	}
	return SyncDir(parent)
}

// MoveNew renames from to to and fails with [fs.ErrExist] if there is
// something at to. Where the file system can't promise that, it looks first.
func MoveNew(from, to string) error {
	effect.Before("rename", to)
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.ENOTSUP) {
		if _, statErr := os.Lstat(to); statErr == nil {
			err = unix.EEXIST
		} else {
			return effect.Rename(from, to)
		}
	}
	if err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// Free returns how many bytes an ordinary user can still write below path:
// without bound where the file system doesn't say.
func Free(path string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, &fs.PathError{Op: "statfs", Path: path, Err: err}
	}
	if s.Blocks == 0 {
		return math.MaxInt64, nil
	}
	return int64(s.Bavail) * s.Bsize, nil
}

// Full reports whether err says that a disk or a quota is full.
func Full(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// NoRoom is the error of a write for which a disk has no room.
type NoRoom struct {
	Path string // the folder that is full
	Need int64  // bytes still to be written
	Free int64  // bytes there are
	Keep int64  // bytes of these that are to stay free
}

func (e *NoRoom) Error() string {
	switch {
	case e.Keep > 0 && e.Need <= e.Free:
		return fmt.Sprintf("no room in %s: %s are needed, %s are free, and %s of these are to stay free (MIN_FREE)",
			e.Path, pipe.Size(e.Need), pipe.Size(e.Free), pipe.Size(e.Keep))
	case e.Free == 0 && e.Need == 0:
		return fmt.Sprintf("no room in %s: nothing is free", e.Path)
	case e.Need <= e.Free:
		// The file system keeps some back, or it is out of something else.
		return fmt.Sprintf("no room in %s: it takes no more, though %s are free", e.Path, pipe.Size(e.Free))
	}
	return fmt.Sprintf("no room in %s: %s are needed, %s are free, %s are missing",
		e.Path, pipe.Size(e.Need), pipe.Size(e.Free), pipe.Size(e.Need-e.Free))
}

// Unwrap lets callers ask for ENOSPC.
func (e *NoRoom) Unwrap() error { return unix.ENOSPC }
