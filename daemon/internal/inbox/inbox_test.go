package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/recipe"
	"osbuilder/internal/testenv"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	errNotFound = errors.New("not found")
	errExists   = errors.New("exists")
)

// records is a Store that outlives the Inboxes of a test.
type records struct {
	mu    sync.Mutex
	jobs  map[job.ID]job.Job
	drops map[string]job.ID
	fail  error // of CreateAll, which then records nothing
	late  error // of CreateAll, which records all the same

	refused string // the drop that can't be recorded, nor any beside it
}

func (r *records) CreateAll(_ context.Context, jobs []job.Job) ([]job.Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fail != nil {
		return nil, r.fail
	}
	for _, j := range jobs {
		_, id := r.jobs[j.ID]
		_, drop := r.drops[j.DropKey]
		if id || drop && j.DropKey != "" || j.Drop == r.refused {
			return nil, errExists
		}
	}
	for _, j := range jobs {
		r.jobs[j.ID], r.drops[j.DropKey] = j, j.ID
	}
	return jobs, r.late
}

func (r *records) setFail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fail = err
}

func (r *records) Get(_ context.Context, id job.ID) (job.Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	j, ok := r.jobs[id]
	if !ok {
		return job.Job{}, fmt.Errorf("get: %w", errNotFound)
	}
	return j, nil
}

func (r *records) FindDrop(_ context.Context, key string) (job.ID, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if id, ok := r.drops[key]; ok {
		return id, nil
	}
	return "", fmt.Errorf("find: %w", errNotFound)
}

// fixture is a jobs folder, a state folder and records, over which one Inbox
// after the other can run.
type fixture struct {
	t       *testing.T
	cfg     Config
	records *records
	logs    *observer.ObservedLogs
	taken   chan job.ID
	deaf    bool
	uid     int // whom the Inbox runs as; 0: as the test
	step    func(string)
}

const (
	many   = 10_000
	settle = 2 * time.Second
	rescan = 10 * time.Second
)

