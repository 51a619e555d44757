package inbox

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"osbuilder/internal/testenv"
)

// When a drop counts as whole.

// wantWaits checks that one line says why a drop waits, and what to do.
func (f *fixture) wantWaits(why, hint string) {
	f.t.Helper()
	lines := f.lines("drop waits")
	if len(lines) != 1 {
		f.t.Fatalf("log: %v", f.logs.All())
	}
	said := lines[0].ContextMap()
	if !strings.Contains(fmt.Sprint(said["error"]), why) || !strings.Contains(fmt.Sprint(said["hint"]), hint) {
		f.t.Errorf("said %v, want %q and %q", said, why, hint)
	}
}

// A download stalls for longer than any file needs to stand still, and goes on.
func TestAFileThatIsOpenForWritingIsWaitedFor(t *testing.T) {
	for _, drop := range []string{"a.sh", "machine/deep/disk.nix"} {
		t.Run(drop, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				if drop != "a.sh" {
					f.plant("machine", machine)
				}
				w, err := os.Create(filepath.Join(f.cfg.Dir, drop))
				if err != nil {
					t.Fatal(err)
				}
				defer w.Close()
				if _, err := w.WriteString("echo half\n"); err != nil {
					t.Fatal(err)
				}
				defer f.start()()
				pass(50 * time.Second)
				if n := len(f.logs.All()); n > 0 || len(f.records.jobs) > 0 {
					t.Fatalf("%d jobs, log: %v", len(f.records.jobs), f.logs.All())
				}
				pass(3 * time.Minute)
				f.wantWaits("a program has it open for writing", "when that program closes it")
				if _, err := w.WriteString("echo whole\n"); err != nil {
					t.Fatal(err)
				}
				pass(time.Minute)
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				pass(rescan + 6*settle)
				f.wantInFolder()
				id := <-f.taken
				copied, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(id), sourceDir, drop))
				if err != nil || string(copied) != "echo half\necho whole\n" {
					t.Errorf("copy is %q, %v", copied, err)
				}
			})
		})
	}
}

func TestADropThatNeverStandsStillIsSpokenOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.write("log.sh", "")
		defer f.start()()
		for range 100 {
			appendTo(f, filepath.Join(f.cfg.Dir, "log.sh"))
			pass(settle / 2)
		}
		f.wantWaits("it changes all the time", "taken when it has stood still")
		pass(rescan + settle)
		f.wantInFolder()
	})
}

func TestAFolderInWhichGitIsAtWork(t *testing.T) {
	for lock, says := range map[string]string{
		".git/index.lock":               "git is at work in it: .git/index.lock is there",
		".git/modules/sub/index.lock":   "git is at work in it: .git/modules/sub/index.lock is there",
		".git/refs/heads/main.lock":     "git is at work in it: .git/refs/heads/main.lock is there",
		".git/objects/pack/tmp_pack_AB": "", // with files beside it, one that was broken off long ago
	} {
		t.Run(lock, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.plant("machine", machine)
				f.write("machine/flake.lock", "{}")
				held := f.write("machine/"+lock, "x")
				defer f.start()()
				pass(10 * time.Minute)
				if says == "" {
					f.wantInFolder()
					return
				}
				f.wantInFolder("machine")
				f.wantWaits(says, "remove that file")
				if err := os.Remove(held); err != nil {
					t.Fatal(err)
				}
				pass(rescan + 6*settle)
				f.wantInFolder()
			})
		})
	}
}

