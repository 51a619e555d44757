package imagebuild

import (
	"errors"
	"slices"
	"strings"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nixlog"
)

// messages is an explained error with all that Nix said.
type messages struct {
	error
	nix []nixlog.Error
}

func (m *messages) Unwrap() error { return m.error }

// Explain says a failure: the cause first, then Nix's own words in full.
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
	var m *messages
	if !errors.As(err, &m) || len(m.nix) == 0 {
		return
	}
	say("")
	say("In Nix's own words:")
	var said []string
	for _, n := range m.nix {
		if slices.Contains(said, n.Message) {
			continue
		}
		said = append(said, n.Message)
		for line := range strings.SplitSeq(n.Message, "\n") {
			say(line)
		}
	}
}
