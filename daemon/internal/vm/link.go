package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pkg/sftp"
	"golang.org/x/crypto/ssh"
)

// maxPacket is the largest read that OpenSSH's sftp-server answers in full:
// 256 KiB less 1 KiB for the packet's frame (sftp-server.c, SFTP_MAX_READ_LENGTH).
// With more, pkg/sftp takes the shorter answer for the file's end and loses
// data without an error.
const maxPacket = 261120

// A link is one SSH connection with one SFTP session on it. Once it is
// closed every call on it ends; it is never opened again.
type link struct {
	conn net.Conn
	ssh  *ssh.Client
	sftp *sftp.Client
	t    Timings

	done chan struct{} // closed when the link is

	mu    sync.Mutex // guards cause, and the start of goroutines against shut
	cause error
	wg    sync.WaitGroup
}

// dial climbs the ladder up to SFTP.
func dial(ctx context.Context, cfg Config) (*link, error) {
	t := cfg.Timings
	conn, err := connect(ctx, cfg)
	if err != nil {
		return nil, &RungError{RungTCP, err}
	}
	client, err := handshake(ctx, conn, cfg)
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	l := &link{conn: conn, ssh: client, t: t, done: make(chan struct{})}
	l.start(func() { // nothing else tells that the connection ended
		l.close(fmt.Errorf("the SSH connection ended: %w", client.Wait()))
	})
	l.start(l.keepalive)
	l.sftp, err = call(ctx, l, t.Handshake, "start SFTP", func() (*sftp.Client, error) { return opening(l, newSFTP) })
	if err != nil {
		rung := RungSFTP
		if l.reason() != nil {
			rung = RungSSH // not SFTP alone is missing: the connection is
		}
		l.close(err)
		l.shut()
		return nil, &RungError{rung, err}
	}
	return l, nil
}

func connect(ctx context.Context, cfg Config) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, cfg.Timings.Dial)
	defer cancel()
	if cfg.Dial != nil {
		return cfg.Dial(ctx, "tcp", cfg.Addr)
	}
	var dialer net.Dialer
	return dialer.DialContext(ctx, "tcp", cfg.Addr)
}

// handshake makes an SSH connection of conn, and tells which rung broke.
func handshake(ctx context.Context, conn net.Conn, cfg Config) (*ssh.Client, error) {
	// SSH knows no context: what it waits for ends with the connection.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetDeadline(time.Now().Add(cfg.Timings.Handshake)); err != nil {
		return nil, &RungError{RungSSH, err}
	}
	heard := &hearing{Conn: conn}
	var hostKeyErr error
	hostKeyOK := false
	c, channels, requests, err := ssh.NewClientConn(heard, cfg.Addr, &ssh.ClientConfig{
		Config: ssh.Config{
			// Curve25519 alone first: the hybrid with ML-KEM costs a VM without KVM seconds.
			KeyExchanges: []string{
				ssh.KeyExchangeCurve25519, ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeECDHP256,
			},
			RekeyThreshold: cfg.RekeyAfter,
		},
		User: cfg.User,
		Auth: []ssh.AuthMethod{ssh.PublicKeys(cfg.Signer)},
		HostKeyCallback: func(host string, addr net.Addr, key ssh.PublicKey) error {
			hostKeyErr = cfg.HostKeys(host, addr, key)
			hostKeyOK = hostKeyErr == nil
			if hostKeyErr != nil {
				hostKeyErr = fmt.Errorf("%s answers with the unknown key %s: %w", cfg.Addr, ssh.FingerprintSHA256(key), hostKeyErr)
			}
			return hostKeyErr
		},
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
	})
	if err == nil {
		if err = conn.SetDeadline(time.Time{}); err == nil {
			client := ssh.NewClient(c, channels, requests)
			heard.client.Store(client)
			return client, nil
		}
		_ = c.Close()
	}
	var algorithms *ssh.AlgorithmNegotiationError
	switch {
	case hostKeyErr != nil:
		return nil, &RungError{RungHostKey, hostKeyErr}
	case errors.As(err, &algorithms) && algorithms.What == "host key":
		return nil, &RungError{RungHostKey, fmt.Errorf("%s has no ed25519 host key: %w", cfg.Addr, err)}
	case hostKeyOK && strings.Contains(err.Error(), "unable to authenticate"): // x/crypto has no type for it
		return nil, &RungError{RungUserKey, fmt.Errorf("%s refuses user %s with key %s: %w",
			cfg.Addr, cfg.User, ssh.FingerprintSHA256(cfg.Signer.PublicKey()), err)}
	default:
		return nil, &RungError{RungSSH, heard.explain(cfg, err)}
	}
}

