package job

import (
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Every state and every event: what is not named here must be refused.
var expected = map[State]map[Event]State{
	Queued: {
		Created: Queued, Deferred: Queued, Interrupted: Queued, Claimed: Sending, Accepted: Running, Finished: Collecting,
		CancelAsked: Queued, PriorityChanged: Queued, RetryAsked: Queued, Restored: Queued, Found: Running,
	},
	Sending: {
		Claimed: Sending, Accepted: Running, Deferred: Queued, Interrupted: Queued, Finished: Collecting,
		CancelAsked: Sending, PriorityChanged: Sending, RetryAsked: Sending, Restored: Queued,
	},
	Running: {
		Accepted: Running, Interrupted: Queued, Finished: Collecting,
		CancelAsked: Running, PriorityChanged: Running, Restored: Queued,
	},
	Collecting: {
		Accepted: Collecting, Finished: Collecting,
		PublishedDone: Done, PublishedFailed: Failed, PublishedCancelled: Cancelled,
		RetryAsked: Collecting, PublishFailed: Collecting, Restored: Collecting,
	},
	Done:      {},
	Failed:    {},
	Cancelled: {},
}

func TestNext(t *testing.T) {
	if len(expected) != len(States) {
		t.Fatalf("the table has %d states, the package %d", len(expected), len(States))
	}
	for _, s := range States {
		for _, e := range Events {
			got, err := Next(s, e)
			want, possible := expected[s][e]
			switch {
			case s.Terminal():
				if got != s || err != nil {
					t.Errorf("Next(%s, %s) = %s, %v; a terminal state absorbs", s, e, got, err)
				}
			case possible:
				if got != want || err != nil {
					t.Errorf("Next(%s, %s) = %s, %v; want %s", s, e, got, err, want)
				}
			default:
				if got != s || !errors.Is(err, ErrTransition) {
					t.Errorf("Next(%s, %s) = %s, %v; want %s and ErrTransition", s, e, got, err, s)
				}
			}
		}
	}
	if _, err := Next("nonsense", Created); !errors.Is(err, ErrTransition) {
		t.Errorf("an unknown state: %v, want ErrTransition", err)
	}
	if _, err := Next(Queued, "nonsense"); !errors.Is(err, ErrTransition) {
		t.Errorf("an unknown event: %v, want ErrTransition", err)
	}
}

// A note keeps the state, wherever it is possible, and is told each time.
func TestNotes(t *testing.T) {
	for _, s := range States {
		for _, e := range Events {
			j := Job{ID: "a", State: s}
			next, err := j.Apply(e, time.Time{}, "r")
			switch {
			case err != nil, s.Terminal():
				if len(next.History) > 0 {
					t.Errorf("%s while %s: told all the same", e, s)
				}
			case e.Note():
				again, err := next.Apply(e, time.Time{}, "r")
				if next.State != s || len(next.History) != 1 || err != nil || len(again.History) != 2 {
					t.Errorf("%s while %s: %+v, %v", e, s, again, err)
				}
			}
		}
	}
}

// What a VM refused for now stays so, whatever is noted meanwhile.
func TestDeferredSurvivesNotes(t *testing.T) {
	j := Job{ID: "a", State: Queued}
	for _, e := range []Event{Claimed, Deferred, PriorityChanged, RetryAsked} {
		var err error
		if j, err = j.Apply(e, time.Time{}, ""); err != nil {
			t.Fatal(err)
		}
		if want := e != Claimed; j.Deferred() != want {
			t.Errorf("after %s: %t", e, j.Deferred())
		}
	}
}

func TestApplyTellsTheStory(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	j := Job{ID: "a", State: Queued, History: []Step{{Time: now, Event: Created, State: Queued}}}
	before := j.History

	claimed, err := j.Apply(Claimed, now.Add(time.Second), "")
	if err != nil {
		t.Fatal(err)
	}
	again, err := claimed.Apply(Claimed, now.Add(time.Minute), "a repeat")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(claimed, again); diff != "" {
		t.Errorf("a repeat changed the job:\n%s", diff)
	}
	want := []Step{
		{Time: now, Event: Created, State: Queued},
		{Time: now.Add(time.Second), Event: Claimed, State: Sending},
	}
	if diff := cmp.Diff(want, claimed.History); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	if len(before) != 1 || j.State != Queued {
		t.Error("Apply changed the job it was called on")
	}

	// Two continuations of one story must not write into each other.
	a, err := claimed.Apply(Accepted, now, "one")
	if err != nil {
		t.Fatal(err)
	}
	if _, err = claimed.Apply(Deferred, now, "other"); err != nil {
		t.Fatal(err)
	}
	if got := a.History[2].Reason; got != "one" {
		t.Errorf("the story was overwritten: %q", got)
	}

	if _, err := j.Apply(PublishedDone, now, ""); !errors.Is(err, ErrTransition) {
		t.Errorf("published while queued: %v, want ErrTransition", err)
	}
}

func TestSettled(t *testing.T) {
	for _, tt := range []struct {
		job  Job
		want bool
	}{
		{Job{State: Running, Attempt: 1, Acknowledged: true}, false},
		{Job{State: Done, Attempt: 1}, false},
		{Job{State: Done, Attempt: 1, Acknowledged: true}, true},
		{Job{State: Failed, Attempt: 0}, true}, // no VM ever heard of it
	} {
		if got := tt.job.Settled(); got != tt.want {
			t.Errorf("%s, attempt %d, acknowledged %t: Settled() = %t", tt.job.State, tt.job.Attempt, tt.job.Acknowledged, got)
		}
	}
}
