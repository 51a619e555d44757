package pipe

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Kind says what a request asks for.
type Kind string

const (
	// KindJob asks to run the body once, in a slot.
	KindJob Kind = "job"
	// KindAcknowledge says that the outcome of a job is on record and its
	// artifacts are delivered: the VM may forget them. Runs at once.
	KindAcknowledge Kind = "acknowledge"
	// KindCancel says that a job is not to run, or not to run on. Runs at once.
	// What has ended, or is not known, is left as it is.
	KindCancel Kind = "cancel"
	// KindConsume carries Consumed and nothing else, for a writer that has
	// nothing to ask for. Runs at once.
	KindConsume Kind = "consume"
	// KindRepeat asks for a new generation in which everything about every job
	// that is not acknowledged is told again, output from its beginning: the
	// reader met something at Consumed that is no event, or has lost its place.
	// Written again for the same place it does nothing. Runs at once.
	KindRepeat Kind = "repeat"
	// KindTakeOver makes the header's owner the owner of the VM. Runs at once.
	KindTakeOver Kind = "take-over"
)

// Errors that Parse returns, wrapped with what was found.
var (
	// ErrHeader: the second line claims to be a header and isn't a valid one.
	ErrHeader = errors.New("malformed header")
	// ErrVersion: the header is of a protocol version that this side can't speak.
	ErrVersion = errors.New("unsupported protocol version")
	// ErrDigest: the body is not the one that the header describes.
	ErrDigest = errors.New("body does not match its header")
	// ErrTooLarge: the request is larger than MaxRequest.
	ErrTooLarge = errors.New("request too large")
)

// A Header is the JSON object in a request's second line.
type Header struct {
	Version int    `json:"version"`
	Kind    Kind   `json:"kind"`
	Owner   string `json:"owner"`             // lasting id of the sidecar that writes
	Job     string `json:"job,omitempty"`     // [ValidID]; job, acknowledge and cancel
	Attempt int    `json:"attempt,omitempty"` // from 1; job, acknowledge and cancel
	Name    string `json:"name,omitempty"`    // for people; job
	Timeout int64  `json:"timeout,omitempty"` // seconds the job may run; 0 is no limit
	Length  int64  `json:"length"`            // of the body
	SHA256  string `json:"sha256"`            // of the body
	Inputs  string `json:"inputs,omitempty"`  // SHA-256 of the inputs uploaded before
	// Consumed is how far the writer has stored what pipe_out said.
	Consumed *Position `json:"consumed,omitempty"`
}

// A Position is a place in the stream of events.
type Position struct {
	Generation Generation `json:"generation"`
	Offset     int64      `json:"offset"` // of the first byte not yet read
}

// A Generation names the life of one pipe_out: a number that grows by one,
// and random letters that tell apart two VMs that count alike.
type Generation string

var generationPattern = regexp.MustCompile(`^[1-9][0-9]{0,17}-[0-9a-f]{8}$`)

// Number returns the counting part, and whether g is well formed.
func (g Generation) Number() (uint64, bool) {
	if !generationPattern.MatchString(string(g)) {
		return 0, false
	}
	digits, _, _ := strings.Cut(string(g), "-")
	n, err := strconv.ParseUint(digits, 10, 64)
	return n, err == nil
}

// File returns the name that pipe_out of this generation has once the next
// one began.
func (g Generation) File() string { return Out + "." + string(g) }

var idPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// ValidID reports whether id can name a job: it becomes part of paths and of
// a systemd unit's name.
func ValidID(id string) bool { return idPattern.MatchString(id) }

var ownerPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

var digestPattern = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Key names the request in its answer. Two requests with one key are
// repeats of one another.
func (h Header) Key() string {
	switch h.Kind {
	case KindJob, KindAcknowledge, KindCancel:
		return fmt.Sprintf("%s/%s/%d", h.Kind, h.Job, h.Attempt)
	default:
		return fmt.Sprintf("%s/%s", h.Kind, h.Owner)
	}
}

