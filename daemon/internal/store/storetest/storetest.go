// Package storetest is what every store must do, as a test suite.
package storetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
	"osbuilder/pipe"
)

// Store is what the suite holds an implementation to.
type Store interface {
	Create(ctx context.Context, j job.Job) (job.Job, error)
	CreateAll(ctx context.Context, jobs []job.Job) ([]job.Job, error)
	Get(ctx context.Context, id job.ID) (job.Job, error)
	Update(ctx context.Context, j job.Job) (job.Job, error)
	Unsettled(ctx context.Context) ([]job.Job, []store.Damaged, error)
	List(ctx context.Context, after job.ID, limit int) ([]job.Job, []store.Damaged, error)
	IDs(ctx context.Context) (map[job.ID]bool, error)
	Named(ctx context.Context, name string, limit int) ([]job.Job, []store.Damaged, error)
	FindDrop(ctx context.Context, key string) (job.ID, error)
	Owner(ctx context.Context) (string, error)
	Checkpoint(ctx context.Context, builder string) (job.Checkpoint, error)
	SaveCheckpoint(ctx context.Context, builder string, c job.Checkpoint) error
	Close() error
}

// Run runs the suite. open opens the store that lies in dir, and makes it the
// first time.
func Run(t *testing.T, open func(t *testing.T, dir string) Store) {
	for _, tt := range []struct {
		name string
		test func(t *testing.T, s Store, reopen func() Store)
	}{
		{"a job comes back as it was", testRoundTrip},
		{"what is absent is not found", testNotFound},
		{"an ID is taken once", testCreateTwice},
		{"a drop becomes one job", testDrop},
		{"many jobs are recorded, or none of them", testCreateAll},
		{"a malformed job is refused", testMalformed},
		{"an update replaces what was read, and nothing else", testUpdate},
		{"of many updates of one revision one wins", testRace},
		{"unsettled jobs are those with something left to do", testUnsettled},
		{"pages cover everything once", testList},
		{"jobs are found by name, the youngest first", testNamed},
		{"the owner's id lasts", testOwner},
		{"checkpoints last, each builder's its own", testCheckpoint},
		{"a context that is over ends a call", testCancelled},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			t.Cleanup(func() { _ = s.Close() })
			tt.test(t, s, func() Store {
				t.Helper()
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				s = open(t, dir)
				return s
			})
		})
	}
}

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 678, time.UTC)

// Job returns a valid job, the nth in order of ID, in the given state.
func Job(n int, state job.State) job.Job {
	at := epoch.Add(time.Duration(n) * time.Second)
	return job.Job{
		ID:      job.NewID(at, uint64(n)),
		Name:    fmt.Sprintf("image-%d", n),
		Drop:    fmt.Sprintf("image-%d.sh", n),
		DropKey: fmt.Sprintf("drop-%d", n),
		Recipe:  job.RecipeScript,
		Entry:   fmt.Sprintf("image-%d.sh", n),
		State:   state,
		Created: at,
		Updated: at,
		Timeout: 90 * time.Minute,
		History: []job.Step{{Time: at, Event: job.Created, State: job.Queued}},
	}
}

func mustCreate(t *testing.T, s Store, j job.Job) job.Job {
	t.Helper()
	created, err := s.Create(t.Context(), j)
	if err != nil {
		t.Fatal(err)
	}
	return created
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want one that is %q", err, want)
	}
}