// A clone waits for the other side, for as long as that takes, before it has
// any file; nothing in the folder changes then. It is git's own, not ours.
func TestAGitCloneThatStalls(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		testenv.Lacks(t, "there is no git here")
	}
	f := newListening(t)
	f.cfg.SettleFolder, f.cfg.Rescan = time.Second, 20*time.Millisecond
	source, gate := t.TempDir(), filepath.Join(t.TempDir(), "gate")
	f.git(source, "init", "-q")
	for name, text := range map[string]string{"configuration.nix": "{ imports = [ ./more.nix ]; }\n", "more.nix": "{ }\n"} {
		file(text)(t, filepath.Join(source, name))
	}
	f.git(source, "add", ".")
	f.git(source, "-c", "user.name=x", "-c", "user.email=x@y", "commit", "-qm", "x")
	if err := unix.Mkfifo(gate, 0o600); err != nil {
		t.Fatal(err)
	}
	defer f.ready()()
	clone := f.gitCommand(f.cfg.Dir, "clone", "-q", "-u", "read -r _ <"+gate+"; git-upload-pack", "file://"+source, "machine")
	if err := clone.Start(); err != nil {
		t.Fatal(err)
	}
	f.eventually("a beginning of the clone", func() bool {
		_, err := os.Stat(filepath.Join(f.cfg.Dir, "machine/.git/config"))
		return err == nil
	})
	// Moved in later, and taken while the clone waits.
	if err := os.Rename(f.plant(".other", machine), filepath.Join(f.cfg.Dir, "other")); err != nil {
		t.Fatal(err)
	}
	if got := f.next().Drop; got != "other" {
		t.Errorf("%s was taken", got)
	}
	f.wantInFolder("machine")
	if err := os.WriteFile(gate, []byte("go\n"), 0); err != nil {
		t.Fatal(err)
	}
	if err := clone.Wait(); err != nil {
		t.Fatal(err)
	}
	j := f.next()
	for name, want := range map[string]string{"configuration.nix": "{ imports = [ ./more.nix ]; }\n", "more.nix": "{ }\n"} {
		copied, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(j.ID), sourceDir, "machine", name))
		if err != nil || string(copied) != want {
			t.Errorf("%s is %q, %v", name, copied, err)
		}
	}
}

func (f *fixture) gitCommand(dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(f.t.Context(), "git", append([]string{"-c", "init.defaultBranch=main", "-c", "core.hooksPath=/dev/null"}, args...)...)
	cmd.Dir = dir
	return cmd
}

func (f *fixture) git(dir string, args ...string) {
	f.t.Helper()
	if out, err := f.gitCommand(dir, args...).CombinedOutput(); err != nil {
		f.t.Fatalf("git %s: %v\n%s", args[0], err, out)
	}
}

// eventually waits for what another program does.
func (f *fixture) eventually(what string, done func() bool) {
	f.t.Helper()
	tick, bound := time.NewTicker(5*time.Millisecond), time.NewTimer(20*time.Second)
	defer tick.Stop()
	defer bound.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-bound.C:
			f.t.Fatalf("no %s", what)
		}
	}
}

// With a settle time that never passes: what is moved in is whole, and taken
// at once. What is only given another name, or written here, isn't known to be.
func TestMovedIn(t *testing.T) {
	f := newFixture(t)
	f.deaf = false
	f.cfg.Settle, f.cfg.Rescan = time.Hour, time.Hour
	outside := t.TempDir()
	move := func(from, to string) {
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(f.cfg.Dir, name) }
	defer f.start()()
	// The first tells that the watch is there: until then it is tried again.
	for n := 0; len(f.taken) == 0; n++ {
		file("echo\n")(t, filepath.Join(outside, "first.sh"))
		move(filepath.Join(outside, "first.sh"), in(fmt.Sprintf("first-%d.sh", n)))
		select {
		case id := <-f.taken:
			f.taken <- id
		case <-time.After(300 * time.Millisecond):
		}
	}
	for len(f.taken) > 0 {
		<-f.taken
	}
	f.write("written.sh", "echo written\n")
	move(in("written.sh"), in("renamed.sh"))
	f.plant("folder", machine)
	open, err := os.Create(filepath.Join(outside, "open.sh"))
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := open.WriteString("echo half\n"); err != nil {
		t.Fatal(err)
	}
	move(open.Name(), in("open.sh"))
	file("echo outside\n")(t, filepath.Join(outside, "x"))
	for _, from := range []string{filepath.Join(outside, "x"), in(".hidden"), in("download.sh.part")} {
		file("echo "+filepath.Base(from)+"\n")(t, from)
		move(from, in("moved.sh"))
		got := f.next().Drop
		for strings.HasPrefix(got, "first-") { // one that was slow
			got = f.next().Drop
		}
		if got != "moved.sh" {
			t.Errorf("%s was taken", got)
		}
	}
	left := slices.DeleteFunc(f.inFolder(), func(name string) bool { return strings.HasPrefix(name, "first-") })
	if diff := cmp.Diff([]string{"folder", "open.sh", "renamed.sh"}, left); diff != "" {
		t.Errorf("jobs folder (-want +got):\n%s", diff)
	}
}

