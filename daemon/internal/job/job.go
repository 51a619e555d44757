// Package job holds what a job is and what can happen to it. It is pure:
// no file, no clock, no network.
package job

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"osbuilder/pipe"
)

// ID names a job for ever. IDs of one sidecar sort by the time they were made.
type ID string

const idLetters = "0123456789abcdefghjkmnpqrstvwxyz" // no letter that looks like another

// NewID returns an ID made from the time and from random bits.
func NewID(now time.Time, random uint64) ID {
	var tail [6]byte
	for i := range tail {
		tail[i] = idLetters[random%uint64(len(idLetters))]
		random /= uint64(len(idLetters))
	}
	return ID(now.UTC().Format(idTime) + "-" + string(tail[:]))
}

const idTime = "20060102-150405"

// Made is when the ID was made, to the second, if it is one of [NewID].
func (id ID) Made() (at time.Time, ok bool) {
	if len(id) <= len(idTime) {
		return at, false
	}
	at, err := time.Parse(idTime, string(id[:len(idTime)]))
	return at, err == nil
}

// Recipe says how a job becomes a request.
type Recipe string

// The recipes.
const (
	RecipeScript Recipe = "script" // runs a Bash script as it stands
	RecipeNixOS  Recipe = "nixos"  // makes an image of a NixOS configuration
)

// Inputs are what a job needs besides its request, as the recipe makes them
// from the job's source.
type Inputs struct {
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
}

// NixOS is what a job of [RecipeNixOS] is to make.
type NixOS struct {
	Format  string `json:"format"`
	System  string `json:"system"`
	Nixpkgs string `json:"nixpkgs"` // as it was asked for; what became of it is in the report
}

// MaxAttempts bounds how often a job runs when its VM dies under it.
const MaxAttempts = 3

// The bounds of a job's priority; 0 is what a drop has.
const (
	MinPriority = -100
	MaxPriority = 100
)

// A CancelWish says that somebody wants a job not to run, or not to run on.
type CancelWish struct {
	Time   time.Time `json:"time"`
	Reason string    `json:"reason,omitempty"`
}

// A Job is the record of one thing to build. The record is the only truth
// about it, and is written before what it says is acted upon.
type Job struct {
	ID      ID        `json:"id"`
	Name    string    `json:"name"` // of its folder in output/, and the prefix of its log lines
	Drop    string    `json:"drop"` // the name it was dropped under
	DropKey string    `json:"drop_key"`
	Recipe  Recipe    `json:"recipe"`
	Entry   string    `json:"entry"` // the file to build, below the job's source folder
	State   State     `json:"state"`
	Why     string    `json:"why,omitempty"` // why it waits, in words
	Builder string    `json:"builder,omitempty"`
	Attempt int       `json:"attempt"` // of the request last claimed; 0 before the first
	Created time.Time `json:"created"`
	Updated time.Time `json:"updated"`

	Timeout time.Duration `json:"timeout"` // the job may run so long; 0 is no limit
	// Priority decides which of the waiting jobs is next: the higher one, and
	// of two alike the older.
	Priority int `json:"priority,omitempty"`
	// Cancel is kept until a VM has said how the job ended: the wish outlives
	// every restart.
	Cancel  *CancelWish `json:"cancel,omitempty"`
	RetryOf ID          `json:"retry_of,omitempty"` // the ended job that this one does again

	// Restored: the record comes from a copy, so what a VM has of the job has to
	// be found out before it is given to one.
	Restored bool `json:"restored,omitempty"`

	Inputs *Inputs `json:"inputs,omitempty"`
	NixOS  *NixOS  `json:"nixos,omitempty"`

	Started   time.Time       `json:"started,omitzero"`
	Artifacts []pipe.Artifact `json:"artifacts,omitempty"` // announced by the running attempt
	Result    *pipe.Finished  `json:"result,omitempty"`
	Image     string          `json:"image,omitempty"`  // the VM's image that ran it
	Runner    string          `json:"runner,omitempty"` // its runner's version
	Output    string          `json:"output,omitempty"` // the folder in output/, once published
	// Acknowledged: the VM was told that it may forget the job, and said yes.
	Acknowledged bool   `json:"acknowledged,omitempty"`
	History      []Step `json:"history"`

	// Revision is the store's: it changes with every write, and a write names
	// the revision that it replaces.
	Revision int64 `json:"-"`
}

