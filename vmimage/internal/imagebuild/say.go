package imagebuild

import (
	"errors"
	"regexp"
	"slices"
	"strings"

	"osbuilder/vmimage/internal/explain"
)

// Explain says a failure: the cause first, then Nix's own words.
func Explain(e explain.Explanation, err error, say func(line string)) {
	say("")
	say("FAILED (" + string(e.Class) + "): " + e.Summary)
	if e.At != "" {
		say("  at " + e.At)
	}
	for _, line := range e.Lines {
		say("  | " + line)
	}
	if e.Advice != "" {
		say("What to do: " + e.Advice)
	}
	var m *explain.Error
	if !errors.As(err, &m) || len(m.Said) == 0 {
		return
	}
	say("")
	say("In Nix's own words:")
	var said []string
	for _, n := range m.Said {
		if slices.Contains(said, n.Message) {
			continue
		}
		said = append(said, n.Message)
		for line := range strings.SplitSeq(n.Message, "\n") {
			say(line)
		}
	}
}

// retry is the part of a warning that differs each time.
var retry = regexp.MustCompile(`retrying in [\d.]+ m?s`)

// onceWarned lets each warning through once: every command of Nix finds anew
// that a cache can't be reached.
func onceWarned(say func(line string)) func(line string) {
	seen := map[string]bool{}
	return func(line string) {
		if strings.HasPrefix(line, "warning:") {
			key := retry.ReplaceAllString(line, "")
			if seen[key] {
				return
			}
			seen[key] = true
		}
		say(line)
	}
}
