package inbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/testenv"
)

// keeper is an Inbox that keeps copies for ten days, on the eleventh of May.
func keeper(t *testing.T) (f *fixture, b *Inbox, logs *observer.ObservedLogs) {
	t.Helper()
	f = newFixture(t)
	f.cfg.Keep = 10 * 24 * time.Hour
	f.cfg.Now = func() time.Time { return time.Date(2026, 5, 11, 0, 0, 0, 0, time.UTC) }
	core, logs := observer.New(zap.DebugLevel)
	return f, New(f.cfg, f.records, zap.New(core)), logs
}

// kept records a job of that day, with all that is kept of its drop.
func (f *fixture) kept(n uint64, day int, state job.State) job.ID {
	f.t.Helper()
	at := time.Date(2026, 5, day, -1, 0, 0, 0, time.UTC)
	id := job.NewID(at.AddDate(0, 0, -3), n)
	f.records.jobs[id] = job.Job{ID: id, Name: "a", Drop: "a.sh", Recipe: job.RecipeScript, Entry: "a.sh", State: state, Updated: at}
	f.lay(id)
	return id
}

func (f *fixture) lay(id job.ID) {
	f.t.Helper()
	for _, name := range []string{
		filepath.Join(f.cfg.State, "jobs", string(id), "build.log"),
		filepath.Join(f.cfg.State, "jobs", string(id), "source", "a.sh"),
		filepath.Join(f.cfg.Dir, ".taken", string(id), "a.sh"),
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte("true\n"), 0o644)); err != nil {
			f.t.Fatal(err)
		}
	}
}

// has are the parts of what is kept of a job that are there.
func (f *fixture) has(id job.ID) string {
	var parts []string
	for _, p := range []struct{ part, name string }{
		{"log", filepath.Join(f.cfg.State, "jobs", string(id), "build.log")},
		{"source", filepath.Join(f.cfg.State, "jobs", string(id), "source")},
		{"drop", filepath.Join(f.cfg.Dir, ".taken", string(id))},
	} {
		if there(p.name) {
			parts = append(parts, p.part)
		}
	}
	return strings.Join(parts, " ")
}

func TestCopiesOfEndedJobsExpire(t *testing.T) {
	f, b, logs := keeper(t)
	const all, log = "log source drop", "log"
	want := make(map[job.ID]string)
	for i, state := range job.States {
		want[f.kept(uint64(i), 1, state)] = all // ended ten days ago and less than an hour more
	}
	for id, j := range f.records.jobs {
		if j.State.Terminal() {
			want[id] = log
		}
	}
	want[f.kept(100, 2, job.Done)] = all // nine days ago
	want[f.kept(101, -30, job.Running)] = all
	want[f.kept(102, -30, job.Failed)] = log
	unknown := job.NewID(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), 1)
	f.lay(unknown) // nothing is on record of it
	want[unknown] = all
	f.write(".taken/not a job/x", "x")

	said := make(map[string]string)
	b.expire(t.Context(), said)
	got := make(map[job.ID]string)
	for id := range want {
		got[id] = f.has(id)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if !there(f.cfg.Dir, ".taken", "not a job", "x") {
		t.Error("what is no job's is gone")
	}
	if n := logs.Len(); n != 1 {
		t.Errorf("it is said: %v", logs.All())
	}
	b.expire(t.Context(), said)
	if n := logs.Len(); n != 1 {
		t.Errorf("it is said again: %v", logs.All())
	}
	for id, parts := range want {
		if j, ok := f.records.jobs[id]; parts == log {
			if _, err := b.Again(t.Context(), j); !ok || err == nil || !strings.Contains(err.Error(), "its source is not there any more") {
				t.Errorf("done again: %v", err)
			}
		}
	}
}