func newFixture(t *testing.T) *fixture {
	t.Helper()
	return &fixture{
		t: t, deaf: true, records: &records{jobs: make(map[job.ID]job.Job), drops: make(map[string]job.ID)}, taken: make(chan job.ID, many),
		cfg: Config{
			Dir: t.TempDir(), State: t.TempDir(), Settle: settle, Rescan: rescan, JobTimeout: time.Hour,
			Classify: recipe.Classify, Check: recipe.Check,
			Prepare: func(j *job.Job, source string) error {
				return recipe.Prepare(j, source, job.NixOS{Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05"})
			},
			NotFound: errNotFound,
		},
	}
}

// start runs an Inbox until stop is called or a step ends it.
func (f *fixture) start() (stop func()) {
	f.t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	f.logs = logs
	b := New(f.cfg, f.records, zap.New(core))
	b.deaf, b.step = f.deaf, f.step
	ctx, cancel := context.WithCancel(f.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if f.uid != 0 {
			become(f.t, f.uid)
		}
		if err := b.Run(ctx, f.taken); !errors.Is(err, context.Canceled) {
			f.t.Errorf("Run ended with %v", err)
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// become makes the kernel take this goroutine for another user's where it
// touches files. Its thread ends with it.
func become(t *testing.T, uid int) {
	runtime.LockOSThread()
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); errno != 0 {
		t.Errorf("leave the groups: %v", errno)
	}
	_, err := unix.SetfsgidRetGid(uid)
	if err == nil {
		_, err = unix.SetfsuidRetUid(uid)
	}
	if err != nil {
		t.Errorf("become user %d: %v", uid, err)
	}
}

// asUser has the Inbox run as a user who owns its folders and nothing else.
func (f *fixture) asUser(uid int) {
	f.t.Helper()
	if os.Getuid() != 0 {
		testenv.Lacks(f.t, "only root can become another user")
	}
	for _, dir := range []string{f.cfg.Dir, f.cfg.State} {
		if err := errors.Join(os.Chown(dir, uid, uid), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
			f.t.Fatal(err)
		}
	}
	f.uid = uid
}

// pass lets time pass in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

func (f *fixture) write(name, text string) string {
	f.t.Helper()
	path := filepath.Join(f.cfg.Dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
	return path
}

func list(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	names := []string{}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// inFolder returns what users see in the jobs folder.
func (f *fixture) inFolder() []string {
	return slices.DeleteFunc(list(f.t, f.cfg.Dir), func(name string) bool { return name == takenDir || name == rejectedDir })
}

func (f *fixture) wantInFolder(want ...string) {
	f.t.Helper()
	if diff := cmp.Diff(append([]string{}, want...), f.inFolder()); diff != "" {
		f.t.Errorf("jobs folder (-want +got):\n%s", diff)
	}
}

// wantJobs checks that there is one job, and all that belongs to it, for each
// of the drops with their texts, in any order.
func (f *fixture) wantJobs(drops map[string]string) {
	f.t.Helper()
	got := make(map[string]string)
	var ids []string
	for id, j := range f.records.jobs {
		ids = append(ids, string(id))
		copied, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(id), "source", j.Entry))
		if err != nil {
			f.t.Errorf("the job's copy: %v", err)
		}
		if _, twice := got[j.Drop]; twice {
			f.t.Errorf("%q was taken twice", j.Drop)
		}
		got[j.Drop] = string(copied)
		if diff := cmp.Diff([]string{"source"}, list(f.t, filepath.Join(f.cfg.State, "jobs", string(id)))); diff != "" {
			f.t.Errorf("the job's folder (-want +got):\n%s", diff)
		}
		kept, err := os.ReadFile(filepath.Join(f.cfg.Dir, takenDir, string(id), j.Drop))
		if err != nil || string(kept) != string(copied) {
			f.t.Errorf("the drop was not kept: %q, %v", kept, err)
		}
	}
	if diff := cmp.Diff(drops, got); diff != "" {
		f.t.Errorf("jobs (-want +got):\n%s", diff)
	}
	slices.Sort(ids)
	if diff := cmp.Diff(append([]string{}, ids...), append([]string{}, list(f.t, filepath.Join(f.cfg.State, "jobs"))...)); diff != "" {
		f.t.Errorf("copies in the state folder (-jobs +copies):\n%s", diff)
	}
}

// lines returns what was logged with a message that begins in one of these ways.
func (f *fixture) lines(messages ...string) []observer.LoggedEntry {
	return f.logs.Filter(func(e observer.LoggedEntry) bool {
		return slices.ContainsFunc(messages, func(m string) bool { return strings.HasPrefix(e.Message, m) })
	}).All()
}

func TestTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.cfg.Now = func() time.Time { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }
		f.cfg.Random = func() uint64 { return 7 }
		f.write("hello world.sh", "echo hello\n")
		stop := f.start()
		defer stop()
		pass(settle - time.Millisecond)
		f.wantInFolder("hello world.sh")
		pass(2 * time.Millisecond)
		f.wantInFolder()
		f.wantJobs(map[string]string{"hello world.sh": "echo hello\n"})

		id := <-f.taken
		got := f.records.jobs[id]
		if got.DropKey == "" {
			t.Error("no key of the drop")
		}
		got.DropKey = ""
		now := f.cfg.Now()
		want := job.Job{
			ID: "20260102-030405-700000", Name: "hello-world", Drop: "hello world.sh", Recipe: job.RecipeScript,
			Entry: "hello world.sh", State: job.Queued, Created: now, Updated: now, Timeout: time.Hour,
			History: []job.Step{{Time: now, Event: job.Created, State: job.Queued}},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("record (-want +got):\n%s", diff)
		}
	})
}

func TestAFileThatGrowsIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.start()()
		want := ""
		for i := range 10 {
			want += fmt.Sprintf("echo %d\n", i)
			f.write("slow.sh", want)
			pass(settle * 3 / 4)
			f.wantInFolder("slow.sh")
		}
		pass(rescan + settle)
		f.wantJobs(map[string]string{"slow.sh": want})
	})
}

// No event ever comes here: the rescan alone must do.
func TestDropsAreFoundWithoutEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.start()()
		pass(time.Hour)
		f.write("late.sh", "echo late\n")
		pass(rescan + settle)
		f.wantJobs(map[string]string{"late.sh": "echo late\n"})
	})
}

