package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestMoveNew(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	for _, path := range []string{a, b} {
		if err := os.WriteFile(path, []byte(path), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := MoveNew(a, b); !errors.Is(err, fs.ErrExist) {
		t.Fatalf("MoveNew over a file = %v, want ErrExist", err)
	}
	if got, err := os.ReadFile(b); err != nil || string(got) != b {
		t.Fatalf("b holds %q, %v", got, err)
	}
	if err := MoveNew(a, filepath.Join(dir, "c")); err != nil {
		t.Fatal(err)
	}
	if err := MoveNew(a, filepath.Join(dir, "d")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("MoveNew of nothing = %v, want ErrNotExist", err)
	}
}

func TestMkdirAllHasExactlyThePermissions(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	dir := filepath.Join(t.TempDir(), "x", "y")
	for range 2 {
		if err := MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{dir, filepath.Dir(dir)} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != 0o755 {
			t.Errorf("%s has mode %o", path, got)
		}
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, filepath.Join(file, "below")} {
		if err := MkdirAll(path, 0o755); err == nil {
			t.Errorf("MkdirAll(%s) took a file for a folder", path)
		}
	}
}

func TestNoRoomSaysFigures(t *testing.T) {
	err := &NoRoom{Path: "/output", Need: 2_500_000_000, Free: 300_000_000}
	want := "no room in /output: 2.5 GB are needed, 300.0 MB are free, 2.2 GB are missing"
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	if !Full(err) {
		t.Error("NoRoom is not Full")
	}
}

func TestFree(t *testing.T) {
	if n, err := Free(t.TempDir()); err != nil || n <= 0 {
		t.Errorf("Free = %d, %v", n, err)
	}
	if _, err := Free(filepath.Join(t.TempDir(), "absent")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Free of nothing = %v", err)
	}
}