func TestNotes(t *testing.T) {
	const to, from = unix.IN_MOVED_TO, unix.IN_MOVED_FROM
	for name, tc := range map[string]struct {
		notes []note
		want  []string
	}{
		"from outside":             {[]note{{mask: to, cookie: 1, name: "a"}}, []string{"a"}},
		"another name":             {[]note{{mask: from, cookie: 1, name: "a"}, {mask: to, cookie: 1, name: "b"}}, nil},
		"from a hidden name":       {[]note{{mask: from, cookie: 1, name: ".a"}, {mask: to, cookie: 1, name: "b"}}, []string{"b"}},
		"one out, another in":      {[]note{{mask: from, cookie: 1, name: "a"}, {mask: to, cookie: 2, name: "b"}}, []string{"b"}},
		"and made anew":            {[]note{{mask: to, cookie: 1, name: "a"}, {mask: unix.IN_CREATE, name: "a"}}, nil},
		"of a folder that is gone": {[]note{{watch: 7, mask: to, cookie: 1, name: "a"}}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := &wholes{names: map[string]bool{}}
			for _, n := range tc.notes {
				w.note(n)
			}
			var got []string
			for name := range w.take() {
				got = append(got, name)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("whole (-want +got):\n%s", diff)
			}
		})
	}
}

// Several drops go through the steps together: killed after any of them, the
// next start has one job of each.
func TestStoppedAfterAnyStepOfSeveral(t *testing.T) {
	drops := map[string]string{"a.sh": "echo a\n", "b.sh": "echo b\n", "c.sh": "echo c\n"}
	prepare := func(t *testing.T, step func(string)) *fixture {
		f := newFixture(t)
		for name, text := range drops {
			f.write(name, text)
		}
		f.write("x.yml", "{}")
		f.step = step
		return f
	}
	var steps []string
	synctest.Test(t, func(t *testing.T) {
		defer prepare(t, func(name string) { steps = append(steps, name) }).start()()
		pass(settle * 2)
	})
	if len(steps) < 30 {
		t.Fatalf("steps: %q", steps)
	}
	for at, name := range steps {
		t.Run(fmt.Sprintf("%d %s", at, name), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := 0
				f := prepare(t, func(string) {
					if n == at {
						runtime.Goexit()
					}
					n++
				})
				stop := f.start()
				pass(settle * 2)
				stop()
				f.step = nil
				for range 2 {
					stop := f.start()
					pass(rescan + settle)
					stop()
				}
				f.wantInFolder()
				f.wantJobs(drops)
				if left := list(t, filepath.Join(f.cfg.Dir, rejectedDir)); len(left) != 2 {
					t.Errorf("rejected: %q", left)
				}
			})
		})
	}
}

// One that can't be recorded doesn't hold up those beside it.
func TestOneOfManyCantBeRecorded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.records.refused = "b.sh"
		for _, name := range []string{"a.sh", "b.sh", "c.sh"} {
			f.write(name, "echo "+name+"\n")
		}
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("b.sh")
		f.wantJobs(map[string]string{"a.sh": "echo a.sh\n", "c.sh": "echo c.sh\n"})
		f.wantWaits("record the job: exists", "")
	})
}

// The same ID twice in a second, as chance has it among thousands.
func TestTwoDropsDrawTheSameID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.cfg.Now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }
		draws := uint64(0)
		f.cfg.Random = func() uint64 { draws++; return draws / 4 }
		drops := map[string]string{"a.sh": "echo a\n", "b.sh": "echo b\n", "c.sh": "echo c\n"}
		for name, text := range drops {
			f.write(name, text)
		}
		defer f.start()()
		pass(settle + time.Second)
		f.wantJobs(drops)
	})
}

// Of many that wait for the same, some lines say it, and one how many more.
func TestManyThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.records.setFail(errors.New("the store is away"))
		for i := range 100 {
			f.write(fmt.Sprintf("%02d.sh", i), "echo\n")
		}
		defer f.start()()
		pass(settle + 3*rescan)
		more := f.lines("more drops wait")
		if n := len(f.lines("drop waits")); n != maxSaid || len(more) != 1 || more[0].ContextMap()["drops"] != int64(100-maxSaid) {
			t.Errorf("%d drops wait, %v", n, more)
		}
		f.records.setFail(nil)
		pass(rescan)
		f.wantInFolder()
		if len(f.records.jobs) != 100 {
			t.Errorf("%d jobs", len(f.records.jobs))
		}
	})
}