func TestTheSameNameAgainIsANewJob(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.start()()
		path := f.write("again.sh", "echo\n")
		for range 3 {
			pass(rescan + settle)
			id := <-f.taken
			f.wantInFolder()
			// Moved back by the user: the same file, with the same content and mtime.
			if err := os.Rename(filepath.Join(f.cfg.Dir, takenDir, string(id), "again.sh"), path); err != nil {
				t.Fatal(err)
			}
		}
		pass(rescan + settle)
		if len(f.records.jobs) != 4 {
			t.Errorf("%d jobs, want 4", len(f.records.jobs))
		}
	})
}

func TestStrangeNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		drops := make(map[string]string)
		for _, name := range []string{
			"a b.sh", "new\nline.sh", `"quoted'.sh`, "ümläut-日本.sh", "$(touch x).sh", "-rf.sh", "..sh.sh", "Case.sh", "case.sh",
			"*.sh", `back\slash.sh`, strings.Repeat("x", 252) + ".sh", "\x1b[31mred.sh",
		} {
			drops[name] = "echo " + fmt.Sprintf("%q", name) + "\n"
			f.write(name, drops[name])
		}
		delete(drops, "..sh.sh") // hidden
		defer f.start()()
		pass(settle + time.Second)
		f.wantInFolder("..sh.sh")
		f.wantJobs(drops)
		if n := len(f.taken); n != len(drops) {
			t.Errorf("%d IDs came, want %d", n, len(drops))
		}
	})
}

func TestIgnored(t *testing.T) {
	for _, name := range []string{
		".hidden.sh", "a.sh~", ".a.sh.swp", "a.sh.swp", "#a.sh#", ".#a.sh", "4913", "a.sh.part", "a.sh.crdownload",
		"a.sh.TMP", ".gitkeep", ".DS_Store", "rejected", ".taken",
	} {
		if !ignored(name) {
			t.Errorf("%q is taken for a drop", name)
		}
	}
	for _, name := range []string{"a.sh", "rejected.sh", "part.sh", "~a.sh", "#a.sh", "tmp"} {
		if ignored(name) {
			t.Errorf("%q is ignored", name)
		}
	}
}

func TestRejected(t *testing.T) {
	tests := []struct {
		name string
		make func(t *testing.T, path string)
		says string
	}{
		{"host.nix", file(" "), "it is empty"},
		{"job.yaml", file("{}"), "no .yaml files"},
		{"empty.sh", file(""), "it is empty"},
		{"crlf.sh", file("echo\r\necho\r\n"), "line 1: its lines end as on Windows"},
		{"bad\xff.sh", file("echo\n"), "not valid UTF-8"},
		{"a \"b\"\n.txt", file("x"), "ends neither in .nix nor in .sh"},
		{"folder", folder, "it has no configuration.nix"},
		{"folder.sh", folder, "it has no configuration.nix"},
		{"link.sh", func(t *testing.T, path string) {
			if err := os.Symlink("/etc/passwd", path); err != nil {
				t.Fatal(err)
			}
		}, "it is a symbolic link"},
		{"pipe.sh", func(t *testing.T, path string) {
			if err := unix.Mkfifo(path, 0o644); err != nil {
				t.Fatal(err)
			}
		}, "a named pipe"},
		{"socket.sh", func(t *testing.T, path string) {
			l, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
			if err != nil {
				t.Fatal(err)
			}
			l.(*net.UnixListener).SetUnlinkOnClose(false)
			_ = l.Close()
		}, "a socket"},
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%q", tt.name), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				path := filepath.Join(f.cfg.Dir, tt.name)
				tt.make(t, path)
				before, err := stampOf(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.start()()
				pass(5*settle + time.Second)
				f.wantInFolder()
				rejected := filepath.Join(f.cfg.Dir, rejectedDir)
				if after, err := stampOf(filepath.Join(rejected, tt.name)); err != nil || !after.moved(before) {
					t.Errorf("it was not moved as it was: %v", err)
				}
				message, err := os.ReadFile(filepath.Join(rejected, tt.name+".txt"))
				if err != nil || !strings.Contains(string(message), tt.says) || len(strings.Split(string(message), "\n")) != 4 {
					t.Errorf("message %q, %v", message, err)
				}
				if len(f.records.jobs) > 0 || len(f.taken) > 0 {
					t.Error("it became a job")
				}
				if lines := f.lines("drop rejected"); len(lines) != 1 || lines[0].ContextMap()["drop"] != tt.name {
					t.Errorf("log: %v", f.logs.All())
				}
				if copies := list(t, filepath.Join(f.cfg.State, "jobs")); len(copies) > 0 {
					t.Errorf("copies were left: %q", copies)
				}
			})
		})
	}
}

