package pipe

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"
	"unicode/utf8"
)

// Type says what an event is, and which payload it carries.
type Type string

// The types of events.
const (
	TypeHello    Type = "hello"    // the runner started
	TypeAccepted Type = "accepted" // a request is in the spool, or was carried out
	TypeRefused  Type = "refused"  // a request was not taken
	TypeStarted  Type = "started"  // a job runs
	TypeLog      Type = "log"      // a job's output
	TypeProgress Type = "progress" // how far a job is
	TypeArtifact Type = "artifact" // a file that a job made, ready to be fetched
	TypeFinished Type = "finished" // the outcome of a job; always its last event
)

// Errors that ParseEvent and Splitter return, wrapped with what was found.
var (
	// ErrEvent: the line is no valid event.
	ErrEvent = errors.New("malformed event")
	// ErrUnknownType: the event is well formed but of a type that this side
	// doesn't know; it can be passed over.
	ErrUnknownType = errors.New("unknown type of event")
	// ErrPunched: the bytes read as NUL, so someone else freed them.
	ErrPunched = errors.New("events were punched out of the pipe")
	// ErrLineTooLong: a line is longer than MaxLine.
	ErrLineTooLong = errors.New("line too long")
)

// An Event is one line of pipe_out. Exactly the payload that belongs to its
// type is set.
type Event struct {
	Seq     uint64    `json:"seq"` // grows by one within a generation, from 1
	Time    time.Time `json:"time"`
	Type    Type      `json:"type"`
	Job     string    `json:"job,omitempty"`
	Attempt int       `json:"attempt,omitempty"`

	Hello    *Hello    `json:"hello,omitempty"`
	Accepted *Accepted `json:"accepted,omitempty"`
	Refused  *Refused  `json:"refused,omitempty"`
	Started  *Started  `json:"started,omitempty"`
	Log      *Log      `json:"log,omitempty"`
	Progress *Progress `json:"progress,omitempty"`
	Artifact *Artifact `json:"artifact,omitempty"`
	Finished *Finished `json:"finished,omitempty"`
}

// Hello is the first event of a generation, and of each start of the runner, and
// is said anew when Unfit changes.
type Hello struct {
	Generation Generation `json:"generation"`
	Protocol   int        `json:"protocol"`
	Runner     string     `json:"runner"`          // its version
	Image      string     `json:"image"`           // the VM's image and version
	Owner      string     `json:"owner,omitempty"` // of the VM; none before its first request
	Slots      int        `json:"slots"`           // how many jobs run at once
	Systems    []string   `json:"systems"`         // Nix systems it builds for, such as x86_64-linux
	Free       int64      `json:"free"`            // bytes free on the data disk
	Unfit      string     `json:"unfit,omitempty"` // why it can build nothing now, in words; empty: it can
	// Jobs are all that the VM knows and nobody acknowledged. A job that the
	// writer believes to be here and that isn't listed was lost with its disk.
	Jobs []JobRef `json:"jobs,omitempty"`
}

// A JobRef names one attempt of a job.
type JobRef struct {
	Job     string `json:"job"`
	Attempt int    `json:"attempt"`
}

// Accepted answers a request: for a job it is spooled and synced, for any
// other kind it was carried out.
type Accepted struct {
	Request string `json:"request"` // [Header.Key]
}

// Reason says why a request was refused.
type Reason string

// Why requests are refused.
const (
	ReasonMalformed Reason = "malformed" // header or digest don't hold
	ReasonVersion   Reason = "version"   // protocol version not spoken here
	ReasonOwner     Reason = "owner"     // the VM is owned by another sidecar
	ReasonConflict  Reason = "conflict"  // the same attempt with another digest
	ReasonDisk      Reason = "disk"      // no room to spool it
	ReasonInternal  Reason = "internal"  // the runner could not store it
	ReasonInputs    Reason = "inputs"    // its inputs are not there, or not what the header says: upload them again
	ReasonStale     Reason = "stale"     // lay in pipe_in at boot, without a header: set aside, not run
)

// Refused answers a request that was not taken.
type Refused struct {
	Request   string `json:"request,omitempty"` // [Header.Key], if the header could be read
	Reason    Reason `json:"reason"`
	Message   string `json:"message"`            // what happened and what to do, for people
	Retryable bool   `json:"retryable"`          // the same request may pass later
	OwnedBy   string `json:"owned_by,omitempty"` // with ReasonOwner
}

