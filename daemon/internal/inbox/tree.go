package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// Bounds of a folder that is dropped: far above any configuration, below what
// would fill the disks on the way.
const (
	maxTreeBytes   = 2 << 30
	maxTreeEntries = 100_000
	maxTreeDepth   = 64
	maxTreePath    = 1000 // bytes; the system's own bound is 4096, from its root
)

// copyTree makes a copy of a folder and returns how many files it wrote: files
// with their executable bit, folders, and links that stay within it. Everything
// else is refused. While it copies, nothing outside the folder is opened,
// whatever anybody puts in the place of a part of it.
func copyTree(ctx context.Context, from, to string) (files int, err error) {
	source, err := os.OpenRoot(from)
	if err != nil {
		if errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, fs.ErrNotExist) {
			return 0, errChanged
		}
		return 0, fmt.Errorf("read the drop: %w", err)
	}
	defer func() { _ = source.Close() }() // nothing is written by it
	if err := allClosed(ctx, source); err != nil {
		return 0, err
	}
	var entries int
	var bytes int64
	err = fs.WalkDir(source.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			return gone(err)
		}
		if entries++; entries > maxTreeEntries {
			return refuse("Leave out what the job doesn't need.", "it holds more than %d files and folders", maxTreeEntries)
		}
		if strings.Count(name, "/") >= maxTreeDepth {
			return refuse("Make it flatter.", "its folders are more than %d deep", maxTreeDepth)
		}
		if len(name) > maxTreePath {
			return refuse("Make it shorter.", "the path %s… in it is longer than %d bytes", quote(cut(name, 60)), maxTreePath)
		}
		if !utf8.ValidString(name) {
			return refuse("Rename it.", "the name %q in it is not valid UTF-8", name)
		}
		info, err := d.Info()
		if err != nil {
			return gone(err)
		}
		target := filepath.Join(to, filepath.FromSlash(name))
		switch mode := info.Mode(); {
		case mode.IsDir():
			return effect.Mkdir(target, 0o700)
		case mode&fs.ModeSymlink != 0:
			return copyLink(source, name, target)
		case !mode.IsRegular():
			return refuse("Remove it.", "%s in it is neither a file nor a folder, but a %s", quote(name), special(mode))
		}
		if bytes += info.Size(); bytes > maxTreeBytes {
			return refuse("Leave out what the job doesn't need, or let it download the rest.", "it has more than %s", pipe.Size(maxTreeBytes))
		}
		files++
		return copyMember(ctx, source, name, info, target)
	})
	return files, err
}

// allClosed looks, before anything is copied, whether somebody may go on
// writing a file of the folder.
func allClosed(ctx context.Context, source *os.Root) error {
	return fs.WalkDir(source.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return gone(err)
		case len(name) > maxTreePath:
			return fs.SkipDir // the folder is refused
		case !d.Type().IsRegular():
			return nil
		}
		f, err := source.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
		if err != nil {
			return nil // the copying tells
		}
		defer f.Close()
		if written(f) {
			return fmt.Errorf("%s: %w", quote(name), errOpen)
		}
		return nil
	})
}

// gone makes a part that went away while the folder was copied a change.
func gone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return errChanged
	}
	return fmt.Errorf("read the drop: %w", err)
}

func copyMember(ctx context.Context, source *os.Root, name string, info fs.FileInfo, target string) error {
	in, err := source.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) {
		return errChanged
	}
	if err != nil {
		return gone(err)
	}
	defer in.Close()
	now, err := in.Stat()
	if err != nil {
		return gone(err)
	}
	if stampInfo(now) != stampInfo(info) {
		return errChanged
	}
	if err := copyTo(ctx, target, in, info.Size()); err != nil {
		return fmt.Errorf("copy the drop: %w", err)
	}
	if info.Mode()&0o100 != 0 {
		return effect.Chmod(target, 0o700)
	}
	return nil
}

// copyLink copies a link that stays in the folder.
func copyLink(source *os.Root, name, target string) error {
	to, err := source.Readlink(name)
	if err != nil {
		return gone(err)
	}
	switch {
	case stays(name, to):
		return effect.Symlink(to, target)
	case strings.HasPrefix(to, "/nix/store/"):
		return refuse("It is left over from a build: remove it.", "the link %s in it leads out of the folder, to %s", quote(name), quote(to))
	default:
		return refuse("Put what it leads to in its place, or remove it.", "the link %s in it leads out of the folder, or may, to %s", quote(name), quote(to))
	}
}

// stays reports whether a link called name, its path in a folder, stays in that
// folder whatever other such links are there. So it may go up first and then
// down: going up behind a name, it could leave by another link.
func stays(name, to string) bool {
	down := false
	for part := range strings.SplitSeq(to, "/") {
		switch part {
		case "", ".": // nowhere
		case "..":
			if down {
				return false
			}
		default:
			down = true
		}
	}
	return utf8.ValidString(to) && !path.IsAbs(to) && filepath.IsLocal(path.Join(path.Dir(name), to))
}