// Stopped while it removes, it goes on: half a source is nobody's source.
func TestExpireStoppedHalfway(t *testing.T) {
	f, b, _ := keeper(t)
	id := f.kept(1, -1, job.Done)
	dir := filepath.Join(f.cfg.State, "jobs", string(id))
	if err := os.Rename(filepath.Join(dir, "source"), filepath.Join(dir, outdated)); err != nil {
		t.Fatal(err)
	}
	b.expire(t.Context(), map[string]string{})
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// What is being copied, to do the job again, stays until that is through.
func TestExpireWaitsForWhoCopies(t *testing.T) {
	f, b, _ := keeper(t)
	id := f.kept(1, -1, job.Done)
	b.copying.RLock()
	b.expire(t.Context(), map[string]string{})
	if got := f.has(id); got != "log source" {
		t.Errorf("there is %q", got)
	}
	b.copying.RUnlock()
	b.expire(t.Context(), map[string]string{})
	if got := f.has(id); got != "log" {
		t.Errorf("there is %q", got)
	}
}

// Links lead nowhere: what they point at stays, whatever they are called.
func TestExpireFollowsNoLinks(t *testing.T) {
	f, b, logs := keeper(t)
	id := f.kept(1, -1, job.Done)
	within := f.kept(2, -1, job.Done)
	elsewhere := t.TempDir()
	precious := filepath.Join(elsewhere, string(id), "precious")
	if err := errors.Join(os.Mkdir(filepath.Dir(precious), 0o755), os.WriteFile(precious, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	replace := func(name, target string) {
		if err := errors.Join(os.RemoveAll(name), os.Symlink(target, name)); err != nil {
			t.Fatal(err)
		}
	}
	replace(filepath.Join(f.cfg.State, "jobs", string(id), "source"), filepath.Dir(precious))
	replace(filepath.Join(f.cfg.Dir, ".taken", string(id)), filepath.Dir(precious))
	replace(filepath.Join(f.cfg.Dir, ".taken", string(within), "a.sh"), precious) // in what is removed
	b.expire(t.Context(), map[string]string{})
	if f.has(within) != "log" {
		t.Errorf("there is %q", f.has(within))
	}
	replace(filepath.Join(f.cfg.Dir, ".taken"), elsewhere)
	b.expire(t.Context(), map[string]string{})
	if !there(precious) {
		t.Error("a link was followed")
	}
	if n := logs.FilterMessage("copies of ended jobs' drops can't be removed, trying again").Len(); n != 1 {
		t.Errorf("it is said %d times", n)
	}
}

// A jobs folder that can't be written is said once.
func TestExpireOnAReadOnlyMount(t *testing.T) {
	f, b, logs := keeper(t)
	for n := range uint64(3) {
		f.kept(n, -1, job.Done)
	}
	if err := unix.Mount(f.cfg.Dir, f.cfg.Dir, "", unix.MS_BIND, ""); err != nil {
		testenv.Lacks(t, "nothing can be mounted here: %v", err)
	}
	defer func() {
		if err := unix.Unmount(f.cfg.Dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := unix.Mount("", f.cfg.Dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		testenv.Lacks(t, "nothing can be mounted here: %v", err)
	}
	said := make(map[string]string)
	for range 3 {
		b.expire(t.Context(), said)
	}
	if n := logs.FilterMessage("copies of ended jobs' drops can't be removed, trying again").Len(); n != 1 {
		t.Errorf("it is said %d times: %v", n, logs.All())
	}
	for id := range f.records.jobs {
		if got := f.has(id); got != "log drop" {
			t.Errorf("there is %q", got)
		}
	}
}

// Run does so when it begins.
func TestRunExpires(t *testing.T) {
	f, b, _ := keeper(t)
	id := f.kept(1, -1, job.Done)
	expired := make(chan struct{})
	b.step = func(step string) {
		if step == "expired" {
			close(expired)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, f.taken) }()
	<-expired
	if got := f.has(id); got != "log" {
		t.Errorf("there is %q", got)
	}
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}
