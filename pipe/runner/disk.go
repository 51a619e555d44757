package runner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"osbuilder/pipe/effect"
)

// A disk writes files so that a crash leaves the old one or the new one.
type disk struct {
	// fault, if set, is asked before each write and stands in for a disk
	// that fails.
	fault func(op, path string) error
}

// tempSuffix marks a file that was not finished; what carries it can go.
const tempSuffix = ".part"

func (d disk) failing(op, path string) error {
	if d.fault == nil {
		return nil
	}
	return d.fault(op, path)
}

// write makes path hold data: whole, synced, and its folder synced too.
func (d disk) write(path string, data []byte) error {
	temp := path + tempSuffix
	if err := d.writeNew(temp, data, 0o600); err != nil {
		_ = effect.Remove(temp) // the next start does
		return err
	}
	if err := effect.Rename(temp, path); err != nil {
		_ = effect.Remove(temp) // the next start does
		return fmt.Errorf("write %s: %w", path, err)
	}
	return syncDir(filepath.Dir(path))
}

// writeNew makes path hold data, synced. Its folder is not.
func (d disk) writeNew(path string, data []byte, mode fs.FileMode) error {
	f, err := effect.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, mode)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	defer f.Close()
	if err := d.failing("write", path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if _, err := f.Write(data); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// mark makes path exist exactly once: fs.ErrExist if it did already.
func (d disk) mark(path string, data []byte) error {
	if err := d.failing("write", path); err != nil {
		return fmt.Errorf("mark %s: %w", path, err)
	}
	f, err := effect.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	defer f.Close()
	if _, err := f.Write(data); err != nil {
		return errors.Join(fmt.Errorf("mark: %w", err), effect.Remove(path))
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("mark: %w", err)
	}
	return syncDir(filepath.Dir(path))
}

// syncDir is the function, on this disk.
func (d disk) syncDir(path string) error {
	if err := d.failing("sync", path); err != nil {
		return fmt.Errorf("sync folder %s: %w", path, err)
	}
	return syncDir(path)
}

// syncDir makes the names in a folder last.
func syncDir(path string) error {
	f, err := effect.Open(path)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	return nil
}

// syncFileSystem makes all last that was written to the file system of a folder.
func syncFileSystem(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync file system: %w", err)
	}
	defer f.Close()
	effect.Before("sync", dir)
	if err := unix.Syncfs(int(f.Fd())); err != nil {
		return fmt.Errorf("sync file system: %w", err)
	}
	return nil
}

// removeParts removes what a crash left unfinished in a folder.
func removeParts(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clean %s: %w", dir, err)
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), tempSuffix) {
			if err := effect.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("clean %s: %w", dir, err)
			}
		}
	}
	return nil
}

// dropZeros cuts the NUL bytes off the end of a file, but keeps least bytes. They are what a crash leaves where a file had grown and its new blocks
// were not yet written.
func dropZeros(path string, least int64) error {
	f, err := effect.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("cut what a crash left: %w", err)
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("cut what a crash left: %w", err)
	}
	keep := size
	for buf := make([]byte, 64<<10); keep > least; {
		piece := buf[:min(int64(len(buf)), keep-least)]
		if _, err := f.ReadAt(piece, keep-int64(len(piece))); err != nil {
			return fmt.Errorf("cut what a crash left: %w", err)
		}
		text := bytes.TrimRight(piece, "\x00")
		keep -= int64(len(piece) - len(text))
		if len(text) > 0 {
			break
		}
	}
	if keep == size {
		return nil
	}
	if err := f.Truncate(keep); err != nil {
		return fmt.Errorf("cut what a crash left: %w", err)
	}
	return nil
}

// exists reports whether there is something at path. What can't be looked at
// counts as there, so that nothing is done twice.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// freeBytes is the room left to the runner on path's disk.
func freeBytes(path string) (int64, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return 0, fmt.Errorf("measure free space of %s: %w", path, err)
	}
	return int64(s.Bavail) * s.Bsize, nil
}