func file(text string) func(*testing.T, string) {
	return func(t *testing.T, path string) {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func folder(t *testing.T, path string) {
	if err := os.MkdirAll(filepath.Join(path, "deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	file("x")(t, filepath.Join(path, "deep", "file"))
}

func TestRejectedTwiceUnderOneName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.start()()
		long := strings.Repeat("ü", 120) + ".yml"
		for i, text := range []string{"first", "second", "third"} {
			f.write("x.yml", text)
			f.write(long, text)
			if i == 1 {
				f.write("x.yml.txt", "a drop with the name of a message")
			}
			pass(rescan + settle)
		}
		rejected := filepath.Join(f.cfg.Dir, rejectedDir)
		want := []string{
			"x.yml", "x.yml-2", "x.yml-2.txt", "x.yml-3", "x.yml-3.txt", "x.yml.txt", "x.yml.txt-2", "x.yml.txt-2.txt",
		}
		got := slices.DeleteFunc(list(t, rejected), func(name string) bool { return strings.HasPrefix(name, "ü") })
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("rejected (-want +got):\n%s", diff)
		}
		for name, want := range map[string]string{"x.yml": "first", "x.yml-2": "second", "x.yml-3": "third"} {
			if data, _ := os.ReadFile(filepath.Join(rejected, name)); string(data) != want {
				t.Errorf("%s holds %q, want %q", name, data, want)
			}
		}
		if n := len(list(t, rejected)) - len(got); n != 6 {
			t.Errorf("%d files of the long name, want 6", n)
		}
		f.wantInFolder()
	})
}

func TestAFolderIsLeftAloneWhileItGrows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		defer f.start()()
		for i := range 8 { // as cp -r does; the top itself doesn't change
			f.write(fmt.Sprintf("tree/deep/%d", i%3), strings.Repeat("x", i))
			pass(settle * 4)
			f.wantInFolder("tree")
		}
		lock := f.write("tree/.git/index.lock", "")
		pass(time.Minute)
		f.wantInFolder("tree")
		if err := os.Remove(lock); err != nil {
			t.Fatal(err)
		}
		pass(settle * 4)
		f.wantInFolder("tree")
		pass(settle*2 + rescan)
		f.wantInFolder()
	})
}

// Wherever it is killed, the next start makes one job of the drop.
func TestStoppedAfterAnyStep(t *testing.T) {
	var steps []string
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.write("job.sh", "echo job\n")
		f.step = func(name string) { steps = append(steps, name) }
		defer f.start()()
		pass(settle * 2)
	})
	if len(steps) < 12 || steps[len(steps)-1] != "sent" {
		t.Fatalf("steps: %q", steps)
	}
	for at, name := range steps {
		t.Run(fmt.Sprintf("%d %s", at, name), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.write("job.sh", "echo job\n")
				n := 0
				f.step = func(string) {
					if n == at {
						runtime.Goexit() // as a kill does, it leaves everything as it is
					}
					n++
				}
				stop := f.start()
				pass(settle * 2)
				stop()
				recorded := len(f.records.jobs)
				f.step = nil
				for range 2 { // and a start later, nothing more
					stop := f.start()
					pass(rescan + settle)
					stop()
				}
				f.wantInFolder()
				f.wantJobs(map[string]string{"job.sh": "echo job\n"})
				if n := len(f.taken); n > 2 || n == 0 && recorded == 0 {
					t.Errorf("%d IDs came", n)
				}
			})
		})
	}
}

