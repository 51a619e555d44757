package explain

import (
	"errors"

	"osbuilder/vmimage/internal/nix"
	"osbuilder/vmimage/internal/nixlog"
)

// Failed explains a Nix command that did not succeed. With adds what the
// caller knows beyond the command.
func Failed(step Step, log *nixlog.Log, err error, with func(*Facts)) error {
	var exit *nix.ExitError
	if !errors.As(err, &exit) {
		return err // it never ran
	}
	f := FactsOf(step, log)
	f.Signal, f.Stopped = exit.Signal, exit.Stopped
	with(&f)
	return &Error{Explanation: Explain(f), Cause: err}
}
