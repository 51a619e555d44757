package job

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
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

// Refusals in a row are one step with their number, whatever their reasons;
// what lies between two of them keeps them apart.
func TestRefusalsAreFolded(t *testing.T) {
	at := func(n int) time.Time { return time.Date(2026, 1, 2, 3, 4, n, 0, time.UTC) }
	j := Job{ID: "a", State: Queued, Attempt: 1}
	n := 0
	apply := func(events ...Event) {
		t.Helper()
		for _, e := range events {
			n++
			var err error
			if j, err = j.Apply(e, at(n), fmt.Sprint("reason ", n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	apply(Claimed, Deferred)
	before := j
	kept := slices.Clone(before.History)
	apply(Claimed, Deferred, Claimed, Deferred)
	want := []Step{
		{Time: at(1), Event: Claimed, State: Sending, Attempt: 1, Reason: "reason 5"},
		{Time: at(2), Event: Deferred, State: Queued, Attempt: 1, Reason: "reason 6", Folded: 2, Last: at(6)},
	}
	if diff := cmp.Diff(want, j.History); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(kept, before.History); diff != "" {
		t.Errorf("Apply changed the job it was called on:\n%s", diff)
	}
	apply(RetryAsked, Claimed, Deferred, Claimed, Deferred, Claimed)
	folded := []int{0, 2, 0, 0, 1, 0}
	for i, s := range j.History {
		if i >= len(folded) || s.Folded != folded[i] {
			t.Fatalf("story %+v", j.History)
		}
	}

	// A story from before there was folding is shortened from its end on.
	long := Job{ID: "a", State: Sending, History: []Step{{Event: Created}}}
	for range 100 {
		long.History = append(long.History, Step{Event: Claimed, Time: at(1)}, Step{Event: Deferred, Time: at(2)})
	}
	long.History = append(long.History, Step{Event: Claimed, Time: at(3)})
	short, err := long.Apply(Deferred, at(4), "")
	if h := short.History; err != nil || len(h) != 3 || h[2].Folded != 100 || !h[2].Last.Equal(at(4)) || !h[2].Time.Equal(at(2)) {
		t.Errorf("story %+v, %v", h, err)
	}
}

// Whatever happens, no claim and no refusal goes uncounted, and what is asked
// of a story has the same answers as without folding.
func TestFoldingLosesNothing(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for range 1000 {
		j := Job{ID: "a", State: Queued}
		claims, refusals, interruptions := 0, 0, 0
		last := Event("")
		for range 60 {
			e := Events[random.IntN(len(Events))]
			if j.State == Queued || j.State == Sending {
				e = []Event{Claimed, Claimed, Deferred, Deferred, Interrupted, RetryAsked}[random.IntN(6)]
			}
			was := j.State
			next, err := j.Apply(e, time.Time{}, "")
			if err != nil || was.Terminal() {
				continue
			}
			j = next
			if j.State == was && !e.Note() {
				continue
			}
			if !e.Note() {
				last = e
			}
			switch e {
			case Claimed:
				claims++
			case Deferred:
				refusals++
			case Interrupted:
				interruptions++
			default:
			}
		}
		for i, s := range j.History {
			switch s.Event {
			case Claimed:
				claims--
				if i+1 < len(j.History) && j.History[i+1].Event == Deferred {
					claims -= j.History[i+1].Folded
				}
			case Deferred:
				refusals -= s.Folded + 1
			default:
			}
		}
		if claims != 0 || refusals != 0 || j.Interruptions() != interruptions || j.Deferred() != (last == Deferred && j.State == Queued) {
			t.Fatalf("%d claims, %d refusals too few, %d interruptions, last %s; story %+v", claims, refusals, interruptions, last, j.History)
		}
	}
}

// A step that stands for itself is written as it was before there was folding.
func TestStepAsBefore(t *testing.T) {
	data, err := json.Marshal(Step{Event: Deferred, State: Queued, Attempt: 1, Reason: "r"})
	if want := `{"time":"0001-01-01T00:00:00Z","event":"deferred","state":"queued","attempt":1,"reason":"r"}`; err != nil || string(data) != want {
		t.Errorf("%s, %v, want %s", data, err, want)
	}
}
