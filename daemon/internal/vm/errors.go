package vm

import (
	"errors"
	"fmt"
	"io"
	"net"
	"strings"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"

	"osbuilder/daemon/internal/hint"
)

var (
	// ErrDown says: there is no link to the VM, or it died under the call. Wrapped
	// together with the cause, where one is known.
	ErrDown = errors.New("the link to the VM is down")
	// ErrDamaged says: pipe_out is not what the runner wrote. With the cause.
	ErrDamaged = errors.New("pipe_out was damaged by other hands")
	// ErrGone says: the file or the part of it where reading should go on is not
	// there any more.
	ErrGone = errors.New("events that were not read are gone")
	// ErrShrunk says: a file of events became shorter than what was read of it.
	ErrShrunk = errors.New("the file became shorter")
	// ErrShort says: a file ended before the size that the VM gives for it, or the
	// VM's SSH server sent less than it was asked for.
	ErrShort = errors.New("the file came short")
	// ErrNoDisk says: the VM has no data disk that it may use, so nothing that it
	// takes would last.
	ErrNoDisk = errors.New("the VM has no data disk that it can use")
	// ErrFull says: the disk of the VM on which the pipe lies takes no more.
	ErrFull = errors.New("no room on the VM's data disk")
	// ErrStalled says: nothing came for longer than the bound.
	ErrStalled = errors.New("the VM went silent")
)

// A Rung is one step of the ladder that a link climbs before it is up.
type Rung string

// The rungs, in the order in which they are climbed.
const (
	RungImage    Rung = "image"    // there is an image, and it boots
	RungQEMU     Rung = "qemu"     // QEMU runs, and did not stop the VM
	RungAddress  Rung = "address"  // the VM has an address
	RungTCP      Rung = "tcp"      // the VM's container takes a connection; proves nothing about the VM, since QEMU takes it
	RungSSH      Rung = "ssh"      // the VM's SSH server greets and agrees on keys
	RungHostKey  Rung = "host key" // it is the VM we made a key for
	RungUserKey  Rung = "user key" // it lets us in
	RungSFTP     Rung = "sftp"     // it serves files, with the extensions that safe writing needs
	RungDisk     Rung = "disk"     // the VM has its data disk
	RungPipe     Rung = "pipe"     // the runner began a pipe_out
	RungProtocol Rung = "protocol" // the runner speaks our version
	RungLink     Rung = "link"     // it was up, and broke
)

// hints are what to do; $VM is the builder, which is the name of its service.
var hints = map[Rung]string{
	RungImage:   "see what became of its making: docker compose logs vmimage",
	RungQEMU:    "see what its container says: docker compose logs $VM",
	RungAddress: "restart the VM: docker compose restart $VM",
	RungTCP:     "the VM's container does not run, or the VM is still starting: docker compose ps, docker compose logs $VM vmimage",
	RungSSH:     "the VM is probably still starting; its console: docker compose logs $VM",
	RungHostKey: "the VM doesn't have the host key that `init` made for it; restart the VM so that it takes it: docker compose restart $VM. If another machine answers at this address, remove that",
	RungUserKey: "the VM doesn't know the sidecar's key; restart the VM so that it takes it: docker compose restart $VM",
	RungSFTP:    "the VM wants an OpenSSH server with its sftp subsystem (Subsystem sftp internal-sftp in its sshd_config); make the VM's image anew: docker compose up -d --build vmimage, then docker compose restart $VM",
	RungDisk: "the VM touches no disk that it does not know: what it found stands on its console, docker compose logs $VM. " +
		"Save what you need of data.img in the volume vm-storage, remove it, then: docker compose restart $VM",
	RungPipe:     "the runner in the VM has not started; its console says why: docker compose logs $VM",
	RungProtocol: "sidecar and VM image are of different versions; bring both up to date: docker compose up -d --build, then docker compose restart $VM",
	RungLink:     "it is connected again by itself, and a job that runs goes on meanwhile",
}

// moreSessions is what to do where the VM's SSH server refuses another session.
const moreSessions = "the VM's SSH server allows too few sessions on one connection: raise MaxSessions in its sshd_config, or remove it there, which makes it 10"

// refused reports whether the server wanted no further session.
func refused(err error) bool {
	var open *ssh.OpenChannelError
	return errors.As(err, &open)
}

// A RungError says which rung of the ladder broke, and what to do.
type RungError struct {
	Rung Rung
	Err  error
}

// Error implements error.
func (e *RungError) Error() string { return fmt.Sprintf("%s: %v", e.Rung, e.Err) }

// Unwrap returns the cause.
func (e *RungError) Unwrap() error { return e.Err }

// Step names the rung.
func (e *RungError) Step() string { return string(e.Rung) }

// Hint says what a person can do about it, with the builder of that name.
func (e *RungError) Hint(builder string) string {
	if e.Rung == RungSFTP && refused(e.Err) {
		return moreSessions
	}
	if own := hint.Of(e.Err); len(own) > 0 {
		return strings.Join(own, " ")
	}
	return strings.ReplaceAll(hints[e.Rung], "$VM", builder)
}

// connectionLost reports whether err, from an SSH or SFTP call, means that
// the connection is of no use any more.
func connectionLost(err error) bool {
	var local *localError
	if errors.As(err, &local) {
		return false
	}
	var status *sftp.StatusError
	if errors.As(err, &status) {
		return status.FxCode() == sftp.ErrSSHFxConnectionLost || status.FxCode() == sftp.ErrSSHFxNoConnection
	}
	var op *net.OpError
	return errors.Is(err, sftp.ErrSSHFxConnectionLost) || errors.Is(err, sftp.ErrSSHFxNoConnection) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) || errors.As(err, &op)
}