// Started says that a job's process was started.
type Started struct {
	Name string `json:"name,omitempty"`
	Slot int    `json:"slot"` // from 1
	Unit string `json:"unit"` // its systemd unit in the VM
	User string `json:"user"`
}

// Log is a piece of a job's output. In JSON its data is "text", or "base64"
// where it is not valid UTF-8 or would be shorter so: any bytes pass unchanged.
type Log struct {
	Offset int64 // of the first byte of Data in the job's whole output
	Data   []byte
}

type logJSON struct {
	Offset int64   `json:"offset"`
	Text   *string `json:"text,omitempty"`
	Base64 *string `json:"base64,omitempty"`
}

// MarshalJSON implements [json.Marshaler].
func (l Log) MarshalJSON() ([]byte, error) {
	j := logJSON{Offset: l.Offset}
	if utf8.Valid(l.Data) && escapes(l.Data) <= len(l.Data)/3 {
		s := string(l.Data)
		j.Text = &s
	} else {
		s := base64.StdEncoding.EncodeToString(l.Data)
		j.Base64 = &s
	}
	return json.Marshal(j)
}

// escapes is by how many bytes text grows in JSON, about. For what is mostly
// control characters that is five times its length.
func escapes(data []byte) int {
	n := 0
	for _, b := range data {
		switch {
		case b == '\n', b == '\r', b == '\t', b == '"', b == '\\':
			n++
		case b < ' ', b == '<', b == '>', b == '&':
			n += 5
		}
	}
	return n
}

// UnmarshalJSON implements [json.Unmarshaler].
func (l *Log) UnmarshalJSON(data []byte) error {
	var j logJSON
	if err := json.Unmarshal(data, &j); err != nil {
		return err
	}
	switch {
	case j.Text != nil && j.Base64 == nil:
		l.Data = []byte(*j.Text)
	case j.Base64 != nil && j.Text == nil:
		b, err := base64.StdEncoding.DecodeString(*j.Base64)
		if err != nil {
			return err
		}
		l.Data = b
	default:
		return errors.New("log wants either text or base64")
	}
	l.Offset = j.Offset
	return nil
}

// Progress says how far a job is. Expected is 0 where nobody knows.
type Progress struct {
	Phase    string `json:"phase"`
	Done     int64  `json:"done"`
	Expected int64  `json:"expected,omitempty"`
	Unit     string `json:"unit"` // "bytes", "derivations"
}

// Artifact is a file that a job made. It is root's, and stays until the job
// is acknowledged.
type Artifact struct {
	Name     string `json:"name"` // its path below $OUT, with slashes
	Path     string `json:"path"` // absolute, in the VM
	Size     int64  `json:"size"` // bytes
	SHA256   string `json:"sha256"`
	Download string `json:"download"` // a command that fetches it, for a person with a key
}

// Status is the outcome of one attempt of a job.
type Status string

// The outcomes of an attempt.
const (
	StatusSucceeded   Status = "succeeded"
	StatusFailed      Status = "failed"      // it ended with an error of its own
	StatusTimeout     Status = "timeout"     // it ran longer than it may
	StatusCancelled   Status = "cancelled"   // somebody asked for its end
	StatusInterrupted Status = "interrupted" // the VM or the runner died under it; not the job's fault
)

// Finished is the outcome of one attempt.
type Finished struct {
	Status    Status `json:"status"`
	ExitCode  *int   `json:"exit_code,omitempty"` // of the script, where it exited by itself
	Signal    string `json:"signal,omitempty"`    // that killed it, such as SIGKILL
	Reason    string `json:"reason,omitempty"`    // in words, where status and exit code don't say it all
	Duration  int64  `json:"duration_ms"`
	Memory    int64  `json:"memory,omitempty"`       // peak, bytes; 0 where unknown
	Scope     string `json:"memory_scope,omitempty"` // what the peak covers: "unit"
	LogLength int64  `json:"log_length"`             // bytes of output in all
	Artifacts int    `json:"artifacts"`              // how many were announced
	Report    Report `json:"report,omitempty"`       // what the job itself has to say; nil where it said nothing
}

