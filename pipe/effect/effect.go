// Package effect is what both halves go through to change what outlives them:
// files, records, requests to the other half, processes. So one hook sees
// every such step, and a test can stop the program before any of them.
//
// Functions and types have the names of package os and do the same. Where a
// change is made by other means (a call of the kernel, SQL, SFTP, a process
// started), [Before] goes in front of it; a test of this package finds what
// was forgotten.
package effect

import (
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// before is asked before each effect. Production leaves it nil.
var before func(op, object string)

// Hook has f called before every effect, by whichever goroutine is about to
// have it, with what is done to what. It must be called before anything else
// runs, and is for tests.
func Hook(f func(op, object string)) { before = f }

// Before announces an effect.
func Before(op, object string) {
	if before != nil {
		before(op, object)
	}
}

// Rename is [os.Rename].
func Rename(from, to string) error {
	Before("rename", to)
	return os.Rename(from, to)
}

// Link is [os.Link].
func Link(from, to string) error {
	Before("link", to)
	return os.Link(from, to)
}

// Symlink is [os.Symlink].
func Symlink(target, name string) error {
	Before("symlink", name)
	return os.Symlink(target, name)
}

// Remove is [os.Remove].
func Remove(name string) error {
	Before("remove", name)
	return os.Remove(name)
}

// RemoveAll is [os.RemoveAll]. With a hook, each name that goes is an effect.
func RemoveAll(name string) error {
	if before != nil {
		if err := removeBelow(name); err != nil {
			return err
		}
	}
	return os.RemoveAll(name)
}

func removeBelow(name string) error {
	info, err := os.Lstat(name)
	if err != nil {
		return nil //nolint:nilerr // os.RemoveAll says what there is to say
	}
	if info.IsDir() {
		entries, err := os.ReadDir(name)
		if err != nil {
			return nil //nolint:nilerr // os.RemoveAll says what there is to say
		}
		for _, e := range entries {
			if err := RemoveAll(filepath.Join(name, e.Name())); err != nil {
				return err
			}
		}
	}
	Before("remove", name)
	return nil
}

// Mkdir is [os.Mkdir].
func Mkdir(name string, perm fs.FileMode) error {
	Before("mkdir", name)
	return os.Mkdir(name, perm)
}

// MkdirAll is [os.MkdirAll]. With a hook, each folder is an effect.
func MkdirAll(name string, perm fs.FileMode) error {
	if before != nil {
		if _, err := os.Stat(name); err == nil {
			return os.MkdirAll(name, perm)
		}
		if parent := filepath.Dir(name); parent != name {
			if err := MkdirAll(parent, perm); err != nil {
				return err
			}
		}
		Before("mkdir", name)
	}
	return os.MkdirAll(name, perm)
}

// Chmod is [os.Chmod].
func Chmod(name string, mode fs.FileMode) error {
	Before("chmod", name)
	return os.Chmod(name, mode)
}

// Chown is [os.Chown].
func Chown(name string, uid, gid int) error {
	Before("chown", name)
	return os.Chown(name, uid, gid)
}

// Truncate is [os.Truncate].
func Truncate(name string, size int64) error {
	Before("truncate", name)
	return os.Truncate(name, size)
}

// WriteFile is [os.WriteFile].
func WriteFile(name string, data []byte, perm fs.FileMode) error {
	f, err := OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, perm)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if closing := f.Close(); err == nil {
		err = closing
	}
	return err
}

// A File is an [os.File] whose changes are effects.
type File struct{ *os.File }

// Open is [os.Open].
func Open(name string) (*File, error) { return file(os.Open(name)) }

// OpenFile is [os.OpenFile].
func OpenFile(name string, flag int, perm fs.FileMode) (*File, error) {
	if changes(flag) {
		Before("open", name)
	}
	return file(os.OpenFile(name, flag, perm))
}

// changes reports whether opening alone can change something.
func changes(flag int) bool { return flag&(os.O_CREATE|os.O_TRUNC) != 0 }

// CreateTemp is [os.CreateTemp].
func CreateTemp(dir, pattern string) (*File, error) {
	Before("open", filepath.Join(dir, pattern))
	return file(os.CreateTemp(dir, pattern))
}

func file(f *os.File, err error) (*File, error) {
	if err != nil {
		return nil, err
	}
	return &File{f}, nil
}

// Write is [os.File.Write].
func (f *File) Write(b []byte) (int, error) {
	Before("write", f.Name())
	return f.File.Write(b)
}

// WriteString is [os.File.WriteString].
func (f *File) WriteString(s string) (int, error) {
	Before("write", f.Name())
	return f.File.WriteString(s)
}

// WriteAt is [os.File.WriteAt].
func (f *File) WriteAt(b []byte, offset int64) (int, error) {
	Before("write", f.Name())
	return f.File.WriteAt(b, offset)
}

// ReadFrom is [os.File.ReadFrom]. With a hook it writes piece by piece.
func (f *File) ReadFrom(r io.Reader) (int64, error) {
	if before != nil {
		return io.Copy(struct{ io.Writer }{f}, r)
	}
	return f.File.ReadFrom(r)
}

// Sync is [os.File.Sync].
func (f *File) Sync() error {
	Before("sync", f.Name())
	return f.File.Sync()
}

// Truncate is [os.File.Truncate].
func (f *File) Truncate(size int64) error {
	Before("truncate", f.Name())
	return f.File.Truncate(size)
}

// Chmod is [os.File.Chmod].
func (f *File) Chmod(mode fs.FileMode) error {
	Before("chmod", f.Name())
	return f.File.Chmod(mode)
}

// Chown is [os.File.Chown].
func (f *File) Chown(uid, gid int) error {
	Before("chown", f.Name())
	return f.File.Chown(uid, gid)
}

// A Root is an [os.Root] whose changes are effects.
type Root struct{ *os.Root }

// OpenRoot is [os.OpenRoot].
func OpenRoot(name string) (*Root, error) {
	r, err := os.OpenRoot(name)
	if err != nil {
		return nil, err
	}
	return &Root{r}, nil
}

// OpenFile is [os.Root.OpenFile].
func (r *Root) OpenFile(name string, flag int, perm fs.FileMode) (*File, error) {
	if changes(flag) {
		Before("open", r.path(name))
	}
	return file(r.Root.OpenFile(name, flag, perm))
}

// Mkdir is [os.Root.Mkdir].
func (r *Root) Mkdir(name string, perm fs.FileMode) error {
	Before("mkdir", r.path(name))
	return r.Root.Mkdir(name, perm)
}

// Chmod is [os.Root.Chmod].
func (r *Root) Chmod(name string, mode fs.FileMode) error {
	Before("chmod", r.path(name))
	return r.Root.Chmod(name, mode)
}

// Rename is [os.Root.Rename].
func (r *Root) Rename(from, to string) error {
	Before("rename", r.path(to))
	return r.Root.Rename(from, to)
}

// Symlink is [os.Root.Symlink].
func (r *Root) Symlink(target, name string) error {
	Before("symlink", r.path(name))
	return r.Root.Symlink(target, name)
}

// Remove is [os.Root.Remove].
func (r *Root) Remove(name string) error {
	Before("remove", r.path(name))
	return r.Root.Remove(name)
}

// RemoveAll is [os.Root.RemoveAll].
func (r *Root) RemoveAll(name string) error {
	if _, err := r.Lstat(name); err == nil {
		Before("remove", r.path(name))
	}
	return r.Root.RemoveAll(name)
}

func (r *Root) path(name string) string { return filepath.Join(r.Name(), name) }
