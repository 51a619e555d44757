package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// AsMortal makes the test's own binary a process that restores, and stops
// itself with SIGKILL before one of its steps.
const AsMortal = "restore-until"

// RestoreUntil is that process: the store, the copy or "", the step.
func RestoreUntil(args []string) int {
	stopAt, err := strconv.Atoi(args[2])
	if err != nil {
		return 2
	}
	steps := 0
	effect.Hook(func(string, string) {
		if steps++; steps == stopAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // nothing follows
		}
	})
	if _, err := Restore(context.Background(), args[0], args[1]); err != nil { //nolint:forbidigo // this is a program of its own
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// restoreUntil reports whether the process was stopped before it was through.
func restoreUntil(t *testing.T, path, name string, step int) bool {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), os.Args[0], AsMortal, path, name, strconv.Itoa(step)).CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGKILL {
			return true
		}
	}
	if err != nil {
		t.Errorf("step %d: %v: %s", step, err, out)
	}
	return false
}

// A fallen store is what a daemon leaves that was killed: what is on record is
// only written ahead of the file, or else just the job late is. The copy has
// what was before that.
type fallen struct{ file, ahead, copied []byte }

const late = job.ID("late")

func fall(t *testing.T, justLate bool) (f fallen) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	s := filled(t, path)
	name := copyNow(t, s)
	if justLate {
		if _, err := s.db.ExecContext(t.Context(), `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Create(t.Context(), queued(late)); err != nil {
		t.Fatal(err)
	}
	for name, into := range map[string]*[]byte{path: &f.file, path + "-wal": &f.ahead, name: &f.copied} {
		var err error
		if *into, err = os.ReadFile(name); err != nil {
			t.Fatal(err)
		}
	}
	return f
}

// put lays it into a folder, and returns the store and the copy.
func (f fallen) put(t *testing.T) (path, name string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "db")
	name = filepath.Join(copiesDir(path), "db.20260102-030405")
	if err := os.Mkdir(copiesDir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{path: f.file, path + "-wal": f.ahead, name: f.copied} {
		if err := os.WriteFile(name, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path, name
}

// What is written ahead of the file counts when it is judged.
func TestRestoreSeesWhatIsWrittenAhead(t *testing.T) {
	path, _ := fall(t, false).put(t)
	if r, err := Restore(t.Context(), path, ""); err == nil {
		t.Errorf("it is sound, and was replaced: %+v", r)
	}
	s := openAt(t, path, migrations)
	if _, err := s.Get(t.Context(), late); err != nil {
		t.Error(err)
	}
	closeStore(t, s)
}

func TestRestoreKeepsWhatIsWrittenAhead(t *testing.T) {
	path, name := fall(t, true).put(t)
	r, err := Restore(t.Context(), path, name)
	if err != nil {
		t.Fatal(err)
	}
	wantKept(t, []string{r.Kept})
}

// All is written ahead: the file has no more than its name.
func TestAllIsWrittenAhead(t *testing.T) {
	f := fall(t, false)
	path, _ := f.put(t)
	if err := errors.Join(os.Truncate(path, 0), os.RemoveAll(copiesDir(path))); err != nil {
		t.Fatal(err)
	}
	if s, err := open(t.Context(), path, migrations); err == nil {
		closeStore(t, s)
		t.Error("opened, and what was written ahead is gone")
	} else if len(hint.Of(err)) == 0 {
		t.Errorf("nothing to do about: %v", err)
	}
	if ahead, err := os.ReadFile(path + "-wal"); err != nil || !bytes.Equal(ahead, f.ahead) {
		t.Errorf("what was written ahead is not as it was: %v", err)
	}
}

// wantKept checks that one of the files set aside has everything.
func wantKept(t *testing.T, kept []string) {
	t.Helper()
	for _, name := range kept {
		s := openAt(t, name, migrations)
		n := len(list(t, s))
		closeStore(t, s)
		if n == len(job.States)+1 {
			return
		}
	}
	t.Errorf("none of %v has everything", kept)
}

// Killed before any of its steps, restoring is repeated by the same command,
// and nothing is lost, also if somebody tries to start the daemon in between:
// that gets the old records or the new ones, whole, or is told what to do.
func TestRestoreStoppedAnywhere(t *testing.T) {
	whole := fall(t, true)
	emptied, cut := whole, whole
	emptied.file = nil
	cut.file, cut.ahead = whole.file[:8192], []byte("of the damaged one")
	for _, tt := range []struct {
		name   string
		fallen fallen
		named  bool // the copy is
		kept   func(t *testing.T, path string)
	}{
		{"sound, back to a copy", whole, true, func(t *testing.T, path string) { wantKept(t, databases(asides(path, ""))) }},
		{"emptied, all written ahead", emptied, false, func(t *testing.T, path string) {
			for _, name := range asides(path, "-wal") {
				if ahead, err := os.ReadFile(name); err == nil && bytes.Equal(ahead, whole.ahead) {
					return
				}
			}
			t.Error("what was written ahead is lost")
		}},
		{"cut", cut, false, func(t *testing.T, path string) {
			if kept, err := os.ReadFile(lastAside(path)); err != nil || !bytes.Equal(kept, cut.file) {
				t.Errorf("the damaged file is not kept: %v", err)
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for n := 1; ; n++ {
				path, name := tt.fallen.put(t)
				if !tt.named {
					name = ""
				}
				if !restoreUntil(t, path, name, n) {
					if n < 10 {
						t.Errorf("only %d steps were seen", n-1)
					}
					return
				}
				startInBetween(t, path, n)
				// Without a name it refuses where it had come to its end: what is there then, is looked at below.
				if _, err := Restore(t.Context(), path, name); err != nil && tt.named {
					t.Errorf("stopped before step %d, and done again: %v", n, err)
				}
				tt.kept(t, path)
				s := openAt(t, path, migrations)
				if got := list(t, s); len(got) != len(job.States) {
					t.Errorf("stopped before step %d: %d jobs", n, len(got))
				}
				closeStore(t, s)
				if left, _ := filepath.Glob(path + ".restoring*"); len(left) > 0 {
					t.Errorf("stopped before step %d: left: %v", n, left)
				}
			}
		})
	}
}

// What a restoring left that was broken off before it touched the store is of
// no use once the store was opened, and would mislead when that is missing one day.
func TestSoundStoreForgetsRestoring(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	closeStore(t, openAt(t, path, migrations))
	for _, name := range []string{".restoring", ".restoring.tmp", ".restoring.tmp-journal"} {
		if err := os.WriteFile(path+name, []byte("a copy"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	away := path + "-away"
	if err := os.Rename(path, away); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t.Context(), path, migrations); err == nil || !strings.Contains(err.Error(), "restoring it was broken off") {
		t.Errorf("without the file: %v", err)
	}
	if !fileExists(path + ".restoring") {
		t.Error("what is to come into its place is gone")
	}
	if err := os.Rename(away, path); err != nil {
		t.Fatal(err)
	}
	closeStore(t, openAt(t, path, migrations))
	if left, err := filepath.Glob(path + ".restoring*"); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// startInBetween starts a daemon, at every other step: it changes the files.
func startInBetween(t *testing.T, path string, n int) {
	t.Helper()
	if n%2 == 0 {
		return
	}
	s, err := open(t.Context(), path, migrations)
	if err != nil {
		if len(hint.Of(err)) == 0 {
			t.Errorf("stopped before step %d: nothing to do about: %v", n, err)
		}
		return
	}
	defer closeStore(t, s)
	got := list(t, s)
	_, old := got[late]
	if want := len(job.States); old && len(got) != want+1 || !old && (len(got) != want || s.Restored().IsZero()) {
		t.Errorf("stopped before step %d: it starts with %d jobs, the last one among them: %t", n, len(got), old)
	}
}
