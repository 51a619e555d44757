package main

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// A bundle is an image's part of the store, packed into a folder of the image:
// store.tar.gz, registration (what nix-store --dump-db says) and id, the
// digest of both.
type bundle struct {
	folder, nix    string
	dump, register func(ctx context.Context, file string) error
}

// The places below /nix that a bundle holds, and where it notes which one the
// volume was filled from.
const (
	storeDir    = "store"
	profilesDir = "var/nix/profiles"
	rootsDir    = "var/nix/gcroots/osbuilder-image" // the image's paths are never collected
	marker      = "osbuilder/image"
)

func (b bundle) file(name string) string { return filepath.Join(b.folder, name) }
func (b bundle) at(name string) string   { return filepath.Join(b.nix, name) }

// pack writes the bundle, and marks the image's own store as filled from it.
func (b bundle) pack(ctx context.Context) error {
	if err := os.MkdirAll(b.folder, 0o755); err != nil {
		return err
	}
	if err := b.dump(ctx, b.file("registration")); err != nil {
		return err
	}
	if err := b.packStore(); err != nil {
		return err
	}
	sum := sha256.New()
	for _, name := range []string{"store.tar.gz", "registration"} {
		in, err := os.Open(b.file(name))
		if err != nil {
			return err
		}
		_, err = io.Copy(sum, in)
		if err = errors.Join(err, in.Close()); err != nil {
			return err
		}
	}
	id := hex.EncodeToString(sum.Sum(nil))
	if err := os.WriteFile(b.file("id"), []byte(id), 0o444); err != nil {
		return err
	}
	names, err := storeNames(b.at(storeDir))
	if err != nil {
		return err
	}
	if err := b.root(names); err != nil {
		return err
	}
	return b.mark(id)
}

func (b bundle) packStore() (err error) {
	out, err := os.Create(b.file("store.tar.gz"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	packed, err := gzip.NewWriterLevel(out, gzip.BestSpeed)
	if err != nil {
		return err
	}
	w := tar.NewWriter(packed)
	names, err := storeNames(b.at(storeDir))
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := b.add(w, path.Join(storeDir, name)); err != nil {
			return err
		}
	}
	if _, err := os.Stat(b.at(profilesDir)); err == nil {
		if err := b.add(w, profilesDir); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), packed.Close())
}

// storeNames are the store paths; what begins with a dot is Nix's own.
func storeNames(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range entries {
		if name := e.Name(); !strings.HasPrefix(name, ".") && !strings.HasSuffix(name, ".lock") {
			names = append(names, name)
		}
	}
	return names, err
}

// add packs a tree below /nix.
func (b bundle) add(w *tar.Writer, tree string) error {
	return filepath.WalkDir(b.at(tree), func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(b.nix, file)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		target := ""
		if info.Mode().Type() == fs.ModeSymlink {
			if target, err = os.Readlink(file); err != nil {
				return err
			}
		}
		header, err := tar.FileInfoHeader(info, target)
		if err != nil {
			return err
		}
		header.Name, header.Uid, header.Gid, header.Uname, header.Gname = name, 0, 0, "", ""
		if err := w.WriteHeader(header); err != nil || !info.Mode().IsRegular() {
			return err
		}
		in, err := os.Open(file)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(w, in)
		return err
	})
}

// fill brings the store up to the bundle, unless it was filled from this one.
// Interrupted anywhere, the next one does it again: the mark comes last. Each
// store path replaces what has its name, since half a path, left by a download
// that was interrupted, looks like a whole one.
func (b bundle) fill(ctx context.Context) (bool, error) {
	id, err := os.ReadFile(b.file("id"))
	if err != nil {
		return false, err
	}
	if have, err := os.ReadFile(b.at(marker)); err == nil && string(have) == string(id) {
		return false, nil
	}
	names, err := b.unpack()
	if err != nil {
		return false, err
	}
	if err := b.root(names); err != nil {
		return false, err
	}
	if err := b.register(ctx, b.file("registration")); err != nil {
		return false, err
	}
	// The mark must not outlive what it speaks of when the power fails.
	syscall.Sync()
	return true, b.mark(string(id))
}

