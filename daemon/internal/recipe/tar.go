package recipe

import (
	"archive/tar"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"time"
)

// writeTar writes a tree as a tar archive that depends on the tree's names,
// contents, links and executable bits alone: sorted, of no user and no time.
// rename says what a name is called in the archive.
func writeTar(w io.Writer, tree *os.Root, from string, rename func(string) string) error {
	t := tar.NewWriter(w)
	err := fs.WalkDir(tree.FS(), from, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: rename(name), ModTime: time.Unix(0, 0), Mode: 0o644}
		switch mode := info.Mode(); {
		case h.Name == ".":
			return nil
		case mode.IsDir():
			h.Typeflag, h.Mode = tar.TypeDir, 0o755
			h.Name += "/"
			return t.WriteHeader(h)
		case mode&fs.ModeSymlink != 0:
			h.Typeflag, h.Mode = tar.TypeSymlink, 0o777
			if h.Linkname, err = tree.Readlink(name); err != nil {
				return err
			}
			return t.WriteHeader(h)
		case mode.IsRegular():
			h.Typeflag, h.Size = tar.TypeReg, info.Size()
			if mode&0o100 != 0 {
				h.Mode = 0o755
			}
			if err := t.WriteHeader(h); err != nil {
				return err
			}
			return copyFile(t, tree, name)
		default:
			return fmt.Errorf("%s is neither a file, nor a folder, nor a link", name)
		}
	})
	if err != nil {
		return err
	}
	return t.Close()
}

func copyFile(w io.Writer, tree *os.Root, name string) error {
	f, err := tree.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}

// below names what lies in the folder from by its path there.
func below(from string) func(string) string {
	return func(name string) string {
		if name == from {
			return "."
		}
		return path.Clean(name[len(from)+1:])
	}
}