func testRoundTrip(t *testing.T, s Store, reopen func() Store) {
	want := Job(1, job.Done)
	code := 0
	want.Why = "disk of the VM is full: 3 % left"
	want.Builder = "vm"
	want.Priority = -7
	want.Cancel = &job.CancelWish{Time: epoch.Add(time.Second), Reason: "not wanted"}
	want.RetryOf = Job(0, job.Queued).ID
	want.Inputs = &job.Inputs{SHA256: "00", Size: 1 << 40}
	want.NixOS = &job.NixOS{Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05"}
	want.Runner = "0.1.0"
	for _, e := range job.Events { // the whole story
		want.History = append(want.History, job.Step{Time: epoch, Event: e, State: job.Running, Attempt: 2, Reason: "because: \x00 ü\n"})
	}
	want.Attempt = 2
	want.Started = epoch.Add(time.Minute)
	want.Artifacts = []pipe.Artifact{{Name: "a/b ü\n.iso", Path: "/data/x", Size: 1 << 40, SHA256: "00", Download: "scp …"}}
	want.Result = &pipe.Finished{Status: pipe.StatusSucceeded, ExitCode: &code, Duration: 5, LogLength: 7, Artifacts: 1}
	want.Image = "debian-13-0123456789ab"
	want.Output = "image-1/" + string(want.ID)
	want.Acknowledged = true
	created := mustCreate(t, s, want)
	if created.Revision == 0 {
		t.Error("a record has no revision")
	}
	want.Revision = created.Revision
	for _, when := range []string{"at once", "after opening it again"} {
		got, err := s.Get(t.Context(), want.ID)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
		s = reopen()
	}
}

func testNotFound(t *testing.T, s Store, _ func() Store) {
	_, err := s.Get(t.Context(), "no-such-job")
	wantError(t, err, store.ErrNotFound)
	_, err = s.Update(t.Context(), Job(1, job.Queued))
	wantError(t, err, store.ErrNotFound)
	_, err = s.FindDrop(t.Context(), "no-such-drop")
	wantError(t, err, store.ErrNotFound)
	jobs, damaged, err := s.Unsettled(t.Context())
	if len(jobs) != 0 || len(damaged) != 0 || err != nil {
		t.Errorf("an empty store has %v, %v, %v", jobs, damaged, err)
	}
}

func testCreateTwice(t *testing.T, s Store, _ func() Store) {
	j := mustCreate(t, s, Job(1, job.Queued))
	again := Job(1, job.Queued)
	again.DropKey = "another"
	_, err := s.Create(t.Context(), again)
	wantError(t, err, store.ErrExists)
	// What was refused left nothing behind.
	_, err = s.FindDrop(t.Context(), "another")
	wantError(t, err, store.ErrNotFound)
	got, err := s.Get(t.Context(), j.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(j, got); diff != "" {
		t.Error(diff)
	}
}

func testDrop(t *testing.T, s Store, reopen func() Store) {
	first := mustCreate(t, s, Job(1, job.Queued))
	s = reopen()
	again := Job(2, job.Queued)
	again.DropKey = first.DropKey
	_, err := s.Create(t.Context(), again)
	wantError(t, err, store.ErrExists)
	_, err = s.Get(t.Context(), again.ID)
	wantError(t, err, store.ErrNotFound)
	id, err := s.FindDrop(t.Context(), first.DropKey)
	if err != nil || id != first.ID {
		t.Errorf("the drop led to %q, %v; want %q", id, err, first.ID)
	}
	for n := range 2 { // jobs that came from no drop don't clash
		j := Job(10+n, job.Queued)
		j.DropKey = ""
		mustCreate(t, s, j)
	}
}

func testCreateAll(t *testing.T, s Store, _ func() Store) {
	jobs := []job.Job{Job(1, job.Queued), Job(2, job.Queued), Job(3, job.Queued)}
	made, err := s.CreateAll(t.Context(), jobs)
	if err != nil || len(made) != len(jobs) {
		t.Fatalf("%d of %d jobs recorded: %v", len(made), len(jobs), err)
	}
	for i, want := range made {
		if want.ID != jobs[i].ID || want.Revision == 0 {
			t.Errorf("record %d is of job %s, revision %d", i, want.ID, want.Revision)
		}
		got, err := s.Get(t.Context(), want.ID)
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v: %s", err, diff)
		}
	}
	malformed := Job(6, job.Queued)
	malformed.ID = "../x"
	taken := Job(6, job.Queued)
	taken.DropKey = jobs[1].DropKey
	for _, bad := range []job.Job{jobs[0], malformed, taken} {
		if _, err := s.CreateAll(t.Context(), []job.Job{Job(4, job.Queued), bad, Job(5, job.Queued)}); err == nil {
			t.Errorf("recorded with job %s among them", bad.ID)
		}
	}
	for _, n := range []int{4, 5, 6} {
		_, err := s.Get(t.Context(), Job(n, job.Queued).ID)
		wantError(t, err, store.ErrNotFound)
	}
	if made, err := s.CreateAll(t.Context(), nil); len(made) != 0 || err != nil {
		t.Errorf("no jobs: %v, %v", made, err)
	}
}

func testMalformed(t *testing.T, s Store, _ func() Store) {
	for _, change := range []func(*job.Job){
		func(j *job.Job) { j.ID = "" },
		func(j *job.Job) { j.ID = "../up" },
		func(j *job.Job) { j.State = "" },
		func(j *job.Job) { j.State = "asleep" },
	} {
		j := Job(1, job.Queued)
		change(&j)
		if _, err := s.Create(t.Context(), j); err == nil {
			t.Errorf("recorded ID %q, state %q", j.ID, j.State)
		}
	}
	good := mustCreate(t, s, Job(1, job.Queued))
	bad := good
	bad.State = "asleep"
	if _, err := s.Update(t.Context(), bad); err == nil {
		t.Error("updated to an unknown state")
	}
}

func testUpdate(t *testing.T, s Store, _ func() Store) {
	first := mustCreate(t, s, Job(1, job.Queued))
	second, err := first.Apply(job.Claimed, epoch.Add(time.Hour), "slot free")
	if err != nil {
		t.Fatal(err)
	}
	second, err = s.Update(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	if second.Revision == first.Revision {
		t.Error("the revision did not change")
	}
	stale := first
	stale.Name = "stale"
	_, err = s.Update(t.Context(), stale)
	wantError(t, err, store.ErrConflict)
	got, err := s.Get(t.Context(), first.ID)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(second, got); diff != "" {
		t.Error(diff)
	}
}

func testRace(t *testing.T, s Store, _ func() Store) {
	j := mustCreate(t, s, Job(1, job.Queued))
	const rivals = 8
	results := make([]error, rivals)
	var group sync.WaitGroup
	for n := range rivals {
		group.Go(func() {
			mine := j
			mine.Builder = fmt.Sprintf("vm-%d", n)
			_, results[n] = s.Update(t.Context(), mine)
		})
	}
	group.Wait()
	won := -1
	for n, err := range results {
		switch {
		case err == nil && won >= 0:
			t.Errorf("both %d and %d won", won, n)
		case err == nil:
			won = n
		default:
			wantError(t, err, store.ErrConflict)
		}
	}
	got, err := s.Get(t.Context(), j.ID)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("vm-%d", won); got.Builder != want {
		t.Errorf("the record says %q won, the answers say %q", got.Builder, want)
	}
}

func testUnsettled(t *testing.T, s Store, reopen func() Store) {
	var want []job.ID
	n := 0
	for _, state := range job.States {
		for _, attempt := range []int{0, 1} {
			for _, acknowledged := range []bool{false, true} {
				j := Job(n, state)
				n++
				j.Attempt, j.Acknowledged = attempt, acknowledged
				mustCreate(t, s, j)
				if !j.Settled() {
					want = append(want, j.ID)
				}
			}
		}
	}
	// One that settles only now, one that comes back to be settled.
	last := mustCreate(t, s, Job(n, job.Collecting))
	last.State = job.Failed
	if _, err := s.Update(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	s = reopen()
	jobs, damaged, err := s.Unsettled(t.Context())
	if err != nil || len(damaged) > 0 {
		t.Fatal(damaged, err)
	}
	if diff := cmp.Diff(want, ids(jobs)); diff != "" {
		t.Error(diff)
	}
}

func testList(t *testing.T, s Store, _ func() Store) {
	const count = 25
	var want []job.ID
	for n := range count {
		want = append(want, Job(n, job.Queued).ID)
	}
	for n := count - 1; n >= 0; n-- { // not in the order in which they are listed
		mustCreate(t, s, Job(n, job.States[n%len(job.States)]))
	}
	var got []job.ID
	var after job.ID
	for {
		jobs, damaged, err := s.List(t.Context(), after, 10)
		if err != nil || len(damaged) > 0 {
			t.Fatal(damaged, err)
		}
		if len(jobs) > 10 {
			t.Fatalf("a page of %d", len(jobs))
		}
		if len(jobs) == 0 {
			break
		}
		got = append(got, ids(jobs)...)
		after = got[len(got)-1]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	all, err := s.IDs(t.Context())
	if err != nil || len(all) != count {
		t.Errorf("%d IDs, %v", len(all), err)
	}
	for _, id := range want {
		if !all[id] {
			t.Errorf("%s is not among the IDs", id)
		}
	}
}

func testNamed(t *testing.T, s Store, reopen func() Store) {
	var want []job.ID
	for n, name := range []string{"a", "b", "a", "A", "a%", "a", ""} {
		j := Job(n, job.States[n%len(job.States)])
		j.Name = name
		mustCreate(t, s, j)
		if name == "a" {
			want = append([]job.ID{j.ID}, want...)
		}
	}
	renamed, err := s.Get(t.Context(), Job(1, job.Queued).ID)
	if err != nil {
		t.Fatal(err)
	}
	renamed.Name = "a"
	if _, err := s.Update(t.Context(), renamed); err != nil {
		t.Fatal(err)
	}
	want = []job.ID{want[0], want[1], renamed.ID, want[2]}
	s = reopen()
	// Of the same second, and younger: its ID doesn't tell.
	later := Job(5, job.Queued)
	later.ID, later.Name, later.DropKey, later.Created = later.ID[:len(later.ID)-6]+"000000", "a", "later", later.Created.Add(time.Millisecond)
	want = append([]job.ID{mustCreate(t, s, later).ID}, want...)
	for limit := range 6 {
		jobs, damaged, err := s.Named(t.Context(), "a", limit)
		if err != nil || len(damaged) > 0 {
			t.Fatal(damaged, err)
		}
		if diff := cmp.Diff(want[:limit], ids(jobs), cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("at most %d: %s", limit, diff)
		}
	}
	if jobs, _, err := s.Named(t.Context(), "none", 9); len(jobs) > 0 || err != nil {
		t.Errorf("none: %v, %v", jobs, err)
	}
}

func testOwner(t *testing.T, s Store, reopen func() Store) {
	first, err := s.Owner(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// It goes into every request.
	if _, err := pipe.Marshal(pipe.Header{Kind: pipe.KindTakeOver, Owner: first}, nil); err != nil {
		t.Error(err)
	}
	for range 2 {
		again, err := s.Owner(t.Context())
		if err != nil || again != first {
			t.Errorf("first %q, then %q, %v", first, again, err)
		}
		s = reopen()
	}
}

func testCheckpoint(t *testing.T, s Store, reopen func() Store) {
	none, err := s.Checkpoint(t.Context(), "vm")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(job.Checkpoint{}, none); diff != "" {
		t.Error(diff)
	}
	want := map[string]job.Checkpoint{
		"vm": {
			Position: pipe.Position{Generation: "7-0123abcd", Offset: 1 << 40},
			Hello:    &pipe.Hello{Generation: "7-0123abcd", Protocol: 1, Image: "debian", Slots: 2},
			Logs:     map[job.ID]job.Mark{Job(1, job.Queued).ID: {File: 5, Attempt: 2, Stream: 9}},
		},
		"vm-2": {Position: pipe.Position{Generation: "1-00000000"}},
	}
	for name, c := range want {
		if err := s.SaveCheckpoint(t.Context(), name, job.Checkpoint{}); err != nil {
			t.Fatal(err)
		}
		if err := s.SaveCheckpoint(t.Context(), name, c); err != nil {
			t.Fatal(err)
		}
	}
	s = reopen()
	for name, c := range want {
		got, err := s.Checkpoint(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func testCancelled(t *testing.T, s Store, _ func() Store) {
	j := mustCreate(t, s, Job(1, job.Queued))
	over, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := s.Create(over, Job(2, job.Queued))
	wantError(t, err, context.Canceled)
	_, err = s.Update(over, j)
	wantError(t, err, context.Canceled)
	_, err = s.Get(over, j.ID)
	wantError(t, err, context.Canceled)
	_, _, err = s.Unsettled(over)
	wantError(t, err, context.Canceled)
	_, _, err = s.List(over, "", 1)
	wantError(t, err, context.Canceled)
	_, _, err = s.Named(over, j.Name, 1)
	wantError(t, err, context.Canceled)
	_, err = s.IDs(over)
	wantError(t, err, context.Canceled)
	_, err = s.FindDrop(over, j.DropKey)
	wantError(t, err, context.Canceled)
	_, err = s.Owner(over)
	wantError(t, err, context.Canceled)
	_, err = s.Checkpoint(over, "vm")
	wantError(t, err, context.Canceled)
	wantError(t, s.SaveCheckpoint(over, "vm", job.Checkpoint{}), context.Canceled)
	// And the store is as good as before.
	if _, err := s.Update(t.Context(), j); err != nil {
		t.Error(err)
	}
}

func ids(jobs []job.Job) []job.ID {
	var out []job.ID
	for _, j := range jobs {
		out = append(out, j.ID)
	}
	return out
}
