package job

import (
	"errors"
	"fmt"
)

// State is where a job stands.
//
//	queued ──claim──▶ sending ──accepted──▶ running ──finished──▶ collecting ──published──▶ done
//	   ▲                 │                     │                      │                     failed
//	   ├────deferred─────┘                     │                      └───────────────────▶ cancelled
//	   └────────────────interrupted────────────┘
//
// One whose record comes from a copy is queued again, until it is known what a
// VM has of it.
// Losing the link to a VM is no transition: the job goes on there. Nor are
// notes, which change nothing but what is on record: a wish to cancel, another
// priority, a try to publish that failed.
type State string

// The states.
const (
	Queued     State = "queued"     // waits for a slot; Why says for what
	Sending    State = "sending"    // claimed: its request is on the way to a VM
	Running    State = "running"    // the VM has it
	Collecting State = "collecting" // its outcome is known; artifacts and log are on the way to output/
	Done       State = "done"
	Failed     State = "failed"
	Cancelled  State = "cancelled"
)

// States are all states, in the order of a job's life.
var States = []State{Queued, Sending, Running, Collecting, Done, Failed, Cancelled}

// Terminal reports that the state is never left.
func (s State) Terminal() bool { return s == Done || s == Failed || s == Cancelled }

// Event is what can happen to a job.
type Event string

// The events.
const (
	Created            Event = "created"             // taken from the inbox; the first step of every story
	Claimed            Event = "claimed"             // a VM was chosen, the attempt counted
	Accepted           Event = "accepted"            // the VM has it, for sure
	Deferred           Event = "deferred"            // refused, but it may pass later
	Finished           Event = "finished"            // outcome known: from the VM, or there is none to be had
	Interrupted        Event = "interrupted"         // the VM died under it; another attempt is left
	PublishedDone      Event = "published-done"      // output/ has it, it succeeded
	PublishedFailed    Event = "published-failed"    // output/ has its log, it failed
	PublishedCancelled Event = "published-cancelled" // output/ has its log, it was cancelled

	Restored Event = "restored" // the record comes from a copy: what happened since is unknown
	Found    Event = "found"    // a restored one: a VM said which attempt it has

	// Notes: the state stays, the story tells of them.
	CancelAsked     Event = "cancel-asked"     // a VM may have it, and is told
	PriorityChanged Event = "priority-changed" // it goes before others, or behind
	RetryAsked      Event = "retry-asked"      // what failed is tried again at once
	PublishFailed   Event = "publish-failed"   // its artifacts came damaged
)

// Events are all events.
var Events = []Event{
	Created, Claimed, Accepted, Deferred, Finished, Interrupted,
	PublishedDone, PublishedFailed, PublishedCancelled,
	Restored, Found,
	CancelAsked, PriorityChanged, RetryAsked, PublishFailed,
}

// Note reports that the event is told each time and changes no state.
func (e Event) Note() bool {
	switch e {
	case CancelAsked, PriorityChanged, RetryAsked, PublishFailed:
		return true
	default:
		return false
	}
}

// ErrTransition: the event can't happen in that state, so a record or the
// code is wrong.
var ErrTransition = errors.New("impossible transition")

// transitions has every pair of state and event that is possible. Repeats,
// which a restart can cause, lead to where they are.
var transitions = map[State]map[Event]State{
	Queued: {
		Created: Queued, Deferred: Queued, Interrupted: Queued,
		Claimed:  Sending,
		Accepted: Running,    // after a refusal: the answer to the same request, written twice
		Finished: Collecting, // cancelled, or nothing can run it
		Restored: Queued, Found: Running,
		CancelAsked: Queued, PriorityChanged: Queued, RetryAsked: Queued,
	},
	Sending: {
		Claimed:  Sending,
		Accepted: Running,
		Deferred: Queued, Interrupted: Queued,
		Finished:    Collecting, // refused for good
		Restored:    Queued,
		CancelAsked: Sending, PriorityChanged: Sending, RetryAsked: Sending,
	},
	Running: {
		Accepted:    Running,
		Interrupted: Queued,
		Finished:    Collecting,
		Restored:    Queued,
		CancelAsked: Running, PriorityChanged: Running,
	},
	Collecting: {
		Accepted: Collecting, Finished: Collecting,
		RetryAsked: Collecting, PublishFailed: Collecting, Restored: Collecting,
		PublishedDone: Done, PublishedFailed: Failed, PublishedCancelled: Cancelled,
	},
}

// Next returns the state after event. It is total: every pair gives a state
// or ErrTransition. Terminal states absorb everything.
func Next(s State, e Event) (State, error) {
	if s.Terminal() {
		return s, nil
	}
	if next, ok := transitions[s][e]; ok {
		return next, nil
	}
	return s, fmt.Errorf("%w: %q while %q", ErrTransition, e, s)
}