// Validate reports the first thing that is wrong with the header itself.
func (h Header) Validate() error {
	if h.Version != Version {
		return fmt.Errorf("%w: %d, this side speaks %d", ErrVersion, h.Version, Version)
	}
	if !ownerPattern.MatchString(h.Owner) {
		return fmt.Errorf("%w: owner %q", ErrHeader, h.Owner)
	}
	switch h.Kind {
	case KindJob, KindAcknowledge, KindCancel:
		if !ValidID(h.Job) {
			return fmt.Errorf("%w: job %q", ErrHeader, h.Job)
		}
		if h.Attempt < 1 {
			return fmt.Errorf("%w: attempt %d", ErrHeader, h.Attempt)
		}
	case KindConsume, KindRepeat:
		if h.Consumed == nil {
			return fmt.Errorf("%w: %s without a place", ErrHeader, h.Kind)
		}
	case KindTakeOver:
	default:
		return fmt.Errorf("%w: kind %q", ErrHeader, h.Kind)
	}
	if len(h.Name) > 255 || !utf8.ValidString(h.Name) {
		return fmt.Errorf("%w: name of %d bytes", ErrHeader, len(h.Name))
	}
	if h.Timeout < 0 {
		return fmt.Errorf("%w: timeout %d s", ErrHeader, h.Timeout)
	}
	if h.Length < 0 || !digestPattern.MatchString(h.SHA256) {
		return fmt.Errorf("%w: length %d, sha256 %q", ErrHeader, h.Length, h.SHA256)
	}
	if h.Inputs != "" && !digestPattern.MatchString(h.Inputs) {
		return fmt.Errorf("%w: inputs %q", ErrHeader, h.Inputs)
	}
	if c := h.Consumed; c != nil {
		if _, ok := c.Generation.Number(); !ok || c.Offset < 0 {
			return fmt.Errorf("%w: consumed %q at %d", ErrHeader, c.Generation, c.Offset)
		}
	}
	return nil
}

// A Request is what lies in pipe_in.
type Request struct {
	Header *Header // nil: an anonymous job
	Body   []byte  // with a header, what follows it; without, the whole file
}

const (
	shebang      = "#!/usr/bin/env bash\n"
	headerPrefix = "#pipe "
)

// Marshal returns the bytes of a request. It fills in the header's version,
// length and digest. The result is a valid Bash script if the body is.
func Marshal(h Header, body []byte) ([]byte, error) {
	h.Version = Version
	h.Length = int64(len(body))
	sum := sha256.Sum256(body)
	h.SHA256 = hex.EncodeToString(sum[:])
	if err := h.Validate(); err != nil {
		return nil, fmt.Errorf("marshal request: %w", err)
	}
	line, err := json.Marshal(h)
	if err != nil {
		return nil, fmt.Errorf("marshal request: %w", err)
	}
	if n := len(headerPrefix) + len(line); n > MaxHeader {
		return nil, fmt.Errorf("marshal request: %w: header of %d bytes", ErrTooLarge, n)
	}
	var b bytes.Buffer
	b.WriteString(shebang)
	b.WriteString(headerPrefix)
	b.Write(line)
	b.WriteByte('\n')
	b.Write(body)
	if b.Len() > MaxRequest {
		return nil, fmt.Errorf("marshal request: %w: %d bytes, at most %d", ErrTooLarge, b.Len(), MaxRequest)
	}
	return b.Bytes(), nil
}

// Parse reads a request. Without a header every text is a valid anonymous
// request. With an error that wraps ErrVersion or ErrDigest the header is
// returned all the same, so that the refusal can name it.
func Parse(data []byte) (Request, error) {
	if len(data) > MaxRequest {
		return Request{}, fmt.Errorf("parse request: %w: %d bytes, at most %d", ErrTooLarge, len(data), MaxRequest)
	}
	_, rest, ok := bytes.Cut(data, []byte("\n"))
	if !ok || !bytes.HasPrefix(rest, []byte(headerPrefix)) {
		return Request{Body: data}, nil
	}
	line, body, ok := bytes.Cut(rest, []byte("\n"))
	if !ok {
		return Request{}, fmt.Errorf("parse request: %w: its line has no end", ErrHeader)
	}
	if len(line) > MaxHeader {
		return Request{}, fmt.Errorf("parse request: %w: %d bytes long", ErrHeader, len(line))
	}
	var h Header
	if err := json.Unmarshal(line[len(headerPrefix):], &h); err != nil {
		return Request{}, fmt.Errorf("parse request: %w: %w", ErrHeader, err)
	}
	if err := h.Validate(); err != nil {
		if errors.Is(err, ErrVersion) {
			return Request{Header: &h, Body: body}, fmt.Errorf("parse request: %w", err)
		}
		return Request{}, fmt.Errorf("parse request: %w", err)
	}
	req := Request{Header: &h, Body: body}
	sum := sha256.Sum256(body)
	if int64(len(body)) != h.Length || hex.EncodeToString(sum[:]) != h.SHA256 {
		return req, fmt.Errorf("parse request: %w: %d bytes, the header says %d", ErrDigest, len(body), h.Length)
	}
	return req, nil
}
