package setup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"osbuilder/pipe/effect"
)

// A target is a file with the owner and mode that it must have.
type target struct {
	path     string
	mode     os.FileMode
	uid, gid int
}

const tempPrefix = ".osbuilder-tmp-"

// create makes the file, whole, and fails with os.ErrExist if it is there: a
// link, unlike a rename, replaces nothing.
func (t target) create(data []byte) error {
	return t.write(data, func(temp string) error {
		return errors.Join(effect.Link(temp, t.path), effect.Remove(temp))
	})
}

// replace makes the file hold data; a reader sees all of the old or all of the
// new.
func (t target) replace(data []byte) error {
	return t.write(data, func(temp string) error { return effect.Rename(temp, t.path) })
}

func (t target) write(data []byte, place func(temp string) error) error {
	dir := filepath.Dir(t.path)
	f, err := effect.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer f.Close()
	temp := target{path: f.Name(), mode: t.mode, uid: t.uid, gid: t.gid}
	_, err = f.Write(data)
	if err == nil {
		err = temp.own()
	}
	if err == nil {
		err = f.Sync()
	}
	if err != nil {
		return errors.Join(err, effect.Remove(temp.path))
	}
	if err := place(temp.path); err != nil {
		if rm := effect.Remove(temp.path); rm != nil && !errors.Is(rm, os.ErrNotExist) {
			err = errors.Join(err, rm)
		}
		return err
	}
	return syncFolder(dir)
}

// own gives the file its owner and mode.
func (t target) own() error {
	info, err := os.Stat(t.path)
	if err != nil {
		return err
	}
	if uid, gid := ownerOf(info); uid != t.uid || gid != t.gid {
		if err := effect.Chown(t.path, t.uid, t.gid); err != nil {
			return err
		}
	}
	if info.Mode().Perm() != t.mode {
		return effect.Chmod(t.path, t.mode)
	}
	return nil
}

func ownerOf(info os.FileInfo) (uid, gid int) {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return -1, -1
	}
	return int(stat.Uid), int(stat.Gid)
}

func syncFolder(dir string) error {
	d, err := effect.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// staleAfter is far longer than any init runs: an older temporary file is a
// killed one's.
const staleAfter = time.Hour

// sweep removes what a killed init left in a folder of keys.
func sweep(dir string, now time.Time) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), tempPrefix) {
			continue
		}
		info, err := e.Info()
		if errors.Is(err, os.ErrNotExist) {
			continue // another init has just finished with it
		}
		if err != nil {
			return err
		}
		if now.Sub(info.ModTime()) < staleAfter {
			continue
		}
		if err := effect.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove what an earlier init left: %w", err)
		}
	}
	return nil
}
