package pipe

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"unicode/utf8"
)

// A Report is one JSON object in which a job says what it made, or why it
// could not. The protocol passes it on unread; what is in it is between the
// job's program and whoever reads the outcome. It was written by a job, so
// it is to be believed no more than the job.
//
// A Report is compact, and safe to stand in a line of HTML, so that it comes
// out of an event as it went in.
type Report json.RawMessage

// ErrReport: what a job left as its report is none.
var ErrReport = errors.New("not a report")

// maxReportDepth bounds what readers have to recurse into.
const maxReportDepth = 64

// ParseReport reads what a job wrote.
func ParseReport(data []byte) (Report, error) {
	if len(data) > MaxReport {
		return nil, fmt.Errorf("parse report: %w: %d bytes, at most %d", ErrReport, len(data), MaxReport)
	}
	return parseReport(data)
}

func parseReport(data []byte) (Report, error) {
	data = bytes.TrimSpace(data)
	switch {
	case !utf8.Valid(data):
		return nil, fmt.Errorf("parse report: %w: not UTF-8", ErrReport)
	case !json.Valid(data):
		return nil, fmt.Errorf("parse report: %w: not one JSON value", ErrReport)
	case data[0] != '{':
		return nil, fmt.Errorf("parse report: %w: not a JSON object", ErrReport)
	}
	if d := depth(data); d > maxReportDepth {
		return nil, fmt.Errorf("parse report: %w: %d levels deep, at most %d", ErrReport, d, maxReportDepth)
	}
	var compact, safe bytes.Buffer
	if err := json.Compact(&compact, data); err != nil {
		return nil, fmt.Errorf("parse report: %w: %w", ErrReport, err)
	}
	json.HTMLEscape(&safe, compact.Bytes())
	return safe.Bytes(), nil
}

// depth counts how deep the arrays and objects of valid JSON lie in one
// another.
func depth(data []byte) int {
	deepest, now, inString := 0, 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

// MarshalJSON implements [json.Marshaler].
func (r Report) MarshalJSON() ([]byte, error) {
	if r == nil {
		return []byte("null"), nil
	}
	return r, nil
}

// UnmarshalJSON implements [json.Unmarshaler].
func (r *Report) UnmarshalJSON(data []byte) error {
	if string(data) == "null" {
		*r = nil
		return nil
	}
	// Escaped for the line, it can be longer than it was written.
	parsed, err := parseReport(data)
	*r = parsed
	return err
}
