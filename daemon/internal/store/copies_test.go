package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// filled returns a store with a job in each state.
func filled(t *testing.T, path string) *SQLite {
	t.Helper()
	s := openAt(t, path, migrations)
	for _, state := range job.States {
		j := queued(job.ID(state))
		j.State, j.Attempt = state, 1
		if _, err := s.Create(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func closeStore(t *testing.T, s *SQLite) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func copyNow(t *testing.T, s *SQLite) string {
	t.Helper()
	name, err := s.Copy(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return name
}

func list(t *testing.T, s *SQLite) map[job.ID]job.Job {
	t.Helper()
	jobs, damaged, err := s.List(t.Context(), "", 1000)
	if err != nil || len(damaged) > 0 {
		t.Fatal(damaged, err)
	}
	all := make(map[job.ID]job.Job)
	for _, j := range jobs {
		all[j.ID] = j
	}
	return all
}

// The names are times to the second, and the clock is a test's.
func TestCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "db")
		s := openAt(t, path, migrations)
		defer closeStore(t, s)
		core, logs := observer.New(zapcore.DebugLevel)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		run := func() { done <- s.Run(ctx, zap.New(core)) }
		go run()
		count := func() int {
			synctest.Wait()
			return logs.FilterMessage("records copied").Len()
		}
		if n := count(); n != 1 {
			t.Errorf("%d copies when it begins", n)
		}
		time.Sleep(3 * copyEvery) //nolint:forbidigo // the bubble's clock
		if n := count(); n != 1 {
			t.Errorf("%d copies of what doesn't change", n)
		}
		for n := range 2 * keepCopies {
			if _, err := s.Create(t.Context(), queued(job.ID(fmt.Sprint("job-", n)))); err != nil {
				t.Fatal(err)
			}
			time.Sleep(copyEvery) //nolint:forbidigo // as above
			if got := count(); got != n+2 {
				t.Errorf("%d copies after %d changes", got, n+1)
			}
		}
		// Started again and again it makes no more of them, until some time is over.
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		before := Copies(path)
		ctx, cancel = context.WithCancel(t.Context())
		go run()
		n := count()
		time.Sleep(copyGap - time.Minute) //nolint:forbidigo // as above
		if got := count(); got != n {
			t.Error("copied again at once")
		}
		time.Sleep(2 * time.Minute) //nolint:forbidigo // as above
		if got := count(); got != n+1 {
			t.Errorf("%d copies, want %d", got, n+1)
		}
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if len(before) != keepCopies || len(Copies(path)) != keepCopies {
			t.Errorf("%d and then %d copies, want %d", len(before), len(Copies(path)), keepCopies)
		}
		for i, c := range Copies(path) {
			if i > 0 && !c.Time.Before(Copies(path)[i-1].Time) {
				t.Error("not the newest first")
			}
			if err := checkCopy(t.Context(), c.Path); err != nil {
				t.Error(err)
			}
		}
	})
}

// stamped gives a copy the name of one that was made at a time.
func stamped(t *testing.T, name string, at time.Time) string {
	t.Helper()
	to := strings.TrimSuffix(name, filepath.Ext(name)) + "." + at.UTC().Format(copyStamp)
	if err := os.Rename(name, to); err != nil {
		t.Fatal(err)
	}
	return to
}

// Copies from when the clock was ahead are neither taken for the newest, nor
// kept instead of those that come after them.
func TestCopiesFromWhenTheClockWasAhead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := openAt(t, path, migrations)
	for n := range keepCopies {
		stamped(t, copyNow(t, s), time.Now().AddDate(5, 0, n))
	}
	if _, err := s.Create(t.Context(), queued("later")); err != nil {
		t.Fatal(err)
	}
	made := copyNow(t, s)
	copies := Copies(path)
	if len(copies) != keepCopies || copies[0].Path != made {
		t.Fatalf("there are %v, and %s was made", copies, made)
	}
	for i, c := range copies[1:] {
		if want := time.Now().AddDate(5, 0, keepCopies-1-i); c.Time.Sub(want).Abs() > time.Hour {
			t.Errorf("copy %d is of %v, want %v", i+1, c.Time, want)
		}
	}
	closeStore(t, s)
	if err := os.Truncate(path, 8192); err != nil {
		t.Fatal(err)
	}
	if r, err := Restore(t.Context(), path, ""); err != nil || r.From != made {
		t.Fatalf("%+v, %v", r, err)
	}
	s = openAt(t, path, migrations)
	if _, there := list(t, s)["later"]; !there {
		t.Error("what was recorded last is not there")
	}
}

