package inbox

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/internal/testenv"
)

// These use the real clock, since the kernel's events come in real time. The
// rescan is so far away that what comes, comes by an event.

func newListening(t *testing.T) *fixture {
	t.Helper()
	f := newFixture(t)
	f.deaf = false
	f.cfg.Settle, f.cfg.Rescan = 20*time.Millisecond, time.Hour
	return f
}

func (f *fixture) next() job.Job {
	f.t.Helper()
	select {
	case id := <-f.taken:
		j, err := f.records.Get(f.t.Context(), id)
		if err != nil {
			f.t.Fatal(err)
		}
		return j
	case <-time.After(20 * time.Second):
		f.t.Fatal("no job came")
		return job.Job{}
	}
}

// ready drops a file before the start: once it is taken, the watch is there.
func (f *fixture) ready() (stop func()) {
	f.t.Helper()
	f.write("ready.sh", "echo\n")
	stop = f.start()
	f.next()
	return stop
}

func TestEventsWakeTheInbox(t *testing.T) {
	f := newListening(t)
	defer f.ready()()
	f.write("written.sh", "echo written\n")
	if got := f.next().Drop; got != "written.sh" {
		t.Errorf("%s was taken", got)
	}
	outside := filepath.Join(t.TempDir(), "moved.sh")
	file("echo moved\n")(t, outside)
	if err := os.Rename(outside, filepath.Join(f.cfg.Dir, "moved.sh")); err != nil {
		t.Fatal(err)
	}
	if got := f.next().Drop; got != "moved.sh" {
		t.Errorf("%s was taken", got)
	}
	f.wantInFolder()
}

func TestAFolderThatIsReplacedIsWatchedAnew(t *testing.T) {
	f := newListening(t)
	base := t.TempDir()
	f.cfg.Dir = filepath.Join(base, "jobs")
	other := filepath.Join(base, "other")
	if err := os.Mkdir(other, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(f.cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer f.ready()()
	for _, name := range []string{"first.sh", "second.sh"} {
		if err := unix.Renameat2(unix.AT_FDCWD, f.cfg.Dir, unix.AT_FDCWD, other, unix.RENAME_EXCHANGE); err != nil {
			testenv.Lacks(t, "folders can't be exchanged here: %v", err)
		}
		f.write(name, "echo\n")
		if got := f.next().Drop; got != name {
			t.Errorf("%s was taken", got)
		}
	}
}

func TestAFolderThatIsRemovedAndMadeAgain(t *testing.T) {
	f := newListening(t)
	f.cfg.Dir = filepath.Join(t.TempDir(), "jobs")
	f.cfg.Rescan = 20 * time.Millisecond // of a folder that isn't there no event comes
	if err := os.Mkdir(f.cfg.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	defer f.ready()()
	for range 3 {
		if err := os.RemoveAll(f.cfg.Dir); err != nil {
			t.Fatal(err)
		}
		f.write("again.sh", "echo\n")
		f.next()
	}
}
