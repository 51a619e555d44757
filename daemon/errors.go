package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/logging"
)

// The exit codes, besides 0.
const (
	exitFailed = 1   // something went wrong
	exitUsage  = 2   // settings, Compose project or command line are wrong: starting again won't help
	exitAtOnce = 130 // a second signal
)

// usageError: the command line is wrong.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// logError: what shows it is the log, each line of which is an object.
type logError struct{ error }

func (e logError) Unwrap() error { return e.error }

// explain shows what happened and what to do, and returns the exit code. All
// errors that a user sees at the end of the program pass here:
//
//	osbuilder: what happened
//	hint: what to do
//
// or, of a [logError], the same as the log's last line.
func explain(w io.Writer, err error) int {
	if err == nil || stopAskedFor(err) {
		return 0
	}
	code, hints := exitFailed, hint.Of(err)
	var usage usageError
	switch {
	case errors.As(err, &usage), strings.HasPrefix(err.Error(), "unknown command"):
		code = exitUsage
		hints = append(hints, "osbuilder --help lists the commands.")
	case errors.Is(err, config.ErrSettings), errors.Is(err, config.ErrProject):
		code = exitUsage
	}
	if line := (logError{}); errors.As(err, &line) && logging.Last(w, err, strings.Join(hints, " ")) == nil {
		return code
	}
	fmt.Fprintf(w, "osbuilder: %s\n", shown(err.Error()))
	for _, h := range hints {
		fmt.Fprintf(w, "hint: %s\n", shown(h))
	}
	return code
}

// shown is text as a terminal may have it: an error can quote what others wrote.
// Its lines stay.
func shown(text string) string {
	lines := strings.Split(text, "\n")
	for i, line := range lines {
		lines[i] = logging.Clean(line)
	}
	return strings.Join(lines, "\n")
}

// stopAskedFor reports that err is a stop that was asked for and nothing besides:
// an error that came while stopping must not go under.
func stopAskedFor(err error) bool {
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range many.Unwrap() {
			if !stopAskedFor(e) {
				return false
			}
		}
		return true
	}
	if next := errors.Unwrap(err); next != nil {
		return stopAskedFor(next)
	}
	return err == context.Canceled //nolint:errorlint // as above
}