// A copy that can't be made is said, and leaves nothing.
func TestCopyFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := openAt(t, path, migrations)
	if err := os.WriteFile(copiesDir(path), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if name, err := s.Copy(t.Context()); err == nil {
		t.Errorf("copied to %s", name)
	}
	if err := os.Remove(copiesDir(path)); err != nil {
		t.Fatal(err)
	}
	copyNow(t, s)
	if left, err := filepath.Glob(filepath.Join(copiesDir(path), "*")); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A copy in the place of the store is noticed, once: what had not ended is
// marked, with the reason in its story.
func TestRestoredJobsAreMarked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := filled(t, path)
	before := list(t, s)
	name := copyNow(t, s)
	for _, j := range before { // and all goes on
		j.Why = "later"
		if _, err := s.Update(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	if !s.Restored().IsZero() {
		t.Error("the store itself counts as a copy")
	}
	closeStore(t, s)
	if r, err := Restore(t.Context(), path, name); err != nil || r.From != name || !fileExists(r.Kept) {
		t.Fatalf("%+v, %v", r, err)
	}
	s = openAt(t, path, migrations)
	if age := time.Since(s.Restored()); age < 0 || age > time.Minute {
		t.Errorf("restored from %v", s.Restored())
	}
	for id, j := range list(t, s) {
		was := before[id]
		switch {
		case j.Why != "":
			t.Errorf("%s is not that of the copy", id)
		case was.State.Terminal():
			if diff := cmp.Diff(was, j); diff != "" {
				t.Errorf("%s has ended, and changed: %s", id, diff)
			}
		case !j.Restored || j.Attempt != 1 || len(j.History) != 1 || j.History[0].Event != job.Restored || !strings.Contains(j.History[0].Reason, "from the copy of 20"):
			t.Errorf("%s: %+v", id, j)
		case j.State != job.Queued && was.State != job.Collecting:
			t.Errorf("%s is %s", id, j.State)
		}
	}
	owner, err := s.Owner(t.Context())
	closeStore(t, s)
	s = openAt(t, path, migrations)
	if again, err2 := s.Owner(t.Context()); err != nil || err2 != nil || again != owner || !s.Restored().IsZero() {
		t.Errorf("owner %q and %q, %v, %v; restored %v", owner, again, err, err2, s.Restored())
	}
}

// spoil are the ways in which the file is found unusable.
var spoil = map[string]func(path string) error{
	"garbage": func(path string) error { return os.WriteFile(path, bytes.Repeat([]byte("garbage\n"), 4096), 0o600) },
	"cut":     func(path string) error { return os.Truncate(path, 8192) },
	"empty":   func(path string) error { return os.Truncate(path, 0) },
	"gone":    os.Remove,
	"page of zeros": func(path string) error {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(make([]byte, 4096), 4096)
		return errors.Join(err, f.Close())
	},
}

var copyNamed = regexp.MustCompile(`The newest sound copy is (\S+), of [0-9: -]+ UTC`)

// The error names the newest sound copy and what to type; typed, it works.
func TestFollowTheMessage(t *testing.T) {
	for name, damage := range spoil {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "db")
			s := filled(t, path)
			sound := stamped(t, copyNow(t, s), time.Now().Add(-time.Hour))
			// A newer one that is no good is not named.
			bad := filepath.Join(copiesDir(path), "db."+time.Now().UTC().Format(copyStamp))
			if err := os.WriteFile(bad, []byte("nothing"), 0o600); err != nil {
				t.Fatal(err)
			}
			want := list(t, s)
			closeStore(t, s)
			if err := damage(path); err != nil {
				t.Fatal(err)
			}
			was, err := os.ReadFile(path)
			if err != nil && name != "gone" {
				t.Fatal(err)
			}
			s, err = open(t.Context(), path, migrations)
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			text := strings.Join(hint.Of(err), "\n")
			named := copyNamed.FindStringSubmatch(text)
			if named == nil || named[1] != sound || !strings.Contains(text, "docker compose run --rm --no-deps sidecar restore &&") {
				t.Fatalf("the hint is %q", text)
			}
			r, err := Restore(t.Context(), path, "")
			if err != nil || r.From != sound {
				t.Fatalf("%+v, %v", r, err)
			}
			if kept, err := os.ReadFile(r.Kept); name != "gone" && (err != nil || !bytes.Equal(kept, was)) {
				t.Errorf("the damaged file is not kept: %v", err)
			}
			s = openAt(t, path, migrations)
			if s.Restored().IsZero() || len(list(t, s)) != len(want) {
				t.Errorf("restored %v, %d jobs, want %d", s.Restored(), len(list(t, s)), len(want))
			}
			if !fileExists(sound) {
				t.Error("the copy is gone")
			}
		})
	}
}

