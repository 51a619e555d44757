package main

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// image lays out a store as an image of the given version has it, and packs it.
func image(t *testing.T, version string) bundle {
	t.Helper()
	nix := t.TempDir()
	tool := "store/hash-tool-" + version
	for _, dir := range []string{tool + "/bin", "store/hash-lib", "store/.links", "var/nix/profiles/per-user/root"} {
		if err := os.MkdirAll(filepath.Join(nix, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for file, text := range map[string]string{
		tool + "/bin/tool": "tool " + version, "store/hash-lib/lib.so": "lib", "store/hash-file": "a file alone", "store/.links/x": "nix's own",
	} {
		if err := os.WriteFile(filepath.Join(nix, file), []byte(text), 0o555); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"store/hash-lib/link":             "lib.so",
		"var/nix/profiles/default-1-link": "/nix/" + tool,
		"var/nix/profiles/default":        "/nix/var/nix/profiles/default-1-link",
	} {
		if err := os.Symlink(target, filepath.Join(nix, link)); err != nil {
			t.Fatal(err)
		}
	}
	for _, dir := range []string{tool + "/bin", tool, "store/hash-lib"} {
		if err := os.Chmod(filepath.Join(nix, dir), 0o555); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = removeAll(nix) }) // folders of a store deny writing
	b := bundle{folder: t.TempDir(), nix: nix, dump: func(_ context.Context, file string) error {
		return os.WriteFile(file, []byte("registered "+version), 0o444)
	}}
	if err := b.pack(t.Context()); err != nil {
		t.Fatal(err)
	}
	return b
}

// into returns the bundle for another /nix, and what was registered there.
func (b bundle) into(t *testing.T, nix string) (bundle, *[]string) {
	t.Helper()
	t.Cleanup(func() { _ = removeAll(nix) })
	said := &[]string{}
	b.nix = nix
	b.register = func(_ context.Context, file string) error {
		text, err := os.ReadFile(file)
		*said = append(*said, string(text))
		return err
	}
	return b, said
}

// contents are a tree's entries: mode, and the text or target.
func contents(t *testing.T, root string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, info := strings.TrimPrefix(path, root), must(d.Info())
		switch {
		case d.Type() == fs.ModeSymlink:
			all[name] = "-> " + strings.ReplaceAll(must(os.Readlink(path)), root, "/nix")
		case d.IsDir():
			all[name] = info.Mode().String()
		default:
			all[name] = info.Mode().String() + " " + string(must(os.ReadFile(path)))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	delete(all, "")
	return all
}

func must[T any](value T, err error) T {
	if err != nil {
		panic(err)
	}
	return value
}

// An empty volume gets all that the image has, Nix's own folders aside.
func TestEmptyVolume(t *testing.T) {
	b := image(t, "1")
	want := contents(t, b.nix)
	for name := range want {
		if strings.HasPrefix(name, "/store/.links") || name == "/var/nix/profiles/per-user/root" {
			delete(want, name)
		}
	}
	volume, said := b.into(t, t.TempDir())
	if filled, err := volume.fill(t.Context()); err != nil || !filled {
		t.Fatal(filled, err)
	}
	got := contents(t, volume.nix)
	delete(got, "/var/nix/profiles/per-user/root")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"registered 1"}, *said); diff != "" {
		t.Error(diff)
	}
}

// Docker has filled the volume from the image: there is nothing to do.
func TestVolumeOfThisImage(t *testing.T) {
	b := image(t, "1")
	before := contents(t, b.nix)
	same, said := b.into(t, b.nix)
	if filled, err := same.fill(t.Context()); err != nil || filled || len(*said) > 0 {
		t.Fatal(filled, err, *said)
	}
	if diff := cmp.Diff(before, contents(t, b.nix)); diff != "" {
		t.Error(diff)
	}
}

// After an upgrade the new image's paths are there, whole, and what had been
// downloaded stays.
func TestVolumeOfAnotherImage(t *testing.T) {
	old, next := image(t, "1"), image(t, "2")
	downloaded := filepath.Join(old.nix, "store", "hash-downloaded")
	half := filepath.Join(old.nix, "store", "hash-tool-2")
	for file, text := range map[string]string{downloaded: "kept", half + "/bin/tool": "half"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o444)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(half, 0o555); err != nil {
		t.Fatal(err)
	}
	volume, said := next.into(t, old.nix)
	if filled, err := volume.fill(t.Context()); err != nil || !filled {
		t.Fatal(filled, err)
	}
	got := contents(t, volume.nix)
	for name, want := range map[string]string{
		"/store/hash-tool-1/bin/tool":                      "-r-xr-xr-x tool 1",
		"/store/hash-tool-2/bin/tool":                      "-r-xr-xr-x tool 2",
		"/store/hash-tool-2":                               "dr-xr-xr-x",
		"/store/hash-downloaded":                           "-r--r--r-- kept",
		"/var/nix/profiles/default-1-link":                 "-> /nix/store/hash-tool-2",
		"/var/nix/gcroots/osbuilder-image/hash-tool-2":     "-> /nix/store/hash-tool-2",
		"/var/nix/gcroots/osbuilder-image/hash-tool-1":     "",
		"/var/nix/gcroots/osbuilder-image/hash-downloaded": "",
		"/osbuilder/unpack":                                "",
	} {
		if got[name] != want {
			t.Errorf("%s: %q, want %q", name, got[name], want)
		}
	}
	if diff := cmp.Diff([]string{"registered 2"}, *said); diff != "" {
		t.Error(diff)
	}
	if filled, err := volume.fill(t.Context()); err != nil || filled {
		t.Error("the second time:", filled, err)
	}
}

// What fails half-way is done again, whatever lies there by then.
func TestInterruptedFill(t *testing.T) {
	b := image(t, "1")
	volume, said := b.into(t, t.TempDir())
	register := volume.register
	broken := errors.New("killed")
	volume.register = func(context.Context, string) error { return broken }
	if _, err := volume.fill(t.Context()); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Join(volume.nix, "osbuilder", "unpack", "hash-lib", "x"), 0o555); err != nil {
		t.Fatal(err)
	}
	volume.register = register
	if filled, err := volume.fill(t.Context()); err != nil || !filled || len(*said) != 1 {
		t.Fatal(filled, err, *said)
	}
	if got := contents(t, volume.nix)["/store/hash-lib/lib.so"]; got != "-r-xr-xr-x lib" {
		t.Error(got)
	}
}
