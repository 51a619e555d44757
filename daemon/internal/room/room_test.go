package room

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/internal/testenv"
)

// world is a guard over two small disks, and a clock that the test turns.
type world struct {
	*Guard
	t             *testing.T
	output, state string
	now           time.Time
	logs          *observer.ObservedLogs
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, output: t.TempDir(), state: t.TempDir(), now: time.Unix(0, 0)}
	for _, dir := range []string{w.output, w.state} {
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=10m"); err != nil {
			testenv.Lacks(t, "no tmpfs can be mounted here: %v", err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		})
	}
	core, logs := observer.New(zap.InfoLevel)
	w.logs = logs
	w.Guard = &Guard{
		Least: 3_000_000, Log: zap.New(core), Now: func() time.Time { return w.now },
		Places: []Place{{w.output, "make room there"}, {w.state, "make room here"}},
	}
	return w
}

// fill leaves so many bytes free.
func (w *world) fill(dir string, free int64) {
	w.t.Helper()
	var s unix.Statfs_t
	path := filepath.Join(dir, "filler")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		w.t.Fatal(err)
	}
	if err := unix.Statfs(dir, &s); err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(path, make([]byte, int64(s.Bavail)*s.Bsize-free), 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) want(parts ...string) {
	w.t.Helper()
	w.now = w.now.Add(time.Minute)
	why := w.Lacks()
	for _, part := range parts {
		if !strings.Contains(why, part) {
			w.t.Errorf("waits for %q, want %q in it", why, part)
		}
	}
	if len(parts) == 0 && why != "" {
		w.t.Errorf("waits for %q", why)
	}
}

func TestJobsWaitForRoom(t *testing.T) {
	w := newWorld(t)
	w.want()
	w.fill(w.state, 2_000_000)
	w.want("room in "+w.state+": ", "MB are free, and jobs begin above 3.0 MB (MIN_FREE)")
	first := w.why
	w.fill(w.state, 1_000_000)
	w.want(first) // the same words, with every job of thousands
	w.fill(w.state, 3_100_000)
	w.want(first) // not at the first byte
	w.fill(w.state, 4_000_000)
	w.want()
	w.fill(w.output, 0)
	w.fill(w.state, 0)
	w.want("room in "+w.output, ": 0 bytes are free")
	w.fill(w.output, 9_000_000)
	w.want("room in "+w.state, ": 0 bytes are free")
	w.fill(w.state, 9_000_000)
	w.want()
	var lines []string
	for _, e := range w.logs.All() {
		lines = append(lines, e.Message)
	}
	said := strings.Join(lines, "\n")
	if n := strings.Count(said, "no job is begun until there is room"); n != 3 {
		t.Errorf("said %d times: %s", n, said)
	}
	if n := strings.Count(said, "there is room again, jobs are begun"); n != 2 {
		t.Errorf("said %d times: %s", n, said)
	}
	if hint := w.logs.All()[0].ContextMap()["hint"]; hint != "make room here" {
		t.Errorf("hint %q", hint)
	}
}

func TestADiskIsNotLookedAtWithEachQuestion(t *testing.T) {
	w := newWorld(t)
	w.want()
	w.fill(w.state, 0)
	if why := w.Lacks(); why != "" {
		t.Errorf("looked again at once: %s", why)
	}
	w.now = w.now.Add(every)
	if w.Lacks() == "" {
		t.Error("never looked again")
	}
}

func TestNoBound(t *testing.T) {
	w := newWorld(t)
	w.Least = 0
	w.fill(w.state, 0)
	w.want()
}

func TestAPlaceThatIsGone(t *testing.T) {
	w := newWorld(t)
	w.Places = append([]Place{{Path: filepath.Join(w.output, "gone")}}, w.Places...)
	w.want()
	w.fill(w.state, 0)
	w.want("room in " + w.state)
}

// A disk that had no room and can't be looked at now has none, as far as anyone knows.
func TestAFullPlaceThatCantBeLookedAt(t *testing.T) {
	w := newWorld(t)
	link := filepath.Join(t.TempDir(), "output")
	appear := func() {
		if err := os.Symlink(w.output, link); err != nil {
			t.Fatal(err)
		}
	}
	appear()
	w.Places[0].Path = link
	w.fill(w.output, 0)
	w.want("room in " + link)
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	w.want("room in " + link)
	if lines := w.logs.FilterMessage("there is room again, jobs are begun").All(); len(lines) > 0 {
		t.Errorf("said: %v", lines)
	}
	appear()
	w.fill(w.output, 9_000_000)
	w.want()
}
