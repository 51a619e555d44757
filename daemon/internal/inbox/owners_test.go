package inbox

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/internal/testenv"
)

// What a drop's owner and rights keep the daemon from, as the user that the
// daemon is and not as root, who may do everything.

const daemon = 4321

func chown(t *testing.T, path string, uid int) {
	t.Helper()
	if err := filepath.Walk(path, func(name string, _ fs.FileInfo, err error) error {
		return errors.Join(err, os.Lchown(name, uid, uid))
	}); err != nil {
		t.Fatal(err)
	}
}

// own gives the jobs folder alone to a user.
func (f *fixture) own(uid int) {
	f.t.Helper()
	if err := os.Chown(f.cfg.Dir, uid, uid); err != nil {
		f.t.Fatal(err)
	}
}

func TestUnreadableDrops(t *testing.T) {
	for name, tc := range map[string]struct {
		drop, path string // the path that can't be read
	}{
		"file":             {"a b.sh", "a b.sh"},
		"folder":           {"machine", "machine"},
		"folder in it":     {"machine", "machine/deep"},
		"file in a folder": {"machine", "machine/deep/disk.nix"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.asUser(daemon)
				if tc.drop == "machine" {
					f.plant("machine", machine)
				} else {
					f.write(tc.drop, "echo a\n")
				}
				chown(t, filepath.Join(f.cfg.Dir, tc.drop), daemon)
				path := filepath.Join(f.cfg.Dir, tc.path)
				if err := errors.Join(os.Lchown(path, 0, 0), os.Chmod(path, 0)); err != nil {
					t.Fatal(err)
				}
				defer f.start()()
				pass(2 * time.Minute)
				f.wantInFolder(tc.drop)
				lines := f.lines("drop waits")
				if len(lines) != 1 {
					t.Fatalf("log: %v", f.logs.All())
				}
				said := lines[0].ContextMap()
				want := "in the jobs folder: chmod -R a+rX " + map[bool]string{true: "'a b.sh'", false: "machine"}[tc.drop == "a b.sh"]
				if !strings.Contains(fmt.Sprint(said["error"]), "permission denied") || !strings.Contains(fmt.Sprint(said["hint"]), want) {
					t.Errorf("said %v", said)
				}
				// What the hint says, done.
				if err := os.Chmod(path, 0o755); err != nil {
					t.Fatal(err)
				}
				pass(rescan + 6*settle)
				if len(f.records.jobs) != 1 {
					t.Errorf("%d jobs", len(f.records.jobs))
				}
			})
		})
	}
}

// sudo cp -r machine jobs/: it can be read, and so is built, but a folder can
// be moved only by who may write in it.
func TestAFolderOfAnotherUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.asUser(daemon)
		path := f.plant("my machine", machine)
		stop := f.start()
		pass(time.Minute)
		f.wantInFolder("my machine")
		lines := f.lines("drop was taken but can't be moved away")
		if len(lines) != 1 || len(f.records.jobs) != 1 {
			t.Fatalf("%d jobs, log: %v", len(f.records.jobs), f.logs.All())
		}
		if got, want := fmt.Sprint(lines[0].ContextMap()["hint"]), "It belongs to user 0"; !strings.Contains(got, want) || !strings.HasSuffix(got, " 'my machine'") {
			t.Errorf("hint %q, want %q", got, want)
		}
		if left := list(t, filepath.Join(f.cfg.Dir, takenDir)); len(left) > 0 {
			t.Errorf("empty folders were left: %q", left)
		}
		// What the hint says, done, is no change that makes another job.
		chown(t, path, daemon)
		pass(rescan + 6*settle)
		f.wantInFolder()
		stop()
		if len(f.records.jobs) != 1 || len(f.taken) != 1 {
			t.Errorf("%d jobs, %d IDs", len(f.records.jobs), len(f.taken))
		}
		for id := range f.records.jobs {
			if _, err := os.Stat(filepath.Join(f.cfg.Dir, takenDir, string(id), "my machine", "tool")); err != nil {
				t.Error(err)
			}
		}
	})
}

