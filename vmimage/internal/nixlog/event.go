package nixlog

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"
)

// Activity types of the format; others exist and are let through.
const (
	CopyPath     = 100
	FileTransfer = 101
	Realise      = 102
	CopyPaths    = 103
	Builds       = 104
	Build        = 105
	Substitute   = 108
)

// Result types.
const (
	LogLine     = 101
	SetPhase    = 104
	Progress    = 105
	SetExpected = 106
)

// Levels of messages.
const (
	levelError = 0
	levelWarn  = 1
	levelInfo  = 3
)

// prefix begins a line of the format.
const prefix = "@nix "

// An event is one line of the format. What the line doesn't have is zero.
type event struct {
	Action string            `json:"action"` // start, stop, result, msg
	ID     uint64            `json:"id"`
	Type   int               `json:"type"`
	Level  int               `json:"level"`
	Text   string            `json:"text"`
	Fields []json.RawMessage `json:"fields"`

	Msg    string          `json:"msg"`
	RawMsg string          `json:"raw_msg"`
	File   *string         `json:"file"`
	Line   *int            `json:"line"`
	Column *int            `json:"column"`
	Phase  string          `json:"phase"`
	Parent json.RawMessage `json:"parent"`
}

// parse reads a line of the format; false is any other text.
func parse(line []byte) (event, bool) {
	rest, ok := bytes.CutPrefix(line, []byte(prefix))
	if !ok {
		return event{}, false
	}
	var e event
	if err := json.Unmarshal(rest, &e); err != nil || e.Action == "" {
		return event{}, false
	}
	return e, true
}

// number is field i, if it is one.
func (e event) number(i int) (int64, bool) {
	if i >= len(e.Fields) {
		return 0, false
	}
	var n int64
	err := json.Unmarshal(e.Fields[i], &n)
	return n, err == nil
}

// text is field i, if it is one.
func (e event) text(i int) string {
	if i >= len(e.Fields) {
		return ""
	}
	var s string
	if json.Unmarshal(e.Fields[i], &s) != nil {
		return ""
	}
	return s
}

// A Position is a place in a Nix file.
type Position struct {
	File         string
	Line, Column int
}

// String is the usual FILE:LINE:COLUMN.
func (p Position) String() string {
	switch {
	case p.Line <= 0:
		return p.File
	case p.Column <= 0:
		return fmt.Sprintf("%s:%d", p.File, p.Line)
	default:
		return fmt.Sprintf("%s:%d:%d", p.File, p.Line, p.Column)
	}
}

// position is where Nix says an error is; no file if it says nothing. Some
// versions repeat line and column in the file's name.
func (e event) position() Position {
	if e.File == nil || strings.HasPrefix(*e.File, "«") {
		return Position{}
	}
	p := Position{File: *e.File}
	if e.Line != nil {
		p.Line = *e.Line
	}
	if e.Column != nil {
		p.Column = *e.Column
	}
	p.File = strings.TrimSuffix(p.File, fmt.Sprintf(":%d:%d", p.Line, p.Column))
	return p
}

// An Error is a message of level 0 that is no warning.
type Error struct {
	Message string // as Nix shows it, with its trace, in several lines
	Cause   string // without the trace; empty where this Nix doesn't give it
	At      Position
}
