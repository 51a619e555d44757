package store

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// go test ./daemon/internal/store -run Versions -keep writes the file of this
// version. One that was released is never written again.
var keep = flag.Bool("keep", false, "write testdata/vVERSION.db anew")

// kept is what a file of some version has in it.
type kept struct {
	Owner      string         `json:"owner"`
	Jobs       []job.Job      `json:"jobs"`
	Checkpoint job.Checkpoint `json:"checkpoint"`
}

// Files that each version has written are read, changed to this version and
// copied first.
func TestVersions(t *testing.T) {
	if *keep {
		keepVersion(t)
	}
	for version := 1; version <= len(migrations); version++ {
		t.Run(fmt.Sprint(version), func(t *testing.T) {
			name := fmt.Sprintf("testdata/v%d", version)
			data, err := os.ReadFile(name + ".db")
			if err != nil {
				t.Fatalf("no records of this version are kept for those who come after: %v", err)
			}
			path := filepath.Join(t.TempDir(), "db")
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
			got := readAll(t, openAt(t, path, migrations))
			if *keep && version == len(migrations) {
				text, err := json.MarshalIndent(got, "", " ")
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(name+".json", append(text, '\n'), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			text, err := os.ReadFile(name + ".json")
			if err != nil {
				t.Fatal(err)
			}
			var want kept
			if err := json.Unmarshal(text, &want); err != nil {
				t.Fatal(err)
			}
			for i := range got.Jobs {
				got.Jobs[i].Revision = 0
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if copied := fileExists(backupName(path, version)); copied != (version < len(migrations)) {
				t.Errorf("copied before it was changed: %t", copied)
			}
		})
	}
}

func readAll(t *testing.T, s *SQLite) (k kept) {
	t.Helper()
	var err error
	if k.Owner, err = s.Owner(t.Context()); err != nil {
		t.Fatal(err)
	}
	if k.Checkpoint, err = s.Checkpoint(t.Context(), "vm"); err != nil {
		t.Fatal(err)
	}
	var damaged []Damaged
	if k.Jobs, damaged, err = s.List(t.Context(), "", 100); err != nil || len(damaged) > 0 {
		t.Fatal(damaged, err)
	}
	unsettled, _, err := s.Unsettled(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, j := range k.Jobs {
		if !j.Settled() {
			n++
		}
		if id, err := s.FindDrop(t.Context(), j.DropKey); err != nil || id != j.ID {
			t.Errorf("the drop of %s leads to %s, %v", j.ID, id, err)
		}
		if named, _, err := s.Named(t.Context(), j.Name, 1); err != nil || len(named) != 1 || named[0].ID != j.ID {
			t.Errorf("the name of %s leads to %v, %v", j.ID, named, err)
		}
	}
	if n != len(unsettled) {
		t.Errorf("%d jobs are unsettled, %d are listed", n, len(unsettled))
	}
	return k
}

// keepVersion writes what this version can have on record: every state, every
// field.
func keepVersion(t *testing.T) {
	t.Helper()
	path := fmt.Sprintf("testdata/v%d.db", len(migrations))
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	s := openAt(t, path, migrations)
	if _, err := s.Owner(t.Context()); err != nil {
		t.Fatal(err)
	}
	hello := pipe.Hello{Generation: "7-0123abcd", Protocol: 1, Image: "debian-13-0123456789ab", Slots: 2, Systems: []string{"x86_64-linux"}}
	marks := make(map[job.ID]job.Mark)
	for n, events := range [][]job.Event{
		{},
		{job.PriorityChanged, job.RetryAsked},
		{job.Claimed},
		{job.Claimed, job.Deferred},
		{job.Claimed, job.CancelAsked},
		{job.Claimed, job.Accepted},
		{job.Claimed, job.Accepted, job.Interrupted},
		{job.Claimed, job.Accepted, job.CancelAsked},
		{job.Claimed, job.Accepted, job.Finished, job.PublishFailed, job.RetryAsked},
		{job.Claimed, job.Accepted, job.Finished, job.PublishedDone},
		{job.Claimed, job.Accepted, job.Finished, job.PublishedFailed},
		{job.Finished, job.PublishedCancelled},
		{job.Claimed, job.Accepted, job.Restored},
	} {
		j := keptJob(t, n, events)
		if j.Attempt > 0 && !j.State.Terminal() {
			marks[j.ID] = job.Mark{File: 60, Attempt: j.Attempt, Stream: 9}
		}
		if _, err := s.Create(t.Context(), j); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.SaveCheckpoint(t.Context(), "vm", job.Checkpoint{
		Position: pipe.Position{Generation: hello.Generation, Offset: 4096}, Hello: &hello, Logs: marks,
	}); err != nil {
		t.Fatal(err)
	}
	for _, statement := range []string{`PRAGMA journal_mode = DELETE`, `VACUUM`} {
		if _, err := s.db.ExecContext(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// keptJob is a job to which the events happened.
func keptJob(t *testing.T, n int, events []job.Event) job.Job {
	t.Helper()
	at := time.Date(2026, 11, 26, 12, n, 0, 0, time.UTC)
	words := []string{"waits"}
	for _, e := range events {
		words = append(words, string(e))
	}
	j := job.Job{
		ID: job.NewID(at, uint64(n)), Name: strings.Join(words, "-"), Recipe: job.RecipeScript, State: job.Queued,
		Created: at, Updated: at, Timeout: 6 * time.Hour, Priority: n - 2, Why: "a free slot on vm",
		History: []job.Step{{Time: at, Event: job.Created, State: job.Queued}},
	}
	j.Drop, j.Entry, j.DropKey = j.Name+".sh", j.Name+".sh", "key of "+j.Name
	if n%2 == 1 {
		j.Recipe, j.Entry, j.Drop = job.RecipeNixOS, j.Name+".nix", j.Name+".nix"
		j.Inputs = &job.Inputs{SHA256: strings.Repeat("0e", 32), Size: 1024}
		j.NixOS = &job.NixOS{Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05"}
		j.RetryOf = job.NewID(at.Add(-time.Hour), 0)
	}
	code := 3
	for i, e := range events {
		now := at.Add(time.Duration(i+1) * time.Second)
		switch e {
		case job.Claimed:
			j.Attempt, j.Builder, j.Image, j.Runner, j.Why = 1, "vm", "debian-13-0123456789ab", "0.1.0", ""
		case job.Accepted:
			j.Started = now
		case job.CancelAsked:
			j.Cancel = &job.CancelWish{Time: now, Reason: "not wanted"}
		case job.Restored:
			j.Restored = true
		case job.Finished:
			j.Artifacts = []pipe.Artifact{{Name: "a.iso", Path: "/data/artifacts/x/a.iso", Size: 7, SHA256: strings.Repeat("0e", 32), Download: "scp …"}}
			j.Result = &pipe.Finished{Status: pipe.StatusFailed, ExitCode: &code, Reason: "it broke", Duration: 5, LogLength: 7, Report: pipe.Report(`{"nix":"2.26.3"}`)}
		case job.PublishedDone, job.PublishedFailed, job.PublishedCancelled:
			j.Output = j.Name + "/" + string(j.ID)
			j.Acknowledged = e == job.PublishedDone
		default:
		}
		var err error
		if j, err = j.Apply(e, now, "why "+string(e)); err != nil {
			t.Fatal(err)
		}
	}
	return j
}