// check reports what is wrong with e.
func (e Event) check() error {
	count := 0
	for _, set := range []bool{
		e.Hello != nil, e.Accepted != nil, e.Refused != nil, e.Started != nil,
		e.Log != nil, e.Progress != nil, e.Artifact != nil, e.Finished != nil,
	} {
		if set {
			count++
		}
	}
	var ofJob, payload bool
	switch e.Type {
	case TypeHello:
		payload = e.Hello != nil
		if payload {
			if _, ok := e.Hello.Generation.Number(); !ok {
				return fmt.Errorf("%w: generation %q", ErrEvent, e.Hello.Generation)
			}
		}
	case TypeAccepted:
		payload = e.Accepted != nil
	case TypeRefused:
		payload = e.Refused != nil
	case TypeStarted:
		ofJob, payload = true, e.Started != nil
	case TypeLog:
		ofJob, payload = true, e.Log != nil
		if payload && e.Log.Offset < 0 {
			return fmt.Errorf("%w: log offset %d", ErrEvent, e.Log.Offset)
		}
	case TypeProgress:
		ofJob, payload = true, e.Progress != nil
	case TypeArtifact:
		ofJob, payload = true, e.Artifact != nil
		if payload && (e.Artifact.Size < 0 || !digestPattern.MatchString(e.Artifact.SHA256)) {
			return fmt.Errorf("%w: artifact of size %d, sha256 %q", ErrEvent, e.Artifact.Size, e.Artifact.SHA256)
		}
	case TypeFinished:
		ofJob, payload = true, e.Finished != nil
	case "":
		return fmt.Errorf("%w: no type", ErrEvent)
	default:
		return fmt.Errorf("%w: %q", ErrUnknownType, e.Type)
	}
	if e.Seq == 0 {
		return fmt.Errorf("%w: no sequence number", ErrEvent)
	}
	if !payload || count != 1 {
		return fmt.Errorf("%w: %q wants its own payload and no other", ErrEvent, e.Type)
	}
	if ofJob && (!ValidID(e.Job) || e.Attempt < 1) {
		return fmt.Errorf("%w: %q of job %q, attempt %d", ErrEvent, e.Type, e.Job, e.Attempt)
	}
	return nil
}

// MarshalEvent returns the event's line, newline included.
func MarshalEvent(e Event) ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, fmt.Errorf("marshal event: %w", err)
	}
	line, err := json.Marshal(e)
	if err != nil {
		return nil, fmt.Errorf("marshal event: %w", err)
	}
	if len(line)+1 > MaxLine {
		return nil, fmt.Errorf("marshal event: %w: %d bytes", ErrLineTooLong, len(line)+1)
	}
	return append(line, '\n'), nil
}

// ParseEvent reads one line, with or without its newline. Fields that this
// side doesn't know are passed over.
func ParseEvent(line []byte) (Event, error) {
	line = bytes.TrimSuffix(line, []byte("\n"))
	var e Event
	if err := json.Unmarshal(line, &e); err != nil {
		return Event{}, fmt.Errorf("parse event: %w: %w", ErrEvent, err)
	}
	if err := e.check(); err != nil {
		return e, fmt.Errorf("parse event: %w", err)
	}
	return e, nil
}

// An Entry is an event and the position after it: where reading goes on once
// the event has taken effect.
type Entry struct {
	Event Event
	Next  Position
}

// A Splitter cuts a stream of bytes into lines and knows where each ends. The
// zero value starts at offset 0. It is not safe for concurrent use.
type Splitter struct {
	Offset int64 // of the first byte that was not yet part of a whole line

	partial []byte
}

// Push hands every line that data completes, newline included, to emit,
// together with the offset after it. The line is valid during the call only.
// After an error the Splitter must not be used again.
func (s *Splitter) Push(data []byte, emit func(line []byte, end int64) error) error {
	for len(data) > 0 {
		i := bytes.IndexByte(data, '\n')
		rest := len(data)
		if i >= 0 {
			rest = i + 1
		}
		if len(s.partial)+rest > MaxLine {
			return fmt.Errorf("split events at %d: %w", s.Offset, ErrLineTooLong)
		}
		// No event holds a raw NUL: JSON escapes it.
		if bytes.IndexByte(data[:rest], 0) >= 0 {
			return fmt.Errorf("split events at %d: %w", s.Offset, ErrPunched)
		}
		if i < 0 {
			s.partial = append(s.partial, data...)
			return nil
		}
		line := data[:rest]
		if len(s.partial) > 0 {
			s.partial = append(s.partial, line...)
			line = s.partial
		}
		s.Offset += int64(len(line))
		if err := emit(line, s.Offset); err != nil {
			return err
		}
		s.partial = s.partial[:0]
		data = data[rest:]
	}
	return nil
}
