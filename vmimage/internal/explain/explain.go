// Package explain says of a build that failed what the cause is, where, and
// what to do: for the wordings of Nix 2.8 to 2.34.
//
// Through nix-daemon every failure of Nix exits with 1. So a failure is told
// apart by the step that it came in, and by Nix's own words.
package explain

import (
	"strings"
	"syscall"

	"osbuilder/vmimage/internal/nixlog"
)

// A Class is a kind of failure; the values are part of the report's format.
type Class string

// The classes.
const (
	Evaluation  Class = "evaluation"  // the user's configuration, or nixpkgs, is wrong
	Build       Class = "build"       // a derivation could not be built
	Disk        Class = "disk"        // no space left
	Memory      Class = "memory"      // out of memory
	Killed      Class = "killed"      // by a signal, or the job was ended
	Timeout     Class = "timeout"     // Nix's own limits
	Network     Class = "network"     // something could not be downloaded
	Cache       Class = "cache"       // no binary cache: it would compile the world
	Hash        Class = "hash"        // a download is not what was expected
	Unsupported Class = "unsupported" // system, feature or format
	Daemon      Class = "daemon"      // nix-daemon is not there, or died
	Internal    Class = "internal"    // none of these
)

// A Step is what was being done.
type Step string

// The steps.
const (
	Fetch    Step = "fetch"    // getting nixpkgs
	Evaluate Step = "evaluate" // from the configuration to a derivation
	Realise  Step = "realise"  // from the derivation to the image
	Collect  Step = "collect"  // from the image to $OUT
)

func (s Step) doing() string {
	switch s {
	case Fetch:
		return "getting nixpkgs"
	case Evaluate:
		return "evaluating the configuration"
	case Realise:
		return "building the image"
	default:
		return "collecting the image"
	}
}

// An Explanation is what the user is told.
type Explanation struct {
	Class   Class    `json:"class"`
	Summary string   `json:"summary"`          // one line, the cause
	At      string   `json:"at,omitempty"`     // FILE[:LINE[:COLUMN]] of the drop
	Advice  string   `json:"advice,omitempty"` // what to do
	Lines   []string `json:"lines,omitempty"`  // the failing derivation's last lines, or the rest of the message
}

// An Error is an explanation on its way up.
type Error struct {
	Explanation
	Cause error          // may be nil
	Said  []nixlog.Error // Nix's own words, if it said any
}

func (e *Error) Error() string {
	if e.At != "" {
		return e.Summary + " (" + e.At + ")"
	}
	return e.Summary
}

func (e *Error) Unwrap() error { return e.Cause }

// Facts are what is known of a failure.
type Facts struct {
	Step    Step
	Errors  []nixlog.Error
	Text    []string // what Nix or a tool said outside its format
	Signal  syscall.Signal
	Stopped bool // the job was ended from outside
	OOM     bool // meanwhile the kernel killed something of nix-daemon's for its memory

	// BuildLog gives a derivation's last lines; nil is none. Building are the
	// derivations that were under way.
	BuildLog func(drv string) []string
	Building []string

	Source string // the drop's folder, absolute
	Entry  string // the configuration in it
	Read   func(file string) ([]byte, error)
}

// FactsOf takes what a log knows.
func FactsOf(step Step, log *nixlog.Log) Facts {
	return Facts{Step: step, Errors: log.Errors(), Text: log.Text(), BuildLog: log.BuildLog, Building: log.Building()}
}

// Explain finds the cause. It always has an answer.
func Explain(f Facts) Explanation {
	if f.BuildLog == nil {
		f.BuildLog = func(string) []string { return nil }
	}
	said := f.said()
	if f.Stopped || strings.Contains(said, "interrupted by the user") {
		return Explanation{
			Class:   Killed,
			Summary: "the job was ended from outside, while " + f.Step.doing(),
			Advice:  "It was cancelled, took longer than its time limit, or the builder VM was shut down. Drop it again to try again.",
		}
	}
	// From what nothing else can cause, to what is caused by others.
	for _, look := range []func(Facts, string) (Explanation, bool){
		ours, daemon, hash, unsupported, timeout, disk, memory, signal, network, build, evaluation,
	} {
		if e, ok := look(f, said); ok {
			return e
		}
	}
	return unknown(f)
}

// said is all that Nix said of the failure, in lines.
func (f Facts) said() string {
	var b strings.Builder
	for _, e := range f.Errors {
		b.WriteString(e.Message)
		b.WriteByte('\n')
		b.WriteString(e.Cause)
		b.WriteByte('\n')
	}
	for _, line := range f.Text {
		b.WriteString(line)
		b.WriteByte('\n')
	}
	return b.String()
}

// unknown repeats the last that was said.
func unknown(f Facts) Explanation {
	summary := "Nix failed and did not say why"
	if n := len(f.Errors); n > 0 {
		summary = headline(cause(f.Errors[n-1]))
	} else if n := len(f.Text); n > 0 {
		summary = f.Text[n-1]
	}
	return Explanation{
		Class:   Internal,
		Summary: summary,
		Advice:  "The whole log says more. If the configuration is not to blame, this is a fault of the builder: report it with the log.",
		Lines:   tail(f.Text, 20),
	}
}

// cause is the message without its trace.
func cause(e nixlog.Error) string {
	if e.Cause != "" {
		return e.Cause
	}
	// Traces are told outermost first, with each error of theirs on a line.
	text := e.Message
	if i := strings.LastIndex(text, "\n       error: "); i >= 0 {
		text = text[i:]
	}
	text = strings.TrimPrefix(strings.TrimSpace(text), "error:")
	return strings.TrimSpace(text)
}

// headline is the first line that says something.
func headline(text string) string {
	for line := range strings.SplitSeq(text, "\n") {
		if line = strings.TrimSpace(line); line != "" {
			line = strings.TrimSuffix(line, " Definition values:")
			return strings.TrimRight(line, ";:.")
		}
	}
	return "no reason given"
}

func tail(lines []string, n int) []string {
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return lines
}