func TestStoppedAfterAnyStepOfARejection(t *testing.T) {
	for _, name := range []string{"message written", "rejected"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.write("x.yml", "{}")
				f.step = func(step string) {
					if step == name {
						runtime.Goexit()
					}
				}
				stop := f.start()
				pass(settle * 2)
				stop()
				f.step = nil
				stop = f.start()
				pass(settle * 2)
				stop()
				f.wantInFolder()
				if diff := cmp.Diff([]string{"x.yml", "x.yml.txt"}, list(t, filepath.Join(f.cfg.Dir, rejectedDir))); diff != "" {
					t.Errorf("rejected (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestManyDropsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		for _, dir := range []string{f.cfg.Dir, f.cfg.State} {
			mount(t, "tmpfs", dir, "tmpfs", 0, "size=400m,nr_inodes=0") // no test of the disk's speed
		}
		for i := range many {
			f.write(fmt.Sprintf("%05d.sh", i), fmt.Sprintf("echo %d\n", i))
		}
		defer f.start()()
		pass(settle + time.Second)
		f.wantInFolder()
		if len(f.taken) != many || len(f.records.jobs) != many || len(f.records.drops) != many {
			t.Fatalf("%d IDs came of %d jobs from %d drops", len(f.taken), len(f.records.jobs), len(f.records.drops))
		}
		for _, dir := range []string{filepath.Join(f.cfg.State, "jobs"), filepath.Join(f.cfg.Dir, takenDir)} {
			if n := len(list(t, dir)); n != many {
				t.Errorf("%d folders in %s, want %d", n, dir, many)
			}
		}
		seen := make(map[string]bool)
		for id, j := range f.records.jobs {
			seen[j.Drop] = true
			n, err := strconv.Atoi(strings.TrimSuffix(j.Drop, ".sh"))
			if err != nil {
				t.Fatal(err)
			}
			if n%97 > 0 {
				continue // all would take as long to read as to take
			}
			copied, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(id), sourceDir, j.Drop))
			if want := fmt.Sprintf("echo %d\n", n); err != nil || string(copied) != want {
				t.Errorf("copy of %s is %q, %v", j.Drop, copied, err)
			}
		}
		if len(seen) != many {
			t.Errorf("jobs of %d drops", len(seen))
		}
	})
}

// A folder in which nothing can be moved: each drop becomes a job once, over
// restarts too, and that is said once.
func TestADropThatCantBeMovedIsRemembered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.write(takenDir, "not a folder")
		f.write(rejectedDir, "not a folder")
		f.write("a.sh", "echo a\n")
		f.write("x.yml", "{}")
		for range 3 {
			stop := f.start()
			pass(time.Minute)
			f.wantInFolder("a.sh", "x.yml")
			for _, message := range []string{"drop was taken but can't be moved", "drop rejected, but it can't be moved"} {
				if lines := f.lines(message); len(lines) != 1 || lines[0].ContextMap()["hint"] == nil {
					t.Errorf("log: %v", f.logs.All())
				}
			}
			stop()
			if len(f.records.jobs) != 1 {
				t.Fatalf("%d jobs, want 1", len(f.records.jobs))
			}
		}
		if len(f.taken) != 3 {
			t.Errorf("%d IDs came", len(f.taken))
		}
		// Once somebody began the job, a start doesn't tell of it again.
		for id, j := range f.records.jobs {
			j.State, j.Attempt = job.Running, 1
			f.records.jobs[id] = j
		}
		defer f.start()()
		pass(time.Minute)
		if len(f.taken) != 3 {
			t.Errorf("%d IDs came", len(f.taken))
		}
		f.write("a.sh", "echo anew\n")
		pass(rescan + settle)
		if len(f.records.jobs) != 2 {
			t.Errorf("%d jobs after the drop changed, want 2", len(f.records.jobs))
		}
		// As soon as it can be moved, it is.
		for _, name := range []string{takenDir, rejectedDir} {
			if err := os.Remove(filepath.Join(f.cfg.Dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		defer f.start()()
		pass(rescan + settle)
		f.wantInFolder()
	})
}

func TestNoRoomInTheState(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.records.setFail(fmt.Errorf("insert: %w", unix.ENOSPC))
		f.write("a.sh", "echo a\n")
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("a.sh")
		lines := f.lines("drop waits")
		if len(lines) != 1 {
			t.Fatalf("log: %v", f.logs.All())
		}
		fields := lines[0].ContextMap()
		if !strings.Contains(fmt.Sprint(fields["error"]), "no room in "+f.cfg.State) || fields["hint"] == nil {
			t.Errorf("log: %v", fields)
		}
		if copies := list(t, filepath.Join(f.cfg.State, "jobs")); len(copies) > 0 {
			t.Errorf("copies pile up: %q", copies)
		}
		f.records.setFail(nil)
		pass(rescan)
		f.wantInFolder()
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
	})
}

func TestNoRoomForTheCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		if err := unix.Mount("tmpfs", f.cfg.State, "tmpfs", 0, "size=100k"); err != nil {
			testenv.Lacks(t, "no tmpfs can be mounted here: %v", err)
		}
		defer func() {
			if err := unix.Unmount(f.cfg.State, 0); err != nil {
				t.Error(err)
			}
		}()
		full := filepath.Join(f.cfg.State, "full")
		if err := os.WriteFile(full, make([]byte, 60_000), 0o600); err != nil {
			t.Fatal(err)
		}
		text := "#" + strings.Repeat("x", 60_000) + "\n"
		f.write("a.sh", text)
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("a.sh")
		if lines := f.lines("drop waits"); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["error"]), "no room") {
			t.Fatalf("log: %v", f.logs.All())
		}
		if err := os.Remove(full); err != nil {
			t.Fatal(err)
		}
		pass(rescan)
		data, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(<-f.taken), "source", "a.sh"))
		if err != nil || string(data) != text {
			t.Errorf("copy has %d bytes, %v", len(data), err)
		}
	})
}

// The disk of the jobs folder is full: it is said, with figures, nothing half is
// left, and with room again the drop goes by itself.
func TestNoRoomToMoveADrop(t *testing.T) {
	for name, tt := range map[string]struct {
		drop, text string
		disk       string // its size; the drop and what there is besides fill it
		more       string
		says       string
		want       []string // the line the user reads
	}{
		// What is full is what a folder needs: .taken has room, and .taken/ID has not.
		"taken": {
			"a.sh", "echo a\n", "size=1m,nr_inodes=4", "size=1m,nr_inodes=20", "drop was taken but can't be moved away yet, trying again",
			[]string{"no room in DIR: it takes no more, though 1.", "mkdir DIR/.taken/", "no space left on device", "Make room on the disk of the jobs folder. The drop is moved by itself then."},
		},
		"rejected": {
			"x.yml", "{}", "size=12k", "size=1m", "drop rejected, but it can't be moved away yet, trying again",
			[]string{"this version builds no .yml files", "it stays because: no room in DIR: nothing is free", "Make room on the disk of the jobs folder. The drop is moved by itself then."},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				mount(t, "tmpfs", f.cfg.Dir, "tmpfs", 0, tt.disk)
				f.write(tt.drop, tt.text)
				f.write(".of somebody", strings.Repeat("x", 8<<10))
				defer f.start()()
				pass(time.Minute)
				f.wantInFolder(".of somebody", tt.drop)
				lines := f.lines("drop was taken but", "drop rejected")
				if len(lines) != 1 || lines[0].Message != tt.says {
					t.Fatalf("log: %v", f.logs.All())
				}
				said := fmt.Sprint(lines[0].ContextMap())
				for _, want := range tt.want {
					if want = strings.ReplaceAll(want, "DIR", f.cfg.Dir); !strings.Contains(said, want) {
						t.Errorf("said %s, want %q", said, want)
					}
				}
				if left := append(list(t, filepath.Join(f.cfg.Dir, rejectedDir)), list(t, filepath.Join(f.cfg.Dir, takenDir))...); len(left) > 0 {
					t.Errorf("left: %q", left)
				}
				if err := unix.Mount("tmpfs", f.cfg.Dir, "tmpfs", unix.MS_REMOUNT, tt.more); err != nil {
					t.Fatal(err)
				}
				pass(rescan)
				f.wantInFolder(".of somebody")
				if name == "taken" {
					f.wantJobs(map[string]string{tt.drop: tt.text})
					if n := len(f.taken); n != 1 {
						t.Errorf("told of %d jobs", n)
					}
				} else if left := list(t, filepath.Join(f.cfg.Dir, rejectedDir)); !slices.Equal(left, []string{"x.yml", "x.yml.txt"}) {
					t.Errorf("rejected: %q", left)
				}
			})
		})
	}
}

