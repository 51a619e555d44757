// Package vmimage holds the images of the builder VM. Its test is of the
// shell that both flavours share.
package vmimage

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// A storage is a folder that stands for the VM's.
type storage struct {
	dir, shims string
}

// newStorage makes one, in which killed, if it is not 0, says at which of the
// commands that change something the shell dies; a half one, if it is cp.
func newStorage(t *testing.T) storage {
	t.Helper()
	s := storage{dir: t.TempDir(), shims: t.TempDir()}
	for _, name := range []string{"cp", "mv", "sync", "sha256sum", "rm"} {
		program, err := exec.LookPath(name)
		if err != nil {
			t.Fatal(err)
		}
		half, held := "", ""
		if name == "cp" {
			half = `head -c 1000 "$1" >"$2"; `
			held = `if [ -n "${HELD:-}" ]; then ` + half + `echo held >&3; read -r _ <&4; fi
if [ -n "${SPOILT:-}" ]; then ` + half + `exit 0; fi
`
		}
		script := fmt.Sprintf(`#!/bin/sh
n=$(($(cat "$COUNT") + 1))
echo $n >"$COUNT"
if [ $n = "$KILLED" ]; then %skill -9 0; fi
%sexec %s "$@"
`, half, held, program)
		if err := os.WriteFile(filepath.Join(s.shims, name), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// run puts a file into the storage, unless it is there, and returns what was
// said. The shell dies at the command with the number killed; 0: at none.
func (s storage) run(ctx context.Context, t *testing.T, key, file string, killed int) (string, error) {
	t.Helper()
	count := filepath.Join(s.shims, "count")
	if err := os.WriteFile(count, []byte("0"), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := s.command(ctx, key, file, fmt.Sprint("KILLED=", killed))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// command is the shell that puts a file into the storage, unless it is there.
func (s storage) command(ctx context.Context, key, file string, env ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-uc", `
		. ./install-image.sh
		need_storage
		if put_given; then exit 0; fi
		if image_is "$1"; then say "up to date $sum"; exit 0; fi
		put_image "$1" "$2"`, "sh", key, file)
	cmd.Env = append([]string{
		"PATH=" + s.shims + ":/usr/local/bin:/usr/bin:/bin", "STORAGE=" + s.dir, "GIVEN_ISO=" + filepath.Join(s.shims, "given"),
		"COUNT=" + filepath.Join(s.shims, "count"),
	}, env...)
	return cmd
}

func (s storage) image(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir, "boot.iso"))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t *testing.T, file string, data []byte) string {
	t.Helper()
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	return file
}

// Whichever command it dies at, what boots is the old image or the new one, in
// full, and the next run brings the new one.
func TestImageIsWholeAtAnyMoment(t *testing.T) {
	dir := t.TempDir()
	old, next := bytes.Repeat([]byte("old "), 5000), bytes.Repeat([]byte("new"), 7000)
	oldFile, nextFile := write(t, filepath.Join(dir, "old"), old), write(t, filepath.Join(dir, "next"), next)
	died := 0
	for killed := 1; ; killed++ {
		s := newStorage(t)
		if out, err := s.run(t.Context(), t, "key 1", oldFile, 0); err != nil || !strings.Contains(out, "was put into its storage") {
			t.Fatal(err, out)
		}
		out, err := s.run(t.Context(), t, "key 2", nextFile, killed)
		if got := s.image(t); !bytes.Equal(got, old) && !bytes.Equal(got, next) {
			t.Fatalf("killed at command %d: there are %d bytes of neither; it said: %s", killed, len(got), out)
		}
		if err == nil {
			if !strings.Contains(out, "was replaced") || !strings.Contains(out, "docker compose restart vm") {
				t.Errorf("it said: %s", out)
			}
			break
		}
		died++
		if out, err := s.run(t.Context(), t, "key 2", nextFile, 0); err != nil || !bytes.Equal(s.image(t), next) {
			t.Fatalf("after it was killed at command %d: %v: %s", killed, err, out)
		}
		if out, err := s.run(t.Context(), t, "key 2", nextFile, 0); err != nil || !strings.Contains(out, "up to date") {
			t.Errorf("killed at command %d, and again: %v: %s", killed, err, out)
		}
		entries, err := os.ReadDir(s.dir)
		if err != nil || len(entries) != 2 {
			t.Errorf("killed at command %d: left %v, %v", killed, entries, err)
		}
	}
	if died < 6 {
		t.Errorf("it died at %d commands only", died)
	}
}

// Two at once: one is half-way in writing when the other comes. With a lock
// that one waits; without one what boots is still one of the two in full, and
// the note is of it or counts for nothing.
func TestTwoAtOnce(t *testing.T) {
	for _, locked := range []bool{true, false} {
		t.Run(fmt.Sprint("locked=", locked), func(t *testing.T) {
			dir := t.TempDir()
			s := newStorage(t)
			write(t, filepath.Join(s.shims, "count"), []byte("0"))
			if !locked {
				if err := os.WriteFile(filepath.Join(s.shims, "flock"), []byte("#!/bin/sh\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			one, two := bytes.Repeat([]byte("one "), 5000), bytes.Repeat([]byte("two"), 7000)
			held, atHeld := pipe(t)
			goOn, release := pipe(t)
			first := s.command(t.Context(), "key 1", write(t, filepath.Join(dir, "one"), one), "HELD=yes", "KILLED=0")
			first.ExtraFiles = []*os.File{atHeld, goOn}
			var said bytes.Buffer
			first.Stdout, first.Stderr = &said, &said
			if err := errors.Join(first.Start(), atHeld.Close()); err != nil {
				t.Fatal(err)
			}
			if line, err := bufio.NewReader(held).ReadString('\n'); err != nil {
				t.Fatal(err, line, said.String())
			}
			second := s.command(t.Context(), "key 2", write(t, filepath.Join(dir, "two"), two), "KILLED=0")
			out, err := second.StdoutPipe()
			if err := errors.Join(err, second.Start()); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			line, err := lines.ReadString('\n')
			if waits := strings.Contains(line, "waiting for another one"); err != nil || waits != locked {
				t.Error(err, line)
			}
			if !locked {
				if err := second.Wait(); err != nil {
					t.Error(err)
				}
			}
			if err := errors.Join(release.Close(), first.Wait()); err != nil {
				t.Error(err, said.String())
			}
			want, key := one, "key 1"
			if locked {
				rest, err := io.ReadAll(lines)
				if err := errors.Join(err, second.Wait()); err != nil {
					t.Error(err, string(rest))
				}
				want, key = two, "key 2"
			}
			if !bytes.Equal(s.image(t), want) {
				t.Errorf("there are %d bytes, not the last one's %d", len(s.image(t)), len(want))
			}
			if out, err := s.run(t.Context(), t, key, filepath.Join(dir, "one"), 0); err != nil || !strings.Contains(out, "up to date") {
				t.Errorf("%v: %s", err, out)
			}
			if entries, err := os.ReadDir(s.dir); err != nil || len(entries) != 2 {
				t.Error("left", entries, err)
			}
		})
	}
}

func pipe(t *testing.T) (r, w *os.File) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = r.Close(), w.Close() })
	return r, w
}

// A copy that is not what was copied never takes the image's place.
func TestSpoiltCopy(t *testing.T) {
	dir := t.TempDir()
	s := newStorage(t)
	if out, err := s.run(t.Context(), t, "key 1", write(t, filepath.Join(dir, "old"), []byte("old")), 0); err != nil {
		t.Fatal(err, out)
	}
	next := write(t, filepath.Join(dir, "next"), bytes.Repeat([]byte("new"), 7000))
	out, err := s.command(t.Context(), "key 2", next, "KILLED=0", "SPOILT=yes").CombinedOutput()
	if err == nil || !strings.Contains(string(out), "is not what was read") || string(s.image(t)) != "old" {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := s.run(t.Context(), t, "key 1", next, 0); err != nil || !strings.Contains(out, "up to date") {
		t.Errorf("%v: %s", err, out)
	}
}

// A note counts for the file that it was written for, and no other.
func TestNoteOfAnotherFile(t *testing.T) {
	dir := t.TempDir()
	s := newStorage(t)
	file := write(t, filepath.Join(dir, "iso"), []byte("an image"))
	if out, err := s.run(t.Context(), t, "key", file, 0); err != nil {
		t.Fatal(err, out)
	}
	write(t, filepath.Join(s.dir, "boot.iso"), []byte("somebody's own"))
	if out, err := s.run(t.Context(), t, "key", file, 0); err != nil || !strings.Contains(out, "was replaced") {
		t.Errorf("%v: %s", err, out)
	}
	if got := s.image(t); string(got) != "an image" {
		t.Errorf("%q", got)
	}
}

// What BOOT_ISO names and is no ISO is refused, not passed over. Only its
// default, /dev/null, says that there is none.
func TestGivenNoImage(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "iso"), []byte("an image"))
	folder, fifo := filepath.Join(dir, "folder"), filepath.Join(dir, "fifo")
	if err := errors.Join(os.Mkdir(folder, 0o755), syscall.Mkfifo(fifo, 0o644)); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct{ given, says string }{
		"a folder":      {folder, "BOOT_ISO names a folder: name the ISO in it"},
		"an empty file": {write(t, filepath.Join(dir, "empty"), nil), "BOOT_ISO names no file, or an empty one"},
		"no file":       {fifo, "BOOT_ISO names no file, or an empty one"},
		"a text":        {write(t, filepath.Join(dir, "text"), []byte("no image")), "BOOT_ISO names a file that is no ISO image"},
		"none":          {os.DevNull, ""},
		"not mounted":   {filepath.Join(dir, "absent"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStorage(t)
			write(t, filepath.Join(s.shims, "count"), []byte("0"))
			out, err := s.command(t.Context(), "key", file, "KILLED=0", "GIVEN_ISO="+tt.given).CombinedOutput()
			if _, put := os.Stat(filepath.Join(s.dir, "boot.iso")); (err == nil) != (tt.says == "") || (put == nil) != (tt.says == "") || !strings.Contains(string(out), tt.says) {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}

// An image that the user gives goes before any other.
func TestGivenImage(t *testing.T) {
	dir := t.TempDir()
	s := newStorage(t)
	file := write(t, filepath.Join(dir, "iso"), []byte("an image"))
	given := filepath.Join(s.shims, "given")
	iso := append(make([]byte, 32769), "CD001 given"...)
	write(t, given, iso)
	for _, want := range []string{"is taken; none is made", "is in place"} {
		if out, err := s.run(t.Context(), t, "key", file, 0); err != nil || !strings.Contains(out, want) || !bytes.Equal(s.image(t), iso) {
			t.Errorf("%v: %s", err, out)
		}
	}
	if err := os.Remove(given); err != nil {
		t.Fatal(err)
	}
	if out, err := s.run(t.Context(), t, "key", file, 0); err != nil || string(s.image(t)) != "an image" {
		t.Errorf("%v: %s", err, out)
	}
}
