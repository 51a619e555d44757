package deliver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"osbuilder/daemon/internal/disk"
	"osbuilder/pipe/effect"
)

// Every file in output/ is for others to read, whatever the umask is.

func chmod(f *effect.File, perm fs.FileMode) error {
	info, err := f.Stat()
	if err != nil || info.Mode().Perm() == perm {
		return err
	}
	return f.Chmod(perm)
}

func mkdirs(root *effect.Root, name string) error {
	if name == "." {
		return nil
	}
	if err := mkdirs(root, path.Dir(name)); err != nil {
		return err
	}
	if err := root.Mkdir(name, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return root.Chmod(name, 0o755)
}

// create makes a file anew, readable for all, and hands it to fill.
func create(root *effect.Root, name string, fill func(io.Writer) error) error {
	f, err := root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := chmod(f, 0o644); err != nil {
		return err
	}
	if err := fill(f); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func writeFile(root *effect.Root, name string, data []byte) error {
	err := create(root, name, func(w io.Writer) error {
		_, err := w.Write(data)
		return err
	})
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

func copyFile(ctx context.Context, root *effect.Root, name string, from io.Reader) error {
	return create(root, name, func(w io.Writer) error {
		_, err := io.Copy(w, within(ctx, from))
		return err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// within ends a copy when its context ends.
func within(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(b)
	})
}

// copyLog copies the build log. A job that never ran has none, and gets an
// empty one.
func copyLog(ctx context.Context, root *effect.Root, from string) error {
	f, err := os.Open(from)
	if errors.Is(err, fs.ErrNotExist) {
		return writeFile(root, logName, nil)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return copyFile(ctx, root, logName, f)
}

// copyTree copies what was dropped to source/: files and folders. A link is
// copied as a link if it stays within; nothing else can be in a taken drop.
func copyTree(ctx context.Context, root *effect.Root, from string) error {
	if err := mkdirs(root, sourceName); err != nil {
		return err
	}
	source, err := os.OpenRoot(from)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { _ = source.Close() }() // nothing is written by it
	return fs.WalkDir(source.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		to := path.Join(sourceName, name)
		switch {
		case err != nil:
			return err
		case d.IsDir():
			return mkdirs(root, to)
		case d.Type()&fs.ModeSymlink != 0:
			target, err := source.Readlink(name)
			if err != nil {
				return err
			}
			if !filepath.IsLocal(path.Join(path.Dir(name), target)) || path.IsAbs(target) {
				return fmt.Errorf("%w: link %q leads out of the drop", ErrName, name)
			}
			return root.Symlink(target, to)
		case !d.Type().IsRegular():
			return fmt.Errorf("%w: %q is neither a file nor a folder", ErrName, name)
		}
		f, err := source.Open(name)
		if err != nil {
			return err
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			return err
		}
		if err := copyFile(ctx, root, to, f); err != nil || info.Mode()&0o100 == 0 {
			return err
		}
		return root.Chmod(to, 0o755)
	})
}

// syncTree makes the names in dir and below last; the files are synced
// already.
func syncTree(dir string) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return disk.SyncDir(name)
	})
}
