package job

import (
	"encoding/json"
	"strings"
	"unicode"

	"osbuilder/pipe"
)

// A Failure is what a job's report says about why it failed. The job's own
// program wrote it: plain lines of bounded length, to be shown and no more.
type Failure struct {
	Class   string // of the error, such as "evaluation" or "disk"
	Summary string // what happened
	At      string // where: file, line, column of the user's own file; can be empty
	Advice  string // what to do
}

// Text is the failure in one line.
func (f Failure) Text() string {
	if f.At == "" {
		return f.Summary
	}
	return f.Summary + " (at " + f.At + ")"
}

// report is what the sidecar reads of a report; the rest is passed on.
type report struct {
	Nix   string `json:"nix"`
	Error *struct {
		Class   string `json:"class"`
		Summary string `json:"summary"`
		At      string `json:"at"`
		Advice  string `json:"advice"`
	} `json:"error"`
}

// ReportedFailure returns what a report says about a failure, and whether it
// says anything.
func ReportedFailure(r pipe.Report) (Failure, bool) {
	var v report
	if len(r) == 0 || json.Unmarshal(r, &v) != nil || v.Error == nil {
		return Failure{}, false
	}
	f := Failure{
		Class: line(v.Error.Class, 40), Summary: line(v.Error.Summary, 500),
		At: line(v.Error.At, 300), Advice: line(v.Error.Advice, 1000),
	}
	if f.Summary == "" {
		return Failure{}, false
	}
	return f, true
}

// ReportedNix returns the version of Nix that a report names.
func ReportedNix(r pipe.Report) string {
	var v report
	if len(r) == 0 || json.Unmarshal(r, &v) != nil {
		return ""
	}
	return line(v.Nix, 40)
}

// line makes one line of at most n characters that a terminal can show.
func line(s string, n int) string {
	s = strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return -1
		}
		return r
	}, strings.ToValidUTF8(s, "�"))
	s = strings.Join(strings.Fields(s), " ")
	if runes := []rune(s); len(runes) > n {
		return string(runes[:n-1]) + "…"
	}
	return s
}