// One that can't be a job is looked into once, however long it can't be moved.
func TestARefusalIsFoundOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		mount(t, "tmpfs", f.cfg.Dir, "tmpfs", 0, "size=12k")
		var checks atomic.Int64
		f.cfg.Check = func(job.Recipe, string) error { checks.Add(1); return errors.New("it is of no use") }
		f.write("x.sh", "true\n")
		f.write(".of somebody", strings.Repeat("x", 8<<10))
		defer f.start()()
		pass(time.Minute)
		if lines := f.lines("drop rejected, but it can't be moved away yet"); checks.Load() != 1 || len(lines) != 1 {
			t.Errorf("looked into %d times, said %d times", checks.Load(), len(lines))
		}
		f.write("x.sh", "") // another one
		pass(time.Minute)
		if checks.Load() != 2 {
			t.Errorf("another one was looked into %d times", checks.Load()-1)
		}
	})
}

// A new version of a drop that waits to be moved has a settle time of its own.
func TestANewVersionWhileThereIsNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		mount(t, "tmpfs", f.cfg.Dir, "tmpfs", 0, "size=1m,nr_inodes=3")
		f.write("a.sh", "echo a\n")
		defer f.start()()
		pass(5 * time.Minute)
		f.write("a.sh", "echo other\n")
		pass(time.Minute)
		if lines := f.lines("drop waits"); len(lines) > 0 {
			t.Errorf("it says %v", lines)
		}
		if n := len(f.records.jobs); n != 2 {
			t.Errorf("%d jobs, want one of each version", n)
		}
	})
}

// Whoever gives a drop another owner while it waits to be moved wants no other job.
func TestAnOwnerThatChangesWhileThereIsNoRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		mount(t, "tmpfs", f.cfg.Dir, "tmpfs", 0, "size=1m,nr_inodes=3")
		path := f.write("a.sh", "echo a\n")
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("a.sh")
		if err := os.Chown(path, daemon, daemon); err != nil {
			testenv.Lacks(t, "only root gives files away: %v", err)
		}
		pass(time.Minute)
		if err := unix.Mount("tmpfs", f.cfg.Dir, "tmpfs", unix.MS_REMOUNT, "size=1m,nr_inodes=20"); err != nil {
			t.Fatal(err)
		}
		pass(rescan)
		f.wantInFolder()
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
	})
}

func TestARecordWhoseCreateSaidAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.records.late = errors.New("connection lost after the commit")
		f.write("a.sh", "echo a\n")
		stop := f.start()
		pass(settle + rescan + time.Second)
		f.wantInFolder()
		if id := <-f.taken; f.records.jobs[id].Drop != "a.sh" {
			t.Errorf("job %s came", id)
		}
		stop()
		defer f.start()() // clears the copy's marker
		pass(time.Second)
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
	})
}

func TestUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		check := f.cfg.Check
		var denied atomic.Bool
		denied.Store(true) // root reads everything, so chmod shows nothing
		f.cfg.Check = func(r job.Recipe, path string) error {
			if denied.Load() {
				return &fs.PathError{Op: "open", Path: path, Err: unix.EACCES}
			}
			return check(r, path)
		}
		f.write("a.sh", "echo a\n")
		defer f.start()()
		pass(time.Minute)
		f.wantInFolder("a.sh")
		if lines := f.lines("drop waits"); len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["hint"]), "chmod") {
			t.Fatalf("log: %v", f.logs.All())
		}
		denied.Store(false)
		pass(rescan)
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
	})
}

