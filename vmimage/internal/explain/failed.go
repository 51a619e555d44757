package explain

import (
	"errors"

	"osbuilder/vmimage/internal/nix"
	"osbuilder/vmimage/internal/nixlog"
)

// Failed explains a Nix command that did not succeed. With adds what the
// caller knows beyond the command; it may be nil.
func Failed(step Step, log *nixlog.Log, err error, with func(*Facts)) error {
	var exit *nix.ExitError
	if !errors.As(err, &exit) {
		return err // it never ran
	}
	f := FactsOf(step, log)
	f.Signal, f.Stopped = exit.Signal, exit.Stopped
	if with != nil {
		with(&f)
	}
	return &Error{Explanation: Explain(f), Cause: err, Said: log.Errors()}
}