// A Step is one entry of a job's story.
type Step struct {
	Time    time.Time `json:"time"`
	Event   Event     `json:"event"`
	State   State     `json:"state"`
	Attempt int       `json:"attempt,omitempty"`
	Reason  string    `json:"reason,omitempty"`

	// Folded counts the refusals that this one stands for besides itself, each
	// with its claim: Time is that of the first, Last and Reason are those of
	// the last.
	Folded int       `json:"folded,omitempty"`
	Last   time.Time `json:"last,omitzero"`
}

// System is the Nix system that a builder must build for to take the job;
// empty if any will do.
func (j Job) System() string {
	if j.NixOS == nil {
		return ""
	}
	return j.NixOS.System
}

// Settled reports that nothing is left to do for the job, here or in a VM.
func (j Job) Settled() bool { return j.State.Terminal() && (j.Acknowledged || j.Attempt == 0) }

// Interruptions counts the attempts that a VM's death ended. An attempt that
// was only refused is none.
func (j Job) Interruptions() int {
	n := 0
	for _, s := range j.History {
		if s.Event == Interrupted {
			n++
		}
	}
	return n
}

// Deferred reports that the job waits because a VM refused it for now: it has
// an attempt that never ran.
func (j Job) Deferred() bool {
	if j.State != Queued {
		return false
	}
	for _, s := range slices.Backward(j.History) {
		if !s.Event.Note() {
			return s.Event == Deferred
		}
	}
	return false
}

// Before reports that the job is to be claimed before other.
func (j Job) Before(other Job) bool {
	if j.Priority != other.Priority {
		return j.Priority > other.Priority
	}
	return j.older(other)
}

// older tells what IDs can't, which are of the same second as often as not.
func (j Job) older(other Job) bool {
	if !j.Created.Equal(other.Created) {
		return j.Created.Before(other.Created)
	}
	return j.ID < other.ID
}

// Youngest is for sorting jobs: it is negative if a is younger than b.
func Youngest(a, b Job) int {
	switch {
	case b.older(a):
		return -1
	case a.older(b):
		return 1
	}
	return 0
}

// Apply returns the job after event, with its story told. It doesn't change
// j; a job in its terminal state comes back as it was.
func (j Job) Apply(event Event, now time.Time, reason string) (Job, error) {
	next, err := Next(j.State, event)
	if err != nil {
		return j, fmt.Errorf("job %s: %w", j.ID, err)
	}
	if j.State.Terminal() || next == j.State && !event.Note() && event != Restored {
		return j, nil
	}
	j.State = next
	j.Updated = now.UTC()
	j.History = append(j.History[:len(j.History):len(j.History)], Step{
		Time: j.Updated, Event: event, State: next, Attempt: j.Attempt, Reason: reason,
	})
	j.History = fold(j.History)
	return j, nil
}

// fold shortens the end of a story: a VM can refuse a job for days, and a
// record is written anew with each of its steps. It leaves h as it was.
func fold(h []Step) []Step {
	for {
		n := len(h) - 4
		if n < 0 || !refused(h[n:n+2]) || !refused(h[n+2:]) {
			return h
		}
		claimed, deferred := h[n+2], h[n+3]
		if deferred.Folded == 0 {
			deferred.Last = deferred.Time
		}
		deferred.Folded += h[n+1].Folded + 1
		claimed.Time, deferred.Time = h[n].Time, h[n+1].Time
		h = append(h[:n:n], claimed, deferred)
	}
}

// refused reports whether two steps are a claim and its refusal for now.
func refused(h []Step) bool { return h[0].Event == Claimed && h[1].Event == Deferred }

// OutputName turns a drop's name into the name of a folder in output/: the
// extension goes, and whatever a path or a shell could take amiss becomes a
// hyphen.
func OutputName(drop string) string {
	if i := strings.LastIndexByte(drop, '.'); i > 0 {
		drop = drop[:i]
	}
	return FolderName(drop)
}

// FolderName does the same for a folder, whose name has no extension.
func FolderName(drop string) string {
	var b strings.Builder
	for _, r := range drop {
		switch {
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '_', r == '.':
			b.WriteRune(r)
		default:
			if s := b.String(); s != "" && !strings.HasSuffix(s, "-") {
				b.WriteByte('-')
			}
		}
		if b.Len() >= 64 {
			break
		}
	}
	name := strings.Trim(b.String(), "-.")
	if name == "" {
		return "job"
	}
	return name
}