// Without any copy the message says how to begin anew.
func TestBeginAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	closeStore(t, filled(t, path))
	if err := os.Truncate(path, 8192); err != nil {
		t.Fatal(err)
	}
	_, err := open(t.Context(), path, migrations)
	if text := strings.Join(hint.Of(err), "\n"); err == nil || !strings.Contains(text, "sidecar restore --empty &&") {
		t.Fatalf("%v, %q", err, text)
	}
	if _, err := Restore(t.Context(), path, ""); err == nil || len(hint.Of(err)) == 0 {
		t.Errorf("restored from nothing: %v", err)
	}
	if r, err := RestoreEmpty(t.Context(), path); err != nil || r.From != "" || !fileExists(r.Kept) {
		t.Fatalf("%+v, %v", r, err)
	}
	s := openAt(t, path, migrations)
	if len(list(t, s)) != 0 || !s.Restored().IsZero() {
		t.Error("it is not empty")
	}
}

func TestRestoreRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := filled(t, path)
	name := copyNow(t, s)
	for what, refused := range map[string]func() (Restoring, error){
		"while it is in use":             func() (Restoring, error) { return Restore(t.Context(), path, name) },
		"to nothing, while it is in use": func() (Restoring, error) { return RestoreEmpty(t.Context(), path) },
	} {
		if _, err := refused(); !errors.Is(err, errHeld) || len(hint.Of(err)) == 0 {
			t.Errorf("%s: %v", what, err)
		}
	}
	closeStore(t, s)
	for what, refused := range map[string]func() (Restoring, error){
		"what is sound":            func() (Restoring, error) { return Restore(t.Context(), path, "") },
		"what is sound to nothing": func() (Restoring, error) { return RestoreEmpty(t.Context(), path) },
		"what is no copy":          func() (Restoring, error) { return Restore(t.Context(), path, filepath.Join("testdata", "v1.json")) },
		"what is not there":        func() (Restoring, error) { return Restore(t.Context(), path, path+".none") },
	} {
		if r, err := refused(); err == nil {
			t.Errorf("%s: restored %+v", what, r)
		}
	}
	if got := list(t, openAt(t, path, migrations)); len(got) != len(job.States) {
		t.Errorf("%d jobs", len(got))
	}
}

// Files that earlier code left don't say that they are copies; put in place,
// they count as such.
func TestRestoreOfAnEarlierVersion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	closeStore(t, filled(t, path))
	if _, err := Restore(t.Context(), path, filepath.Join("testdata", "v1.db")); err != nil {
		t.Fatal(err)
	}
	s := openAt(t, path, migrations)
	waiting := 0
	for _, j := range list(t, s) {
		if j.Restored {
			waiting++
		}
	}
	if s.Restored().IsZero() || waiting != 5 {
		t.Errorf("restored %v, %d of its jobs are marked", s.Restored(), waiting)
	}
}

