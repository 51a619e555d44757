package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

type (
	// visitFile is called with the folder that the entry is in.
	visitFile func(dir int, e entry, st *unix.Stat_t) error
	// visitFolder is called with the folder, after what is in it.
	visitFolder func(fd int, name string, st *unix.Stat_t) error
)

// walk visits what is below a folder: regular files and links into the Nix
// store. Anything else is refused, and so is more than maxEntries. Each name is
// opened from its folder's descriptor and never through a link.
func (c *collector) walk(ctx context.Context, root string, file visitFile, folder visitFolder) error {
	fd, err := unix.Open(root, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", root, err)
	}
	w := &walk{c: c, file: file, folder: folder}
	return w.visit(ctx, fd, "", 0)
}

type walk struct {
	c       *collector
	file    visitFile
	folder  visitFolder
	entries int // that were listed
}

// visit closes fd.
func (w *walk) visit(ctx context.Context, fd int, name string, depth int) error {
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	if depth > maxDepth {
		return refuse(name[:64]+"…", "lies more than %d folders deep", maxDepth)
	}
	names, err := w.list(dir)
	if err != nil {
		return err
	}
	for _, base := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := w.entry(ctx, fd, path.Join(name, base), depth); err != nil {
			return err
		}
	}
	return nil
}

// list returns the names in a folder, in order. It reads no more of them than
// there may be: a job can have made millions.
func (w *walk) list(dir *os.File) ([]string, error) {
	var names []string
	for {
		some, err := dir.Readdirnames(1000)
		if w.entries += len(some); w.entries > maxEntries {
			return nil, &refusal{message: fmt.Sprintf("$OUT holds more than %d files and folders: pack them into an archive", maxEntries)}
		}
		names = append(names, some...)
		if errors.Is(err, io.EOF) {
			slices.Sort(names)
			return names, nil
		}
		if err != nil {
			return nil, fmt.Errorf("list $OUT/%s: %w", dir.Name(), err)
		}
	}
}

func (w *walk) entry(ctx context.Context, dir int, name string, depth int) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, path.Base(name), &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("look at $OUT/%s: %w", name, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return w.file(dir, entry{name: name}, &st)
	case unix.S_IFLNK:
		store, err := w.c.resolve(dir, name)
		if err != nil {
			return err
		}
		return w.file(dir, entry{name: name, store: store}, &st)
	case unix.S_IFDIR:
		fd, err := unix.Openat(dir, path.Base(name), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open $OUT/%s: %w", name, err)
		}
		// Once more, since visit closes the one that it reads.
		if w.folder == nil {
			return w.visit(ctx, fd, name, depth+1)
		}
		again, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("open $OUT/%s: %w", name, err)
		}
		defer unix.Close(again)
		if err := w.visit(ctx, fd, name, depth+1); err != nil {
			return err
		}
		return w.folder(again, name, &st)
	case unix.S_IFIFO:
		return refuse(name, "is a named pipe: only regular files can be shipped")
	case unix.S_IFSOCK:
		return refuse(name, "is a socket: only regular files can be shipped")
	default:
		return refuse(name, "is a device: only regular files can be shipped")
	}
}

// resolve returns the file in the Nix store that a link leads to. The link
// itself must point there: what else it might pass through is the job's, and
// the store is root's and never changes.
func (c *collector) resolve(dir int, name string) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(dir, path.Base(name), buf)
	if err != nil {
		return "", fmt.Errorf("read link $OUT/%s: %w", name, err)
	}
	target := string(buf[:n])
	foreign := func() error {
		return refuse(name, "is a link to %s: only files made by the job can be shipped", printable(target))
	}
	if !within(c.cfg.Store, filepath.Clean(target)) {
		return "", foreign()
	}
	file, err := filepath.EvalSymlinks(target)
	if err != nil {
		return "", refuse(name, "is a link to %s, which can't be followed: %v", printable(target), err)
	}
	if !within(c.cfg.Store, file) {
		return "", foreign()
	}
	info, err := os.Lstat(file)
	if err != nil {
		return "", refuse(name, "is a link to %s, which can't be read: %v", printable(target), err)
	}
	if info.IsDir() {
		return "", refuse(name, "is a link to the folder %s: link the files in it, one by one", printable(target))
	}
	if !info.Mode().IsRegular() {
		return "", foreign()
	}
	return file, nil
}

// within reports whether a clean path lies below a folder.
func within(folder, p string) bool {
	return strings.HasPrefix(p, strings.TrimSuffix(folder, "/")+"/")
}