// unpack writes the bundle's files and returns the names of its store paths.
// Profiles are links into the store and come last in the bundle, so that they
// never lead nowhere.
func (b bundle) unpack() ([]string, error) {
	in, err := os.Open(b.file("store.tar.gz"))
	if err != nil {
		return nil, err
	}
	defer in.Close()
	unzipped, err := gzip.NewReader(bufio.NewReader(in))
	if err != nil {
		return nil, err
	}
	work := b.at("osbuilder/unpack")
	if err := removeAll(work); err != nil {
		return nil, err
	}
	for _, dir := range []string{work, b.at(storeDir), b.at(profilesDir)} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	u := unpacker{bundle: b, work: work}
	for r := tar.NewReader(unzipped); ; {
		header, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = u.entry(header, r)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := u.finish(); err != nil {
		return nil, err
	}
	return u.names, removeAll(work)
}

// An unpacker builds one store path after the other in a folder of its own and
// moves it into place when it is whole.
type unpacker struct {
	bundle
	work  string
	name  string   // of the store path in the making
	dirs  []string // of it, whose modes are set when they are full
	modes []fs.FileMode
	names []string
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	if !filepath.IsLocal(h.Name) {
		return fmt.Errorf("the bundle names %q", h.Name)
	}
	if rest, ok := strings.CutPrefix(h.Name, storeDir+"/"); ok {
		name, _, _ := strings.Cut(rest, "/")
		if name != u.name {
			if err := u.finish(); err != nil {
				return err
			}
			u.name = name
		}
		return u.write(filepath.Join(u.work, rest), h, r)
	}
	if err := u.finish(); err != nil {
		return err
	}
	file := u.at(h.Name)
	if h.Typeflag == tar.TypeDir {
		return os.MkdirAll(file, 0o755)
	}
	next := file + ".new"
	if err := errors.Join(removeAll(next), u.write(next, h, r)); err != nil {
		return err
	}
	return os.Rename(next, file)
}

func (u *unpacker) write(file string, h *tar.Header, r io.Reader) error {
	mode := h.FileInfo().Mode()
	switch h.Typeflag {
	case tar.TypeDir:
		u.dirs, u.modes = append(u.dirs, file), append(u.modes, mode.Perm())
		return os.Mkdir(file, 0o755)
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, file)
	case tar.TypeReg:
		out, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, r)
		if err = errors.Join(err, out.Chmod(mode.Perm()), out.Close()); err != nil {
			return err
		}
		return os.Chtimes(file, h.ModTime, h.ModTime)
	}
	return fmt.Errorf("%s is of the kind %c, which no store has", h.Name, h.Typeflag)
}

// finish moves the store path in the making into its place.
func (u *unpacker) finish() error {
	if u.name == "" {
		return nil
	}
	whole, place := filepath.Join(u.work, u.name), u.at(path.Join(storeDir, u.name))
	old := filepath.Join(u.work, ".old")
	if info, err := os.Lstat(place); err == nil && info.IsDir() {
		if err := os.Chmod(place, 0o755); err != nil {
			return err
		}
	}
	if err := os.Rename(place, old); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Rename(whole, place); err != nil {
		return err
	}
	// Not before: a folder without leave to write can't be moved by one who is not root.
	for i, dir := range slices.Backward(u.dirs) {
		rel, err := filepath.Rel(whole, dir)
		if err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(place, rel), u.modes[i]); err != nil {
			return err
		}
	}
	u.names = append(u.names, u.name)
	u.name, u.dirs, u.modes = "", nil, nil
	return removeAll(old)
}

// root makes exactly these store paths roots of the collection.
func (b bundle) root(names []string) error {
	dir := b.at(rootsDir)
	if err := errors.Join(removeAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Symlink(b.at(path.Join(storeDir, name)), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return nil
}

func (b bundle) mark(id string) error {
	file := b.at(marker)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(file+".new", []byte(id), 0o444); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}

// removeAll removes a tree whose folders may deny writing, as the store's do.
func removeAll(tree string) error {
	err := filepath.WalkDir(tree, func(file string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			err = os.Chmod(file, 0o700)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.RemoveAll(tree)
}