// What is behind a port that is open: QEMU, or Docker, takes connections
// whether or not the VM does.
var (
	// ErrNoGreeting says: nothing came, or no SSH server's words.
	ErrNoGreeting = errors.New("the port is open, and no SSH server greets behind it")
	// ErrSlow says: a greeting came, and then no agreement in time.
	ErrSlow = errors.New("the SSH server greets, and goes no further")
)

// hearing is a connection that knows how what was read from it begins, and
// sees to its end.
type hearing struct {
	net.Conn
	first  []byte
	client atomic.Pointer[ssh.Client] // nil until there is one
}

const (
	greeting = "SSH-" // how the line begins by which an SSH server greets
	// maxGreeting is how much of what comes is kept: x/crypto gives up there, too.
	maxGreeting = 255
)

func (h *hearing) Read(p []byte) (int, error) {
	n, err := h.Conn.Read(p)
	if len(h.first) < maxGreeting {
		h.first = append(h.first, p[:min(n, maxGreeting-len(h.first))]...)
	}
	if err != nil {
		h.end()
	}
	return n, err
}

// end has the SSH library learn that nothing can be written any more before it
// learns that nothing can be read: see opening.
func (h *hearing) end() {
	_ = h.Close()
	client := h.client.Load()
	if client == nil {
		return
	}
	failed := make(chan struct{})
	go func() {
		defer close(failed)
		_, _, _ = client.SendRequest(keepaliveRequest, false, nil)
	}()
	// While keys are agreed on, a write may wait for what is read.
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	select {
	case <-failed:
	case <-timer.C:
	}
}

// explain says of a handshake that failed what was met.
func (h *hearing) explain(cfg Config, err error) error {
	late := errors.Is(err, os.ErrDeadlineExceeded)
	switch greeted := bytes.HasPrefix(h.first, []byte(greeting)) || bytes.Contains(h.first, []byte("\n"+greeting)); {
	case greeted && late:
		return fmt.Errorf("%w: %s, within %s: %w", ErrSlow, cfg.Addr, cfg.Timings.Handshake, err)
	case greeted:
		return err
	case late && len(h.first) == 0:
		return fmt.Errorf("%w: no SSH greeting from %s within %s: %w", ErrNoGreeting, cfg.Addr, cfg.Timings.Handshake, err)
	case len(h.first) == 0:
		return fmt.Errorf("%w: %s closes the connection: %w", ErrNoGreeting, cfg.Addr, err)
	default:
		return fmt.Errorf("%w: %s says %.40q: %w", ErrNoGreeting, cfg.Addr, h.first, err)
	}
}

// newSFTP opens an SFTP session with all that safe writing and whole reading
// need of the server.
func newSFTP(client *ssh.Client) (*sftp.Client, error) {
	c, err := sftp.NewClient(client,
		sftp.MaxPacketUnchecked(maxPacket),
		sftp.MaxConcurrentRequestsPerFile(64),
		sftp.UseConcurrentReads(true),
		sftp.UseFstat(true), // the size of the file that is open, not of another under its name
	)
	if err != nil {
		return nil, fmt.Errorf("open an SFTP session: %w", sessionError(client, err))
	}
	for _, name := range []string{"posix-rename@openssh.com", "fsync@openssh.com"} {
		if version, ok := c.HasExtension(name); !ok || version != "1" {
			// Not c.Close: it waits for the server.
			return nil, fmt.Errorf("the SFTP server lacks %s", name)
		}
	}
	return c, nil
}

// opening runs f, which opens a session, until the link ends at the latest.
//
// The SSH library can miss that end: a channel that is added while all others
// are told of it is told nothing, and the write that asks for it says nothing
// of having failed, the first time (mux.go, loop and openChannel; handshake.go,
// writePacket). Whoever opens it waits for ever. So the first write that fails
// is another, in [hearing.end]; what ended before that could be done is noticed
// by asking the server whether it is there; and as there are still moments left,
// nobody waits for f alone, or the next link would never be made.
func opening[T any](l *link, f func(*ssh.Client) (T, error)) (T, error) {
	result := make(chan outcome[T], 1)
	go func() {
		var o outcome[T]
		if _, _, o.err = l.ssh.SendRequest(keepaliveRequest, true, nil); o.err == nil {
			o.value, o.err = f(l.ssh)
		}
		result <- o
	}()
	select {
	case r := <-result:
		return r.value, r.err
	case <-l.done:
		var none T
		return none, fmt.Errorf("open a session: %w", net.ErrClosed)
	}
}

