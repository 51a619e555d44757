package inbox

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// A stamp tells one state of a drop from every other, without reading it.
type stamp struct {
	kind         fs.FileMode // type bits
	inode        uint64
	size         int64 // of a folder: of all files in it
	mtime, ctime int64 // ns
	tree         [sha256.Size]byte
	locked       bool // git is at work in the folder
}

// stampOf looks at a drop, links not followed; at a folder with all in it.
func stampOf(path string) (stamp, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return stamp{}, err
	}
	s := stampInfo(info)
	if !info.IsDir() {
		return s, nil
	}
	s.size = 0
	sum := sha256.New()
	err = filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if name == path && err == nil {
			return nil
		}
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // went away meanwhile: the next look tells
		}
		if err != nil {
			return err
		}
		if strings.HasSuffix(name, ".lock") && filepath.Base(filepath.Dir(name)) == ".git" {
			s.locked = true
		}
		i := stampInfo(info)
		if i.kind.IsRegular() {
			s.size += i.size
		}
		fmt.Fprintf(sum, "%q %o %d %d %d %d\n", name[len(path):], i.kind, i.inode, i.size, i.mtime, i.ctime)
		return nil
	})
	sum.Sum(s.tree[:0])
	return s, err
}

func stampInfo(info fs.FileInfo) stamp {
	s := stamp{kind: info.Mode().Type(), size: info.Size(), mtime: info.ModTime().UnixNano()}
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		s.inode, s.ctime = sys.Ino, sys.Ctim.Nano()
	}
	return s
}

// key names this very drop for ever. The time of its last change of any kind
// (ctime) nobody can set back, so the same file put there again, even by
// moving it back, has another key. The device is left out: its number can be
// another after a restart.
func (s stamp) key(name string) string {
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %o %d %d %d %d %x", name, s.kind, s.inode, s.size, s.mtime, s.ctime, s.tree))
	return "1-" + hex.EncodeToString(sum[:16])
}

// moved reports whether s is t after a rename, which changes ctime.
func (s stamp) moved(t stamp) bool {
	s.ctime = t.ctime
	return s == t
}

// ignored reports whether a name is no drop: hidden, ours, or one that editors
// and downloads give to what isn't finished.
func ignored(name string) bool {
	if strings.HasPrefix(name, ".") || name == rejectedDir || name == "4913" {
		return true // 4913 is Vim's, to see whether it can write there
	}
	if strings.HasPrefix(name, "#") && strings.HasSuffix(name, "#") {
		return true
	}
	lower := strings.ToLower(name)
	for _, end := range []string{"~", ".swp", ".swx", ".swo", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".filepart"} {
		if strings.HasSuffix(lower, end) {
			return true
		}
	}
	return false
}
