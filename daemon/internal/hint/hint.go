// Package hint lets an error carry what the user can do about it, apart from
// what happened, so that the one place that shows errors can set them apart.
package hint

import "errors"

type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

// With returns err with a hint for the user: whole sentences that say what to
// do. It is nil if err is.
func With(err error, hint string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, hint}
}

// Of returns the hints that err carries, in the order of their errors, each
// once.
func Of(err error) []string {
	var hints []string
	seen := map[string]bool{}
	var walk func(error)
	walk = func(err error) {
		if h, ok := err.(*hinted); ok && !seen[h.hint] { //nolint:errorlint // every link of the chain is looked at in turn
			seen[h.hint] = true
			hints = append(hints, h.hint)
		}
		switch u := err.(type) { //nolint:errorlint // as above
		case interface{ Unwrap() []error }:
			for _, e := range u.Unwrap() {
				walk(e)
			}
		default:
			if next := errors.Unwrap(err); next != nil {
				walk(next)
			}
		}
	}
	if err != nil {
		walk(err)
	}
	return hints
}
