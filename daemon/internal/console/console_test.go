package console

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/hint"
)

func TestNothingIsKnown(t *testing.T) {
	empty := t.TempDir()
	for name, c := range map[string]Console{
		"no value": {}, "no folder": Folder("").Of("vm"), "an empty folder": Folder(empty).Of("vm"), "none": Folder(empty + "/none").Of("vm"),
	} {
		if err := c.Trouble(false); err != nil || c.Trouble(true) != nil || len(c.Tail()) > 0 {
			t.Errorf("%s: %v, %q", name, err, c.Tail())
		}
	}
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Without a container of the VM what one left behind counts for nothing: the
// next one waits for its image.
func TestWhatAContainerLeftBehind(t *testing.T) {
	dir := t.TempDir()
	c := Folder(dir).Of("vm")
	put(t, dir+"/vm/state", "paused the host has 3 MiB free\n")
	put(t, dir+"/image", "making step 4 of 5: fetching\n")
	if err := c.Trouble(false); !errors.Is(err, ErrPaused) {
		t.Error(err)
	}
	if err := c.Trouble(true); !errors.Is(err, ErrNoImage) || !strings.Contains(err.Error(), "it is being made, step 4 of 5") {
		t.Error(err)
	}
	put(t, dir+"/image", "ready 0123\n")
	if err := c.Trouble(true); err != nil {
		t.Error(err)
	}
	// A container that ends again and again is there, and is gone, and is there:
	// one and the same is told.
	for word, want := range map[string]error{"ended": ErrEnded, "image": ErrNoImage, "unusable": ErrUnusable} {
		put(t, dir+"/vm/state", word+" why\n")
		for _, gone := range []bool{false, true} {
			if err := c.Trouble(gone); !errors.Is(err, want) {
				t.Errorf("%s, gone %t: %v", word, gone, err)
			}
		}
	}
	put(t, dir+"/vm/state", "off\n")
	for _, gone := range []bool{false, true} {
		if err := c.Trouble(gone); err != nil {
			t.Errorf("off, gone %t: %v", gone, err)
		}
	}
	// What ended had an image to begin with: that the last try to make one failed is not why.
	put(t, dir+"/image", "failed no network\n")
	for word, want := range map[string]error{"ended": ErrEnded, "unusable": ErrUnusable, "off": ErrNoImage, "image": ErrNoImage} {
		put(t, dir+"/vm/state", word+" why\n")
		if err := c.Trouble(true); !errors.Is(err, want) {
			t.Errorf("%s, and the image failed: %v", word, err)
		}
	}
	put(t, dir+"/vm/state", "ended why\n")
	put(t, dir+"/image", "making step 4 of 5: fetching\n")
	if err := c.Trouble(true); !errors.Is(err, ErrNoImage) {
		t.Errorf("ended, and an image is being made: %v", err)
	}
	// A VM that runs needs no image, whatever becomes of the next one.
	put(t, dir+"/vm/state", "running\n")
	put(t, dir+"/image", "failed no network\n")
	if err := c.Trouble(false); err != nil {
		t.Error(err)
	}
}

func TestEachTroubleHasAHint(t *testing.T) {
	for _, what := range []error{ErrNoImage, ErrUnusable, ErrPaused, ErrEnded, ErrNoAddress} {
		err := Folder("x").Of("vm2").trouble(what, "words")
		if len(hint.Of(err)) != 1 || hint.Of(err)[0] == "" || strings.Contains(hint.Of(err)[0], "$VM") || !errors.Is(err, what) {
			t.Errorf("%v: hints %q", err, hint.Of(err))
		}
	}
}

// Whatever lies there, reading it ends, and what comes of it is bounded and
// does nothing to a terminal.
func TestWhoWritesThereIsNotTrusted(t *testing.T) {
	dir := t.TempDir()
	c := Folder(dir).Of("vm")
	secret := filepath.Join(t.TempDir(), "secret")
	put(t, secret, "running\na secret\n")
	if err := os.Mkdir(dir+"/vm", 0o755); err != nil {
		t.Fatal(err)
	}
	for name, harm := range map[string]func(path string) error{
		"a pipe that nobody writes to": func(path string) error { return syscall.Mkfifo(path, 0o644) },
		"a folder":                     func(path string) error { return os.Mkdir(path, 0o755) },
		"a link":                       func(path string) error { return os.Symlink(secret, path) },
	} {
		for _, file := range []string{"image", "vm/state", "vm/console"} {
			path := filepath.Join(dir, file)
			if err := harm(path); err != nil {
				t.Fatal(err)
			}
			if err := c.Trouble(false); err != nil || len(c.Tail()) > 0 {
				t.Errorf("%s in the place of %s: %v, %q", name, file, err, c.Tail())
			}
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(t, dir+"/vm/state", "ended \x1b]0;title\a\x1b[31m"+strings.Repeat("x", 1<<20))
	put(t, dir+"/vm/console", strings.Repeat("y", 1<<20)+"\n"+strings.Repeat(strings.Repeat("z", 999)+"\x1b[1A\n", 1000))
	if text := c.Trouble(false).Error(); len(text) > 2000 || strings.ContainsAny(text, "\x1b\a") {
		t.Errorf("%d bytes: %.100q", len(text), text)
	}
	lines := c.Tail()
	if len(lines) != maxLines {
		t.Errorf("%d lines", len(lines))
	}
	if diff := cmp.Diff(strings.Repeat("z", maxLine)+"…", lines[0]); diff != "" {
		t.Errorf("a line (-want +got):\n%s", diff)
	}
}

// The console is still written to while it is read.
func TestTail(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                     {},
		"\r\n\r\n":                             {},
		"one\r\ntwo\r\nthr":                    {"one", "two", "thr"},
		"10%\r20%\r\n":                         {"20%"},
		"\x1b[?25h\x1b[0;1;31mFailed\x1b[0m\n": {"Failed"},
		"\xff\xfe\n":                           {`\xff\xfe`},
	} {
		dir := t.TempDir()
		put(t, dir+"/vm/console", text)
		got := Folder(dir).Of("vm").Tail()
		if diff := cmp.Diff(want, append([]string{}, got...)); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
	}
}
