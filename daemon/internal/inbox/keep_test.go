package inbox

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/internal/testenv"
	"osbuilder/pipe/effect"
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

func (f *fixture) before() time.Time { return f.cfg.Now().Add(-f.cfg.Keep) }

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
	const all, none = "log source drop", ""
	want := make(map[job.ID]string)
	for i, state := range job.States {
		want[f.kept(uint64(i), 1, state)] = all // ended ten days ago and less than an hour more
	}
	for id, j := range f.records.jobs {
		if j.State.Terminal() {
			want[id] = none
		}
	}
	want[f.kept(100, 2, job.Done)] = all // nine days ago
	want[f.kept(101, -30, job.Running)] = all
	want[f.kept(102, -30, job.Failed)] = none
	only := f.kept(103, -30, job.Done) // as an older version left it, which removed no logs
	want[only] = none
	dir := filepath.Join(f.cfg.State, "jobs", string(only))
	if err := errors.Join(os.RemoveAll(filepath.Join(dir, "source")), os.Mkdir(filepath.Join(dir, endedDir), 0o700)); err != nil {
		t.Fatal(err)
	}
	unknown := job.NewID(time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC), 1)
	f.lay(unknown) // nothing is on record of it
	want[unknown] = all
	f.write(".taken/not a job/x", "x")

	said := make(map[string]string)
	b.expire(t.Context(), f.before(), said)
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
	b.expire(t.Context(), f.before(), said)
	if n := logs.Len(); n != 1 {
		t.Errorf("it is said again: %v", logs.All())
	}
	for id, parts := range want {
		if j, ok := f.records.jobs[id]; parts == none {
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
	b.expire(t.Context(), f.before(), map[string]string{})
	if left, err := filepath.Glob(filepath.Join(dir, ".*")); len(left) > 0 || err != nil {
		t.Errorf("left: %v, %v", left, err)
	}
}

// What is being copied, to do the job again, stays until that is through.
func TestExpireWaitsForWhoCopies(t *testing.T) {
	f, b, _ := keeper(t)
	id := f.kept(1, -1, job.Done)
	b.copying.RLock()
	b.expire(t.Context(), f.before(), map[string]string{})
	if got := f.has(id); got != "log source" {
		t.Errorf("there is %q", got)
	}
	b.copying.RUnlock()
	b.expire(t.Context(), f.before(), map[string]string{})
	if got := f.has(id); got != "" {
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
	b.expire(t.Context(), f.before(), map[string]string{})
	if f.has(within) != "" {
		t.Errorf("there is %q", f.has(within))
	}
	replace(filepath.Join(f.cfg.Dir, ".taken"), elsewhere)
	b.expire(t.Context(), f.before(), map[string]string{})
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
		b.expire(t.Context(), f.before(), said)
	}
	if n := logs.FilterMessage("copies of ended jobs' drops can't be removed, trying again").Len(); n != 1 {
		t.Errorf("it is said %d times: %v", n, logs.All())
	}
	for id := range f.records.jobs {
		if got := f.has(id); got != "drop" {
			t.Errorf("there is %q", got)
		}
	}
}

// Run does so every so often, but not at once.
func TestRunExpires(t *testing.T) {
	f, b, _ := keeper(t)
	id := f.kept(1, -1, job.Done)
	b.keepEvery = time.Millisecond
	expired := make(chan struct{})
	b.step = func(step string) {
		if step == "expired" {
			b.step = nil
			close(expired)
		}
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx, f.taken) }()
	<-expired
	if got := f.has(id); got != "" {
		t.Errorf("there is %q", got)
	}
	stop()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// A clock that is put right only after the start, or put forward later on, makes
// no job older than it is.
func TestClockThatJumps(t *testing.T) {
	const day = 24 * time.Hour
	for name, tt := range map[string]struct {
		start, later time.Duration // how much the clock is wrong, at the start and soon after
		want         string
	}{
		"right":                    {0, 0, ""},
		"put forward":              {-60 * day, 0, "log source drop"},
		"far ahead":                {0, 400 * day, ""},
		"ahead until it was right": {400 * day, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			f, b, _ := keeper(t)
			old, young := f.kept(1, -1, job.Done), f.kept(2, 8, job.Done)
			synctest.Test(t, func(t *testing.T) {
				right, start := f.cfg.Now(), time.Now()
				var wrong atomic.Int64
				wrong.Store(int64(tt.start))
				b.cfg.Now = func() time.Time { return right.Add(time.Duration(wrong.Load()) + time.Since(start)) }
				ctx, stop := context.WithCancel(t.Context())
				defer stop()
				go b.keep(ctx)
				synctest.Wait()
				if got := f.has(old); got != "log source drop" {
					t.Errorf("at the start there is %q", got)
				}
				wrong.Store(int64(tt.later))
				<-time.After(3 * keepEvery / 2)
				synctest.Wait()
				if got := f.has(old); got != tt.want {
					t.Errorf("of one that ended long ago there is %q, want %q", got, tt.want)
				}
				if got := f.has(young); got != "log source drop" {
					t.Errorf("of one that ended three days ago there is %q", got)
				}
			})
		})
	}
}

