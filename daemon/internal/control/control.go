// Package control is how people ask a running daemon about its jobs and have
// it change them: HTTP over a Unix socket that only the daemon's own user can
// connect to. [Server] is the daemon's end, [Client] the command line's, and
// [Job] what goes between the two.
package control

import (
	"errors"
	"time"

	"osbuilder/daemon/internal/job"
)

// What a backend's errors wrap, and what a [Client]'s errors are.
var (
	// ErrNotFound: no job of that ID or name is on record.
	ErrNotFound = errors.New("no such job")
	// ErrAmbiguous: several jobs have that name.
	ErrAmbiguous = errors.New("several jobs have that name")
	// ErrEnded: how the job ended is known, so nothing can be changed.
	ErrEnded = errors.New("already ended")
	// ErrRunning: the job runs, so there is nothing to try again.
	ErrRunning = errors.New("is running")
	// ErrRequest: what was asked for makes no sense.
	ErrRequest = errors.New("malformed request")
)

// A Job is what is told of a job. Times are UTC, durations seconds, sizes
// bytes. Names and forms of the fields stay; new ones may come.
type Job struct {
	ID       job.ID    `json:"id"`
	Name     string    `json:"name"`
	Drop     string    `json:"drop"`
	State    job.State `json:"state"`
	Why      string    `json:"why,omitempty"` // why it waits
	Priority int       `json:"priority"`
	Attempt  int       `json:"attempt"` // 0 before the first
	Builder  string    `json:"builder,omitempty"`
	Created  time.Time `json:"created"`
	Updated  time.Time `json:"updated"`          // of the last step
	Started  time.Time `json:"started,omitzero"` // of the running or last attempt
	Timeout  int64     `json:"timeout"`          // 0: no limit
	RetryOf  job.ID    `json:"retry_of,omitempty"`
	// CancelAsked is when somebody asked to cancel it, whatever came of it.
	CancelAsked time.Time `json:"cancel_asked,omitzero"`

	// Once the outcome is known:
	Status    string     `json:"status,omitempty"`
	ExitCode  *int       `json:"exit_code,omitempty"`
	Reason    string     `json:"reason,omitempty"`
	Duration  int64      `json:"duration_ms,omitempty"` // of the last attempt
	Artifacts []Artifact `json:"artifacts,omitempty"`
	Output    string     `json:"output,omitempty"`  // its folder in output/, once it is there
	Settled   bool       `json:"settled,omitempty"` // nothing is left to do for it: the VM has forgotten it, too

	// History is the whole story; a list of jobs leaves it out.
	History []job.Step `json:"history,omitempty"`
}

// An Artifact is a file that the job made.
type Artifact struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
}

// soon is why a job waits that has not been looked at yet.
const soon = "its turn, which is about to come"

// tell makes of a record what is told of it.
func tell(j job.Job, story bool) Job {
	t := Job{
		ID: j.ID, Name: j.Name, Drop: j.Drop, State: j.State, Why: j.Why, Priority: j.Priority, Attempt: j.Attempt,
		Builder: j.Builder, Created: j.Created.UTC(), Updated: j.Updated.UTC(), Started: j.Started.UTC(),
		Timeout: int64(j.Timeout / time.Second), RetryOf: j.RetryOf, Output: j.Output, Settled: j.Settled(),
	}
	if j.State == job.Queued && t.Why == "" {
		t.Why = soon
	}
	if j.Cancel != nil {
		t.CancelAsked = j.Cancel.Time.UTC()
	}
	if r := j.Result; r != nil {
		t.Status, t.ExitCode, t.Reason, t.Duration = string(r.Status), r.ExitCode, r.Reason, r.Duration
	}
	if story {
		t.History = j.History
		for _, a := range j.Artifacts {
			t.Artifacts = append(t.Artifacts, Artifact{Name: a.Name, Size: a.Size, SHA256: a.SHA256})
		}
	}
	return t
}

// failure is how an error travels.
type failure struct {
	Kind  string   `json:"kind"`
	Error string   `json:"error"`
	Hints []string `json:"hints,omitempty"`
}

// kinds name the errors on the way, with HTTP's number for each.
var kinds = []struct {
	name   string
	status int
	err    error
}{
	{"not-found", 404, ErrNotFound},
	{"ambiguous", 409, ErrAmbiguous},
	{"ended", 409, ErrEnded},
	{"running", 409, ErrRunning},
	{"malformed", 400, ErrRequest},
}
