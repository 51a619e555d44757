package runner

import (
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"osbuilder/pipe"
)

// A record is what was accepted.
type record struct {
	Order     uint64    `json:"order"` // of acceptance; who comes first runs first
	Job       string    `json:"job"`
	Attempt   int       `json:"attempt"`
	Name      string    `json:"name,omitempty"`
	Timeout   int64     `json:"timeout,omitempty"` // seconds
	SHA256    string    `json:"sha256"`            // of the body
	Inputs    string    `json:"inputs,omitempty"`
	Anonymous bool      `json:"anonymous,omitempty"`
	Accepted  time.Time `json:"accepted"`
}

func (r record) ref() pipe.JobRef { return pipe.JobRef{Job: r.Job, Attempt: r.Attempt} }

// folder names what belongs to one attempt of a job, wherever it lies.
func folder(ref pipe.JobRef) string { return ref.Job + "-" + strconv.Itoa(ref.Attempt) }

// parseFolder undoes folder: the digits behind the last dash are the attempt.
func parseFolder(name string) (pipe.JobRef, bool) {
	i := strings.LastIndexByte(name, '-')
	if i < 0 {
		return pipe.JobRef{}, false
	}
	n, err := strconv.Atoi(name[i+1:])
	ref := pipe.JobRef{Job: name[:i], Attempt: n}
	return ref, err == nil && n > 0 && pipe.ValidID(ref.Job) && folder(ref) == name
}

// A marker says that a job was started, or was about to be.
type marker struct {
	Boot   string `json:"boot"`
	Slot   int    `json:"slot"`
	User   string `json:"user,omitempty"`
	Uptime int64  `json:"uptime_ns"` // CLOCK_BOOTTIME
	// Memory is the limit that it was started with, in bytes; 0: none.
	Memory int64 `json:"memory,omitempty"`
}

// A wish says since when a job is wanted to end.
type wish struct {
	Boot   string    `json:"boot"`
	Uptime int64     `json:"uptime_ns"` // CLOCK_BOOTTIME
	Time   time.Time `json:"time"`      // for people
}

// after reports whether the wish came when the unit had ended already.
func (w wish) after(ran marker, r Result) bool {
	return w.Boot == ran.Boot && w.Uptime > 0 && r.Uptime > 0 && w.Uptime > r.Uptime
}

// An outcome is the one end of one attempt.
type outcome struct {
	Started   bool            `json:"started"`
	Finished  pipe.Finished   `json:"finished"`
	Artifacts []pipe.Artifact `json:"artifacts,omitempty"`

	diskFull bool // as it ended: only until the outcome is on record
}

// A job is what the owner knows of one attempt.
type job struct {
	record
	ran      *marker  // nil: not started
	wish     *wish    // nil: nobody wants it cancelled
	started  bool     // its process runs, or ran
	outcome  *outcome // nil: not ended
	base     int64    // how much of its output earlier generations told
	told     told     // in this generation
	attended bool     // a goroutine is at it
	trouble  string   // what was reported last
}

// paths of one attempt.
type paths struct {
	spool     string // its folder in the spool
	own       string // its own folder
	artifacts string
	roots     string
}

func (c Config) paths(ref pipe.JobRef) paths {
	name := folder(ref)
	return paths{
		spool:     filepath.Join(c.spool(), "jobs", name),
		own:       filepath.Join(c.jobsDir(), name),
		artifacts: filepath.Join(c.artifactsDir(), name),
		roots:     filepath.Join(c.GCRoots, name),
	}
}

func (p paths) record() string  { return filepath.Join(p.spool, "record") }
func (p paths) body() string    { return filepath.Join(p.spool, "body") }
func (p paths) inputs() string  { return filepath.Join(p.spool, "inputs") }
func (p paths) base() string    { return filepath.Join(p.spool, "base") }
func (p paths) ran() string     { return filepath.Join(p.spool, "ran") }
func (p paths) cancel() string  { return filepath.Join(p.spool, cancelName) }
func (p paths) log() string     { return filepath.Join(p.spool, "log") }
func (p paths) result() string  { return filepath.Join(p.spool, resultName) }
func (p paths) outcome() string { return filepath.Join(p.spool, "outcome") }

func (p paths) out() string    { return filepath.Join(p.own, "out") }
func (p paths) work() string   { return filepath.Join(p.own, "work") }
func (p paths) temp() string   { return filepath.Join(p.own, "tmp") }
func (p paths) home() string   { return filepath.Join(p.own, "home") }
func (p paths) script() string { return filepath.Join(p.own, "script") }
func (p paths) report() string { return filepath.Join(p.own, "report") }

// ownInputs is what the job reads: another name of the spool's file, which is
// root's and which it can't write to.
func (p paths) ownInputs() string { return filepath.Join(p.own, "inputs") }

const (
	resultName = "result"
	cancelName = "cancel"
)
