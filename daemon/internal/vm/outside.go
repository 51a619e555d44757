package vm

import (
	"errors"
	"fmt"
	"net"

	"osbuilder/daemon/internal/console"
)

// outside looks, where the way to the VM ends before its SSH server, whether
// it can be seen from outside why: a lower rung is broken then.
func outside(c console.Console, err error) error {
	var broken *RungError
	if !errors.As(err, &broken) || broken.Rung != RungTCP && broken.Rung != RungSSH {
		return err
	}
	var dns *net.DNSError
	why := c.Trouble(errors.As(err, &dns) && dns.IsNotFound) // Docker's DNS knows the containers that run
	if why == nil {
		return err
	}
	return seenOutside(why, broken.Err)
}

// A seenError is what can be seen from outside, and what was met on the way:
// of no use to a person, but to who reads the log later.
type seenError struct{ seen, met error }

func (e *seenError) Error() string   { return fmt.Sprintf("%v (%v)", e.seen, e.met) }
func (e *seenError) Unwrap() []error { return []error{e.seen, e.met} }

func seenOutside(why, met error) *RungError {
	return &RungError{seenRung(why), &seenError{why, met}}
}

// imageSteps is what is news of an image besides its rung: its making has
// steps. What was met on the way is another each time, down to a port's
// number, and so is the time at which a kernel panics.
func imageSteps(err error) string {
	var e *seenError
	if errors.As(err, &e) && errors.Is(e.seen, console.ErrNoImage) {
		return e.seen.Error()
	}
	return ""
}

// stopped is why a VM that was there is not any more, where that can be seen
// from outside: nil if nothing is known.
func stopped(c console.Console) error {
	why := c.Trouble(false)
	if errors.Is(why, console.ErrPaused) || errors.Is(why, console.ErrEnded) {
		return why
	}
	return nil // of what the console said on the way up
}

// seenRung returns the rung that is broken when the VM's containers say why.
func seenRung(why error) Rung {
	switch {
	case errors.Is(why, console.ErrNoImage), errors.Is(why, console.ErrUnusable):
		return RungImage
	case errors.Is(why, console.ErrNoAddress):
		return RungAddress
	default:
		return RungQEMU
	}
}
