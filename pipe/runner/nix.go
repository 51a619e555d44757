package runner

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// Of Nix's worker protocol, how every connection begins
// (src/libstore/worker-protocol.hh): both say what they are and which version
// they speak, we name two things that have no meaning any more, and the daemon
// says that it is ready.
const (
	nixClient  = 0x6e697863
	nixDaemon  = 0x6478696f // said once the daemon has opened its store and database
	nixVersion = 1<<8 | 32  // the last that needs no more than that
	nixReady   = 0x616c7473
)

const (
	// nixPatience bounds the wait for the daemon: the first connection starts
	// it, which takes seconds in a VM without KVM.
	nixPatience = 30 * time.Second
	// nixBusy bounds it where Nix works, for it may just have much to do: who
	// is told that it is broken may throw the VM's store away.
	nixBusy = commandTimeout
	// nixFirst bounds it at the runner's start, which all else waits for.
	nixFirst = 3 * time.Second
	// nixEvery is how often a Nix that is broken is looked at again: a full disk
	// can be all that ails it, and jobs wait.
	nixEvery = 10 * time.Second
	// nixCalm is how often one that works is looked at.
	nixCalm = time.Minute
)

// checkNix reports what is wrong with the daemon behind socket.
func checkNix(ctx context.Context, socket string, patience time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", socket)
	if err != nil {
		return fmt.Errorf("nobody listens for it: %w", err)
	}
	defer conn.Close()
	// The connection knows no context.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	switch err := greetNix(conn); {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("nix-daemon does not answer within %s", patience)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNRESET):
		return errors.New("nix-daemon closes the connection: as a rule it can't open its store or database, and its journal says why")
	case err != nil:
		return err
	}
	return nil
}

// greetNix begins a connection, all of it: the daemon would log an error else.
func greetNix(conn net.Conn) error {
	write := func(values ...uint64) error { return binary.Write(conn, binary.LittleEndian, values) }
	read := func() (value uint64, err error) {
		err = binary.Read(conn, binary.LittleEndian, &value)
		return value, err
	}
	if err := write(nixClient); err != nil {
		return fmt.Errorf("ask nix-daemon: %w", err)
	}
	answer, err := read()
	if err != nil {
		return fmt.Errorf("ask nix-daemon: %w", err)
	}
	if answer != nixDaemon {
		return fmt.Errorf("what listens at %s is no nix-daemon", conn.RemoteAddr())
	}
	// It is there, and its store is open; a later version that wants more of us is none the worse.
	version, err := read()
	if err == nil && write(min(version, nixVersion), 0, 0) == nil {
		for value := uint64(0); err == nil && value != nixReady; {
			value, err = read()
		}
	}
	return nil
}

// lookAtNix notes whether this VM's Nix works, for hello.
func (r *Runner) lookAtNix(ctx context.Context, patience time.Duration) string {
	if r.cfg.NixSocket == "" {
		return ""
	}
	err := checkNix(ctx, r.cfg.NixSocket, patience)
	if err == nil || ctx.Err() != nil {
		return ""
	}
	return "Nix is broken: " + err.Error()
}

// watchNix looks at Nix for as long as the runner lives, and says hello anew
// whenever what it finds has changed. The first look had little time, so another
// follows at once if that found it broken.
func (r *Runner) watchNix(ctx context.Context, said string) {
	if r.cfg.NixSocket == "" {
		return
	}
	wait, doubt := time.Duration(0), false
	if said == "" {
		wait = nixCalm
	}
	for {
		if wait > 0 && !pause(ctx, cmp.Or(r.cfg.NixEvery, wait)) {
			return
		}
		patience := nixPatience
		if said == "" {
			patience = nixBusy
		}
		now := r.lookAtNix(ctx, cmp.Or(r.cfg.nixPatience, patience))
		if ctx.Err() != nil {
			return
		}
		// One that worked may just be busy, or be started anew: it is broken if the next look finds it so.
		doubt = said == "" && now != "" && !doubt
		if !doubt && now != said && r.sayNix(ctx, now) {
			said = now
		}
		wait = nixEvery
		if said == "" && now == "" {
			wait = nixCalm
		}
	}
}

// sayNix says hello anew, and reports whether it is said.
func (r *Runner) sayNix(ctx context.Context, unfit string) bool {
	r.logf("%s", cmp.Or(unfit, "Nix works"))
	err := r.call(ctx, func() error {
		r.unfit = unfit
		return r.say(pipe.Event{Type: pipe.TypeHello, Hello: r.hello()}, true)
	})
	if err != nil {
		r.logf("%v", err)
	}
	return err == nil
}