// A file of another user can be moved: it is the folder that counts.
func TestAFileOfAnotherUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.asUser(daemon)
		f.write("a.sh", "echo a\n")
		f.write("x.yml", "{}")
		defer f.start()()
		pass(settle + time.Second)
		f.wantInFolder()
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
	})
}

func TestARejectedFolderOfAnotherUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.asUser(daemon)
		path := f.plant("machine", map[string]string{"host.nix": "{ }\n"})
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("machine")
		lines := f.lines("drop rejected, but it can't be moved away")
		if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["error"]), "it has no configuration.nix") {
			t.Fatalf("log: %v", f.logs.All())
		}
		if hint := fmt.Sprint(lines[0].ContextMap()["hint"]); !strings.Contains(hint, "Rename host.nix") || !strings.Contains(hint, "sudo chown -R") {
			t.Errorf("hint %q", hint)
		}
		if left := list(t, filepath.Join(f.cfg.Dir, rejectedDir)); len(left) > 0 {
			t.Errorf("a message without its drop was left: %q", left)
		}
		chown(t, path, daemon)
		pass(rescan + 6*settle)
		f.wantInFolder()
	})
}

// The jobs folder is another's: what to do is said, and when it is done the
// drop goes.
func TestAJobsFolderOfAnotherUser(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.asUser(daemon)
		f.own(0)
		f.write("a.sh", "echo a\n")
		stop := f.start()
		pass(time.Minute)
		f.wantInFolder("a.sh")
		lines := f.lines("drop was taken but can't be moved away")
		if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["hint"]), "The jobs folder must be writable for PUID:PGID.") {
			t.Fatalf("log: %v", f.logs.All())
		}
		stop()
		f.own(daemon) // `docker compose up` runs init, which does it
		defer f.start()()
		pass(rescan + settle)
		f.wantInFolder()
		if len(f.records.jobs) != 1 {
			t.Errorf("%d jobs", len(f.records.jobs))
		}
	})
}

// mount mounts for the time of a test.
func mount(t *testing.T, source, target, kind string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		testenv.Lacks(t, "nothing can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func TestAReadOnlyMount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.plant("machine", machine)
		f.write("a.sh", "echo a\n")
		f.write("x.yml", "{}")
		mount(t, f.cfg.Dir, f.cfg.Dir, "", unix.MS_BIND, "")
		if err := unix.Mount("", f.cfg.Dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			stop := f.start()
			pass(time.Minute)
			stop()
			f.wantInFolder("a.sh", "machine", "x.yml")
			taken, rejected := f.lines("drop was taken but can't be moved away"), f.lines("drop rejected, but it can't be moved away")
			if len(taken) != 2 || len(rejected) != 1 {
				t.Fatalf("log: %v", f.logs.All())
			}
			for _, line := range append(taken, rejected...) {
				said := line.ContextMap()
				if !strings.Contains(fmt.Sprint(said["error"]), "read-only file system") || !strings.Contains(fmt.Sprint(said["hint"]), "mounts it read-only") {
					t.Errorf("said %v", said)
				}
			}
		}
		if len(f.records.jobs) != 2 {
			t.Errorf("%d jobs", len(f.records.jobs))
		}
	})
}

// The folder was removed on the host, and made anew: the container sees the
// old one, in which nothing ever appears.
func TestAFolderThatIsRemovedUnderItsMount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		onHost := filepath.Join(f.cfg.State, "jobs-on-host")
		if err := os.Mkdir(onHost, 0o755); err != nil {
			t.Fatal(err)
		}
		mount(t, onHost, f.cfg.Dir, "", unix.MS_BIND, "")
		f.write("a.sh", "echo a\n")
		defer f.start()()
		pass(settle + time.Second)
		if len(f.records.jobs) != 1 {
			t.Fatalf("log: %v", f.logs.All())
		}
		if err := errors.Join(os.RemoveAll(onHost), os.Mkdir(onHost, 0o755)); err != nil {
			t.Fatal(err)
		}
		pass(time.Minute)
		lines := f.lines("jobs folder can't be read")
		if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["hint"]), "docker compose up -d --force-recreate init sidecar") {
			t.Errorf("log: %v", f.logs.All())
		}
	})
}
