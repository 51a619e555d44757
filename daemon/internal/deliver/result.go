package deliver

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// Of a log's end so much goes into result.json.
const (
	lastLines = 20
	tailBytes = 64 << 10
)

// A Result is what result.json holds. Times are UTC, sizes bytes.
type Result struct {
	Version     int         `json:"version"` // of this form
	Job         job.ID      `json:"job"`
	Name        string      `json:"name"`
	Drop        string      `json:"drop"`
	Status      pipe.Status `json:"status"`
	ExitCode    *int        `json:"exit_code,omitempty"`
	Signal      string      `json:"signal,omitempty"`
	Reason      string      `json:"reason,omitempty"`
	At          string      `json:"at,omitempty"`     // where the cause is in the user's own files
	Advice      string      `json:"advice,omitempty"` // what to do about it
	LastLines   []string    `json:"last_lines"`       // of build.log
	Attempts    int         `json:"attempts"`
	Created     time.Time   `json:"created"`
	Started     time.Time   `json:"started,omitzero"`  // of the last attempt
	Finished    time.Time   `json:"finished,omitzero"` // when the outcome was known
	Duration    int64       `json:"duration_ms"`       // of the last attempt
	Builder     string      `json:"builder,omitempty"`
	Image       string      `json:"vm_image,omitempty"`
	Memory      int64       `json:"memory,omitempty"` // peak
	MemoryScope string      `json:"memory_scope,omitempty"`
	Artifacts   []Artifact  `json:"artifacts"`

	Versions Versions    `json:"versions"`
	Inputs   *job.Inputs `json:"inputs,omitempty"` // the archive that the VM was given
	NixOS    *job.NixOS  `json:"nixos,omitempty"`  // what was asked for
	// Report is what the job's program says of itself: for a NixOS
	// configuration nixpkgs and its hash, times, derivation, store paths, size.
	Report pipe.Report `json:"report,omitempty"`
}

// Versions are of what took part.
type Versions struct {
	Sidecar string `json:"sidecar"`
	Runner  string `json:"runner,omitempty"`
	Nix     string `json:"nix,omitempty"`
}

// An Artifact is a file in the job's folder that the job made.
type Artifact struct {
	Name   string `json:"name"` // its path in the folder
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"`
	// MadeAs is the job's own name for it, where it could not have that one.
	MadeAs string `json:"made_as,omitempty"`
}

func result(j job.Job, files []file, log string) ([]byte, error) {
	lines, err := LastLines(log, lastLines)
	if err != nil {
		return nil, fmt.Errorf("read the last lines of the build log: %w", err)
	}
	r := Result{
		Version: 1, Job: j.ID, Name: j.Name, Drop: j.Drop, LastLines: lines, Attempts: j.Attempt,
		Created: j.Created.UTC(), Started: j.Started.UTC(), Builder: j.Builder, Image: j.Image,
		Status: pipe.StatusFailed, Artifacts: []Artifact{},
		Versions: Versions{Sidecar: pipe.Release, Runner: j.Runner}, Inputs: j.Inputs, NixOS: j.NixOS,
	}
	for _, step := range j.History {
		if step.Event == job.Finished {
			r.Finished, r.Reason = step.Time.UTC(), step.Reason
		}
	}
	if f := j.Result; f != nil {
		r.Status, r.ExitCode, r.Signal, r.Reason = f.Status, f.ExitCode, f.Signal, f.Reason
		r.Duration, r.Memory, r.MemoryScope = f.Duration, f.Memory, f.Scope
		r.Report, r.Versions.Nix = f.Report, job.ReportedNix(f.Report)
		if failure, ok := job.ReportedFailure(f.Report); ok && f.Status != pipe.StatusSucceeded {
			r.At, r.Advice = failure.At, failure.Advice
			if r.Reason == "" {
				r.Reason = failure.Text()
			}
		}
	}
	for _, f := range files {
		r.Artifacts = append(r.Artifacts, f.told())
	}
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("write %s: %w", resultName, err)
	}
	return append(b, '\n'), nil
}

// LastLines returns up to n lines from the end of a log, fit to be shown:
// valid UTF-8 without control characters. It reads no more than the last
// 64 KiB; of an absent log there are none.
func LastLines(path string, n int) ([]string, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return []string{}, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	from := max(0, info.Size()-tailBytes)
	tail := make([]byte, info.Size()-from)
	read, err := f.ReadAt(tail, from)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	text := strings.TrimSuffix(string(tail[:read]), "\n")
	if text == "" {
		return []string{}, nil
	}
	lines := strings.Split(text, "\n")
	if from > 0 && len(lines) > 1 {
		lines = lines[1:] // its beginning was not read
	}
	lines = lines[max(0, len(lines)-n):]
	for i, line := range lines {
		lines[i] = printable(line)
	}
	return lines, nil
}

// printable keeps of a line what a terminal can show: of parts that a carriage
// return would have overwritten only the last stays, escape sequences and
// control characters go.
func printable(line string) string {
	line = strings.TrimRight(line, "\r")
	line = line[strings.LastIndexByte(line, '\r')+1:]
	var b strings.Builder
	for len(line) > 0 {
		if n := escape(line); n > 0 {
			line = line[n:]
			continue
		}
		r, size := utf8.DecodeRuneInString(line)
		line = line[size:]
		switch {
		case r == '\t', unicode.IsPrint(r): // an invalid byte is a RuneError, which prints
			b.WriteRune(r)
		}
	}
	return b.String()
}

// escape returns the length of the terminal's escape sequence that s begins
// with, or 0: CSI up to its final byte, OSC up to BEL or ST.
func escape(s string) int {
	if len(s) < 2 || s[0] != 0x1b || s[1] >= utf8.RuneSelf {
		return 0
	}
	switch s[1] {
	case '[':
		for i := 2; i < len(s); i++ {
			if s[i] >= 0x40 && s[i] <= 0x7e {
				return i + 1
			}
			if s[i] < 0x20 || s[i] > 0x7e {
				return i
			}
		}
		return len(s)
	case ']':
		for i := 2; i < len(s); i++ {
			if s[i] == 0x07 {
				return i + 1
			}
			if s[i] == 0x1b {
				if strings.HasPrefix(s[i:], "\x1b\\") {
					return i + 2
				}
				return i
			}
		}
		return len(s)
	}
	return 2
}