// What users do to a drop while it is being taken.
func TestChangesWhileADropIsTaken(t *testing.T) {
	tests := []struct {
		name   string
		at     string
		change func(f *fixture, path string)
		want   []string // the texts of the jobs
	}{
		{"appended before the copy", "folder made", appendTo, []string{"echo 1\necho 2\n"}},
		{"appended after the copy", "copied", appendTo, []string{"echo 1\necho 2\n"}},
		{"replaced after the copy", "copied", replace, []string{"echo 3\n"}},
		{"appended after the compare", "compared", appendTo, []string{"echo 1\n", "echo 1\necho 2\n"}},
		{"replaced before the move", "shelf made", replace, []string{"echo 1\n", "echo 3\n"}},
		{"appended before the move", "shelf made", appendTo, []string{"echo 1\n", "echo 1\necho 2\n"}},
		{"removed before the copy", "folder made", remove, nil},
		{"removed after the copy", "copied", remove, nil},
		{"removed after the record", "recorded", remove, []string{"echo 1\n"}},
		{"removed before the move", "shelf made", remove, []string{"echo 1\n"}},
		{"a link in its place", "folder made", func(f *fixture, path string) {
			remove(f, path)
			if err := os.Symlink("/etc/hostname", path); err != nil {
				f.t.Error(err)
			}
		}, nil},
		{"a pipe in its place", "folder made", func(f *fixture, path string) {
			remove(f, path)
			if err := unix.Mkfifo(path, 0o644); err != nil {
				f.t.Error(err)
			}
		}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				path := f.write("a.sh", "echo 1\n")
				once := false
				f.step = func(step string) {
					if step == tt.at && !once {
						once = true
						tt.change(f, path)
					}
				}
				defer f.start()()
				pass(time.Minute)
				f.wantInFolder()
				var got []string
				for id, j := range f.records.jobs {
					data, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(id), "source", j.Entry))
					if err != nil {
						t.Error(err)
					}
					got = append(got, string(data))
				}
				slices.Sort(got)
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Errorf("jobs (-want +got):\n%s", diff)
				}
				if waits := f.lines("drop waits"); len(waits) > 0 {
					t.Errorf("log: %v", waits)
				}
			})
		})
	}
}

func appendTo(f *fixture, path string) {
	w, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		f.t.Error(err)
		return
	}
	defer w.Close()
	if _, err := w.WriteString("echo 2\n"); err != nil {
		f.t.Error(err)
	}
}

func replace(f *fixture, path string) {
	temp := f.write(".new", "echo 3\n")
	if err := os.Rename(temp, path); err != nil {
		f.t.Error(err)
	}
}

func remove(f *fixture, path string) {
	if err := os.Remove(path); err != nil {
		f.t.Error(err)
	}
}

func TestAReaderWhoIsAwayDoesNotKeepRunFromEnding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.taken = make(chan job.ID)
		f.write("a.sh", "echo a\n")
		f.write("b.sh", "echo b\n")
		stop := f.start()
		pass(time.Minute)
		f.write("c.sh", "echo c\n")
		pass(time.Minute)
		stop()
		f.wantJobs(map[string]string{"a.sh": "echo a\n", "b.sh": "echo b\n"})
		f.wantInFolder("c.sh")
	})
}

func TestAFolderThatIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.cfg.Dir = filepath.Join(f.cfg.Dir, "jobs")
		defer f.start()()
		pass(time.Hour)
		if lines := f.lines("jobs folder can't be read"); len(lines) != 1 || lines[0].ContextMap()["hint"] == nil {
			t.Fatalf("log: %v", f.logs.All())
		}
		f.write("a.sh", "echo a\n")
		pass(rescan + settle)
		f.wantJobs(map[string]string{"a.sh": "echo a\n"})
		if len(f.lines("jobs folder is there again")) != 1 {
			t.Errorf("log: %v", f.logs.All())
		}
	})
}

func TestSweepKeepsWhatIsOnRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.records.jobs["20260101-000000-recded"] = job.Job{ID: "20260101-000000-recded"}
		jobs := filepath.Join(f.cfg.State, "jobs")
		for _, path := range []string{
			"20260101-000000-recded/unrecorded", "20260101-000000-recded/build.log", "20260101-000000-orphan/unrecorded",
			"20260101-000000-nomark/build.log", ".new-20260101-000000-halfcp/unrecorded", "of somebody/unrecorded",
		} {
			if err := os.MkdirAll(filepath.Join(jobs, filepath.Dir(path)), 0o700); err != nil {
				t.Fatal(err)
			}
			file("")(t, filepath.Join(jobs, path))
		}
		defer f.start()()
		pass(time.Second)
		want := []string{"20260101-000000-nomark", "20260101-000000-recded", "of somebody"}
		if diff := cmp.Diff(want, list(t, jobs)); diff != "" {
			t.Errorf("copies (-want +got):\n%s", diff)
		}
		if diff := cmp.Diff([]string{"build.log"}, list(t, filepath.Join(jobs, "20260101-000000-recded"))); diff != "" {
			t.Errorf("of the recorded job (-want +got):\n%s", diff)
		}
	})
}
