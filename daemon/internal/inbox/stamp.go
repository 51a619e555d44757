package inbox

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// A stamp tells one state of a drop from every other, without reading it.
type stamp struct {
	kind         fs.FileMode // type bits
	inode        uint64
	size         int64             // of a folder: of all files in it
	mtime, ctime int64             // ns
	tree         [sha256.Size]byte // of all in a folder
	content      [sha256.Size]byte // the same without ctimes, of which a change of owner is one
	lock         string            // a file in the folder that says that git is at work there
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
	sum, content := sha256.New(), sha256.New()
	both := io.MultiWriter(sum, content)
	var clone clone
	err = filepath.WalkDir(path, func(name string, d fs.DirEntry, err error) error {
		if name == path && err == nil {
			return nil
		}
		var info fs.FileInfo
		if err == nil {
			info, err = d.Info()
		}
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil // went away meanwhile: the next look tells
		case errors.Is(err, unix.ENAMETOOLONG):
			fmt.Fprintf(both, "%q\n", name[len(path):]) // refused when it is copied
			return nil
		case err != nil:
			return err
		}
		inside := name[len(path)+1:]
		if isLock(inside) {
			s.lock = inside
		}
		clone.see(inside, d)
		i := stampInfo(info)
		if i.kind.IsRegular() {
			s.size += i.size
		}
		fmt.Fprintf(both, "%q %o %d %d %d", name[len(path):], i.kind, i.inode, i.size, i.mtime)
		fmt.Fprintf(sum, " %d\n", i.ctime) // with that, what it is since keys are on record
		fmt.Fprintln(content)
		return nil
	})
	sum.Sum(s.tree[:0])
	content.Sum(s.content[:0])
	if s.lock == "" && clone.begun && !clone.checkedOut {
		s.lock = ".git"
	}
	return s, err
}

// isLock reports whether a file in a folder is one by which git keeps others
// out: of the folder's own repository or of a submodule's.
func isLock(name string) bool {
	return strings.HasSuffix(name, ".lock") && strings.HasPrefix(name, ".git/")
}

// A clone tells whether `git clone` has brought the files yet. Before that it
// may wait for the other side for longer than any folder needs to stand still.
type clone struct{ begun, checkedOut bool }

func (c *clone) see(name string, d fs.DirEntry) {
	switch {
	case name == ".git" && d.IsDir():
		c.begun = true
	case name == ".git/index", !strings.Contains(name, "/") && name != ".git":
		c.checkedOut = true
	}
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

// ownerOf returns the user to whom a file belongs.
func ownerOf(info fs.FileInfo) int {
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		return int(sys.Uid)
	}
	return -1
}

// moved reports whether s is t after a rename, which changes ctime.
func (s stamp) moved(t stamp) bool {
	s.ctime = t.ctime
	return s == t
}

// ignored reports whether a name is no drop: hidden, ours, one that editors
// and downloads give to what isn't finished, or one that systems leave behind.
func ignored(name string) bool {
	if strings.HasPrefix(name, ".") || name == rejectedDir || name == "4913" {
		return true // 4913 is Vim's, to see whether it can write there
	}
	if strings.HasPrefix(name, "#") && strings.HasSuffix(name, "#") || strings.HasPrefix(name, "~$") {
		return true
	}
	lower := strings.ToLower(name)
	switch lower {
	case "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information", "@eadir", "#recycle", "icon\r":
		return true
	}
	for _, end := range []string{"~", ".swp", ".swx", ".swo", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".filepart"} {
		if strings.HasSuffix(lower, end) {
			return true
		}
	}
	return false
}

// same reports whether s is t but for ctimes: whoever owns or may read what is
// in it, the content is that.
func (s stamp) same(t stamp) bool {
	s.ctime, s.tree = t.ctime, t.tree
	return s == t
}

// removed reports that a folder is in no other any more: only who has it open
// or mounted still sees it.
func removed(info fs.FileInfo) bool {
	sys, ok := info.Sys().(*syscall.Stat_t)
	return ok && sys.Nlink == 0
}