// sessionError returns why a session could not be opened: whether the session
// ended or the connection, the SSH library tells in too many ways.
func sessionError(client *ssh.Client, err error) error {
	if refused(err) {
		return err
	}
	_, _, lost := client.SendRequest(keepaliveRequest, true, nil)
	switch {
	case lost != nil:
		return fmt.Errorf("%w: %v", io.ErrUnexpectedEOF, err) //nolint:errorlint // what it was to the library is no matter any more
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF): // as where the program of sshd's subsystem can't be run
		return errors.New("it ended at once")
	default:
		return err
	}
}

// begin counts a goroutine that uses the link, unless the link is closed.
func (l *link) begin() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause != nil {
		return false
	}
	l.wg.Add(1)
	return true
}

// start runs f in a goroutine that shut waits for.
func (l *link) start(f func()) {
	if !l.begin() {
		return
	}
	go func() {
		defer l.wg.Done()
		f()
	}()
}

// close ends the link, and with it every call that uses it. The first cause
// counts.
func (l *link) close(cause error) {
	if cause == nil {
		cause = net.ErrClosed
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.cause != nil {
		return
	}
	l.cause = cause
	_ = l.conn.Close()
	close(l.done)
}

// shut closes the link and waits for its goroutines.
func (l *link) shut() {
	l.close(nil)
	l.wg.Wait()
	if l.sftp != nil {
		_ = l.sftp.Close() // waits for its reader, which the connection's end has ended
	}
}

// reason returns why the link is closed, nil while it isn't.
func (l *link) reason() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause
}

// down is what a call gets when the link is closed.
func (l *link) down(what string) error { return fmt.Errorf("%s: %w: %w", what, ErrDown, l.reason()) }

// do is call for a function without a result.
func (l *link) do(ctx context.Context, what string, f func() error) error {
	_, err := call(ctx, l, l.t.Call, what, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// An outcome is what a call came to.
type outcome[T any] struct {
	value T
	err   error
}

// call runs f, which makes SSH or SFTP calls, and returns when f does, when
// ctx ends, when bound is over, which closes the link, or when the link dies.
// In all but the first case f may go on for a while, so it must not write to
// the caller's variables; it ends with the link at the latest.
func call[T any](ctx context.Context, l *link, bound time.Duration, what string, f func() (T, error)) (T, error) {
	var none T
	result := make(chan outcome[T], 1)
	if !l.begin() {
		return none, l.down(what)
	}
	go func() {
		defer l.wg.Done()
		value, err := f()
		result <- outcome[T]{value, err}
	}()
	timer := time.NewTimer(bound)
	defer timer.Stop()
	select {
	case r := <-result:
		return r.value, l.explain(what, r.err)
	case <-l.done:
		return none, l.down(what)
	case <-timer.C:
		l.close(fmt.Errorf("%s: %w: no answer for %s", what, ErrStalled, bound))
		return none, l.down(what)
	case <-ctx.Done():
		return none, fmt.Errorf("%s: %w", what, context.Cause(ctx))
	}
}

// explain turns the error of a call into ErrDown with a cause if it came from
// the link's end, and closes the link then: which of the two is noticed first
// is chance.
func (l *link) explain(what string, err error) error {
	if err == nil {
		return nil
	}
	if connectionLost(err) {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF // the end of a connection must not pass for the end of a file
		}
		l.close(fmt.Errorf("the connection ended: %w", err))
	}
	if l.reason() != nil {
		return l.down(what)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// keepaliveRequest asks whether the server is there. Any answer will do;
// OpenSSH says that it doesn't know the request.
const keepaliveRequest = "keepalive@openssh.com"

// keepalive asks the server now and then whether it is there. A silent link
// is closed: TCP alone would take a quarter of an hour to see it.
func (l *link) keepalive() {
	ticker := time.NewTicker(l.t.Keepalive)
	defer ticker.Stop()
	for {
		select {
		case <-l.done:
			return
		case <-ticker.C:
		}
		silent := time.AfterFunc(l.t.KeepaliveReply, func() {
			l.close(fmt.Errorf("keepalive: %w: no answer for %s", ErrStalled, l.t.KeepaliveReply))
		})
		_, _, err := l.ssh.SendRequest(keepaliveRequest, true, nil)
		silent.Stop()
		if err != nil {
			l.close(fmt.Errorf("the connection ended: keepalive: %w", err))
			return
		}
	}
}