// One bit flips, anywhere in the file: the store is refused, with what to do,
// or says which records are damaged; all others are as they were.
func TestFlippedBits(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "db")
	s := filled(t, path)
	for n := range 40 { // several pages of them
		j := queued(job.ID(fmt.Sprint("more-", n)))
		j.Why = strings.Repeat("why ", 50)
		if _, err := s.Create(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	want := list(t, s)
	closeStore(t, s)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	var refused, set, mended, same int
	for range 100 {
		at, bit := random.IntN(len(whole)), byte(1)<<random.IntN(8)
		spoilt := bytes.Clone(whole)
		spoilt[at] ^= bit
		if err := errors.Join(os.WriteFile(path, spoilt, 0o600), removeIfThere(path+"-wal"), removeIfThere(path+"-shm")); err != nil {
			t.Fatal(err)
		}
		s, err := open(t.Context(), path, migrations)
		if err != nil {
			if len(hint.Of(err)) == 0 {
				t.Errorf("byte %d, bit %#x: nothing to do about: %v", at, bit, err)
			}
			refused++
			continue
		}
		jobs, damaged, err := s.List(t.Context(), "", 1000)
		if err != nil {
			t.Errorf("byte %d, bit %#x: %v", at, bit, err)
		}
		unsettled, more, err := s.Unsettled(t.Context())
		if err != nil {
			t.Errorf("byte %d, bit %#x: %v", at, bit, err)
		}
		damaged = append(damaged, more...)
		open := 0
		for _, j := range jobs {
			if diff := cmp.Diff(want[j.ID], j); diff != "" {
				t.Errorf("byte %d, bit %#x: a record changed without a word: %s", at, bit, diff)
			}
			if !j.Settled() {
				open++
			}
		}
		if len(jobs)+len(damaged) != len(want) || len(unsettled) != open {
			t.Errorf("byte %d, bit %#x: %d jobs and %d damaged of %d; %d of %d unsettled", at, bit, len(jobs), len(damaged), len(want), len(unsettled), open)
		}
		switch {
		case len(damaged) > 0:
			set++
		case s.mended != "":
			mended++
		default:
			same++
		}
		closeStore(t, s)
	}
	t.Logf("%d refused, %d with records set aside, %d with indexes made anew, %d as before", refused, set, mended, same)
	if refused == 0 || set == 0 || mended == 0 || same == 0 {
		t.Error("the sample is too small")
	}
}

// A copy that doesn't come to its end, as on a slow disk, holds up neither
// those who read nor those who write.
func TestCopyHoldsUpNobody(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := filled(t, path)
	before := list(t, s)
	// SQLite waits as it opens the file that the copy goes to, for as long as
	// somebody has a lease on that.
	begun := make(chan *os.File, 1)
	effect.Hook(func(op, name string) {
		if op != "write" || !strings.HasSuffix(name, ".tmp") {
			return
		}
		f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err == nil {
			_, err = unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		}
		if err != nil {
			t.Error(err)
		}
		begun <- f
	})
	defer effect.Hook(nil)
	copied := make(chan error, 1)
	go func() {
		_, err := s.Copy(t.Context())
		copied <- err
	}()
	leased := <-begun
	bound, cancel := context.WithTimeout(t.Context(), 20*time.Second) // less than the kernel waits for the lease
	defer cancel()
	// The copy is there when the lease is asked to be given back.
	for kind := unix.F_WRLCK; kind == unix.F_WRLCK && bound.Err() == nil; runtime.Gosched() {
		var err error
		if kind, err = unix.FcntlInt(leased.Fd(), unix.F_GETLEASE, 0); err != nil {
			t.Fatal(err)
		}
	}
	for _, j := range before {
		j.Why = "written beside the copy"
		if _, err := s.Update(bound, j); err != nil {
			t.Errorf("update: %v", err)
		}
	}
	if _, err := s.Create(bound, queued("created")); err != nil {
		t.Errorf("create: %v", err)
	}
	if err := s.SaveCheckpoint(bound, "vm", job.Checkpoint{}); err != nil {
		t.Errorf("checkpoint: %v", err)
	}
	if _, err := s.Get(bound, "created"); err != nil {
		t.Errorf("read: %v", err)
	}
	select {
	case err := <-copied:
		t.Errorf("the copy was not held: %v", err)
		copied <- err
	default:
	}
	if err := leased.Close(); err != nil { // gives the lease back
		t.Fatal(err)
	}
	if err := <-copied; err != nil {
		t.Error(err)
	}
}