// Whoever stops the daemon doesn't wait until a whole tree is removed; the next
// one goes on.
func TestExpireStopsWithin(t *testing.T) {
	f, b, logs := keeper(t)
	id := f.kept(1, -1, job.Done)
	const files = 20
	for n := range files {
		if err := os.WriteFile(filepath.Join(f.cfg.State, "jobs", string(id), "source", strconv.Itoa(n)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	left := filepath.Join(f.cfg.State, "jobs", string(id), outdated)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	effect.Hook(func(op, name string) {
		if op == "remove" && strings.HasPrefix(name, left) {
			stop()
		}
	})
	defer effect.Hook(nil)
	b.expire(ctx, f.before(), map[string]string{})
	if entries, err := os.ReadDir(left); err != nil || len(entries) != files { // and a.sh, and one that went
		t.Errorf("left: %v, %v", entries, err)
	}
	if got := f.has(id); got != "log drop" || logs.Len() > 0 {
		t.Errorf("there is %q, and it is said: %v", got, logs.All())
	}
	b.expire(t.Context(), f.before(), map[string]string{})
	if got := f.has(id); got != "" || there(left) {
		t.Errorf("there is %q", got)
	}
}

// A job whose source was removed because it ended long ago is not lost when its
// record is.
func TestWhatExpiredIsNotLost(t *testing.T) {
	f, b, logs := keeper(t)
	id, stopped, lost := f.kept(1, -1, job.Done), f.kept(2, -1, job.Done), f.kept(3, 9, job.Done)
	b.expire(t.Context(), f.before(), map[string]string{})
	dir := filepath.Join(f.cfg.State, "jobs", string(stopped))
	if err := os.Rename(filepath.Join(dir, endedDir), filepath.Join(dir, outdated)); err != nil { // it was being removed
		t.Fatal(err)
	}
	for id, want := range map[job.ID]bool{id: true, stopped: true, lost: false} {
		if Ended(f.cfg.State, id) != want {
			t.Errorf("%s counts as ended: %t", id, !want)
		}
	}
	none := func() (map[job.ID]bool, error) { return nil, nil }
	for range 2 {
		if err := b.SayLost(t.Context(), func(context.Context) (map[job.ID]bool, error) { return none() }, none); err != nil {
			t.Fatal(err)
		}
	}
	told := logs.Filter(func(e observer.LoggedEntry) bool { return e.Level == zap.WarnLevel }).All()
	if len(told) != 1 || told[0].ContextMap()["id"] != string(lost) {
		t.Errorf("%s and %s had ended, %s is lost; it is said: %v", id, stopped, lost, told)
	}
}