// sized makes a file of that size that takes no room on the disk.
func sized(t *testing.T, path string, size int64) {
	t.Helper()
	if err := errors.Join(os.WriteFile(path, nil, 0o644), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
}

func TestAGigabyte(t *testing.T) {
	const gigabyte = 1 << 30
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		for _, dir := range []string{f.cfg.Dir, f.cfg.State} {
			mount(t, "tmpfs", dir, "tmpfs", 0, "size=1200m") // no test of the disk's speed
		}
		sized(t, filepath.Join(f.cfg.Dir, "a.sh"), gigabyte)
		sized(t, filepath.Join(f.cfg.Dir, "b.nix"), gigabyte)
		f.plant("machine", machine)
		sized(t, filepath.Join(f.cfg.Dir, "machine", "big"), gigabyte)
		defer f.start()()
		pass(6*settle + rescan)
		f.wantInFolder()
		for _, name := range []string{"a.sh", "b.nix"} {
			message, err := os.ReadFile(filepath.Join(f.cfg.Dir, rejectedDir, name+".txt"))
			if err != nil || !strings.Contains(string(message), "this one has 1.1 GB") {
				t.Errorf("message %q, %v", message, err)
			}
		}
		j := f.records.jobs[<-f.taken]
		if j.Inputs == nil || j.Inputs.Size < gigabyte {
			t.Errorf("job %+v", j)
		}
		info, err := os.Stat(filepath.Join(f.cfg.State, "jobs", string(j.ID), sourceDir, "machine/big"))
		if err != nil || info.Size() != gigabyte {
			t.Errorf("copy: %v, %v", info, err)
		}
	})
}

// Room is looked at before: a copy that can't be whole is not begun again and
// again.
func TestADropThatIsLargerThanTheRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		mount(t, "tmpfs", f.cfg.State, "tmpfs", 0, "size=1m")
		f.plant("machine", machine)
		sized(t, filepath.Join(f.cfg.Dir, "machine", "big"), 3_000_000)
		f.step = func(step string) {
			if step == "folder made" && len(f.lines("drop waits")) == 0 {
				t.Error("a copy was begun for which there is no room")
			}
		}
		defer f.start()()
		pass(10 * time.Minute)
		f.wantInFolder("machine")
		lines := f.lines("drop waits")
		if len(lines) != 1 {
			t.Fatalf("log: %v", f.logs.All())
		}
		said := fmt.Sprint(lines[0].ContextMap())
		for _, want := range []string{"no room in " + f.cfg.State + ": 3.0 MB are needed, 1.0 MB are free, 2.0 MB are missing", "Make room on the disk of Docker's volumes"} {
			if !strings.Contains(said, want) {
				t.Errorf("said %s, want %q", said, want)
			}
		}
		if err := unix.Mount("tmpfs", f.cfg.State, "tmpfs", unix.MS_REMOUNT, "size=20m"); err != nil {
			t.Fatal(err)
		}
		pass(rescan)
		f.wantInFolder()
		if len(f.records.jobs) != 1 {
			t.Errorf("%d jobs", len(f.records.jobs))
		}
	})
}

// What can't be a path in the VM any more is refused, however long it is.
func TestPathsThatAreTooLong(t *testing.T) {
	for _, levels := range []int{6, 30} { // 30 are more than the system takes in one go
		t.Run(fmt.Sprint(levels), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				path := f.plant("machine", machine)
				root, err := os.OpenRoot(path)
				if err != nil {
					t.Fatal(err)
				}
				for range levels {
					name := strings.Repeat("long", 50)
					next, err := errorRoot(root.Mkdir(name, 0o755), root, name)
					if err != nil {
						t.Fatal(err)
					}
					_ = root.Close()
					root = next
				}
				_ = root.Close()
				defer f.start()()
				pass(6*settle + rescan)
				f.wantInFolder()
				message, err := os.ReadFile(filepath.Join(f.cfg.Dir, rejectedDir, "machine.txt"))
				if err != nil || !strings.Contains(string(message), "in it is longer than 1000 bytes") {
					t.Errorf("message %q, %v", message, err)
				}
			})
		})
	}
}

func errorRoot(err error, root *os.Root, name string) (*os.Root, error) {
	if err != nil {
		return nil, err
	}
	return root.OpenRoot(name)
}

// Text that is no UTF-8 runs as it stands: to Bash it is bytes.
func TestAScriptThatIsNotUTF8(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		drops := map[string]string{"latin1.sh": "# gr\xfc\xdfe\necho hi > \"$OUT/\xe4\"\n", "mixed.sh": "cat > x <<'E'\na\r\nE\n"}
		for name, text := range drops {
			f.write(name, text)
		}
		defer f.start()()
		pass(settle + time.Second)
		f.wantInFolder()
		f.wantJobs(drops)
	})
}
