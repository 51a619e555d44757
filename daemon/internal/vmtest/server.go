// Package vmtest is a builder VM's SSH server in the test's own process: real
// SSH, SFTP the way OpenSSH's sftp-server does it, commands that really run,
// and faults to switch on. Any code that talks to a VM can be tested against
// it; the code is not told.
package vmtest

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"osbuilder/pipe"
)

// Faults are what can be wrong with the VM. They take effect on the next
// occasion: the next connection, session or request.
type Faults struct {
	Silent       bool   // TCP connects, but no greeting ever comes: QEMU before the VM is up
	Hangup       bool   // TCP connects, and is closed at once: a proxy before the VM is up
	Babble       string // said instead of a greeting, and then nothing
	WrongHostKey bool
	RefuseUser   bool  // the user's key isn't known
	DropLogins   bool  // who logs in is hung up on at once
	CutAfter     int64 // each connection is cut after so many bytes from the server; 0 never

	NoSFTP        bool
	NoExec        bool
	MaxSessions   int // on one connection; 0: 10, as OpenSSH has it
	NoPosixRename bool
	NoFsync       bool
	NoInotify     bool // inotifywait isn't installed

	MaxRead    int    // the most that one read is answered with; 0: 261120, as OpenSSH has it
	StallReads string // reads of files with this base name are never answered
	ShortReads string // reads of files with this base name end halfway
	FailWrite  bool
	Full       bool   // writes find no room, as statvfs says
	CutWrites  int64  // all connections are cut after so many bytes were written to files in one session; 0 never
	StallWrite string // writes to files whose base name begins so are never answered
	LoseWrites bool   // writes are answered and not made, past the first 1000 bytes of a file
	FailFsync  bool
	FailRename bool
}

// A Server is one builder VM. It ends with its test.
type Server struct {
	t       testing.TB
	network *Network // nil: TCP
	dir     string
	bin     string
	addr    string
	key     ed25519.PrivateKey // the user's
	user    ssh.Signer
	host    ssh.Signer
	another ssh.Signer // for WrongHostKey
	wg      sync.WaitGroup
	watches counter

	mu       sync.Mutex // guards what follows
	faults   Faults
	script   string        // for Overwrite
	changed  chan struct{} // closed and replaced when faults change
	listener net.Listener  // nil while connections are refused
	conns    map[*conn]bool
	commands []*command
	requests map[string]int
	logins   int
	closed   bool
}

// New starts a server. Its pipe directory is empty: see [NewPipe].
func New(t testing.TB) *Server {
	t.Helper()
	return NewOn(t, nil)
}

// NewOn starts a server on a network in memory. In a bubble it must not be
// asked to run commands: their end is no event that a bubble knows of.
func NewOn(t testing.TB, network *Network) *Server {
	t.Helper()
	s := &Server{
		t: t, network: network, dir: t.TempDir(), key: newKey(t),
		host: newSigner(t, newKey(t)), another: newSigner(t, newKey(t)),
		changed: make(chan struct{}),
		conns:   map[*conn]bool{}, requests: map[string]int{},
	}
	s.user = newSigner(t, s.key)
	s.bin = installInotifywait(t)
	s.listen("127.0.0.1:0")
	t.Cleanup(s.close)
	return s
}

func newKey(t testing.TB) ed25519.PrivateKey {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newSigner(t testing.TB, key ed25519.PrivateKey) ssh.Signer {
	t.Helper()
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return signer
}

// Addr returns the address to connect to. It stays the same for ever.
func (s *Server) Addr() string { return s.addr }

// Dir returns the directory of the pipe. Other files may be put there too:
// SFTP serves the whole file system under its real paths.
func (s *Server) Dir() string { return s.dir }

// Signer returns the key of the user who may log in, under any name.
func (s *Server) Signer() ssh.Signer { return s.user }

// PrivateKey returns that key as a file holds it, for a client in another
// process.
func (s *Server) PrivateKey() []byte {
	s.t.Helper()
	block, err := ssh.MarshalPrivateKey(s.key, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return pem.EncodeToMemory(block)
}

// HostKeys accepts the server's host key and no other.
func (s *Server) HostKeys() ssh.HostKeyCallback { return ssh.FixedHostKey(s.host.PublicKey()) }

// HostKey returns the server's public host key.
func (s *Server) HostKey() ssh.PublicKey { return s.host.PublicKey() }

// Set changes the faults.
func (s *Server) Set(change func(*Faults)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.faults)
	close(s.changed)
	s.changed = make(chan struct{})
}

// Overwrite has somebody else's script take the place of the next request
// that is written to pipe_in, before the runner reads it.
func (s *Server) Overwrite(script string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.script = script
}

// stranger returns that script, once, if name is that of pipe_in.
func (s *Server) stranger(name string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	if filepath.Base(name) != pipe.In {
		return ""
	}
	script := s.script
	s.script = ""
	return script
}

// now returns the faults, and a channel that is closed when they change.
func (s *Server) now() (Faults, <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.faults, s.changed
}

// Cut breaks all connections, as when the VM's power fails.
func (s *Server) Cut() {
	for _, c := range s.connections() {
		_ = c.Close()
	}
}

// Freeze makes all present connections half open: they stay, and nothing
// passes any more, for good.
func (s *Server) Freeze() {
	for _, c := range s.connections() {
		c.freeze()
	}
}

func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*conn
	for c := range s.conns {
		all = append(all, c)
	}
	return all
}

// Refuse closes the port, and the connections too.
func (s *Server) Refuse() {
	s.mu.Lock()
	if s.listener != nil {
		_ = s.listener.Close()
		s.listener = nil
	}
	s.mu.Unlock()
	s.Cut()
}

// Listen opens the port again.
func (s *Server) Listen() { s.listen(s.addr) }

// Logins returns how many connections got as far as being logged in.
func (s *Server) Logins() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logins
}

// Requests returns how many SFTP requests of a kind came: "read", "open",
// "posix-rename@openssh.com" and so on.
func (s *Server) Requests(kind string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[kind]
}

func (s *Server) count(kind string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.requests[kind]++
}

func (s *Server) listen(addr string) {
	s.t.Helper()
	var l net.Listener = s.network
	if s.network == nil {
		var config net.ListenConfig
		var err error
		if l, err = config.Listen(s.t.Context(), "tcp", addr); err != nil {
			s.t.Fatal(err)
		}
	}
	s.mu.Lock()
	s.listener, s.addr = l, l.Addr().String()
	s.mu.Unlock()
	s.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			if wrapped := s.adopt(c); wrapped != nil {
				s.wg.Go(func() { s.serve(wrapped) })
			}
		}
	})
}

func (s *Server) adopt(c net.Conn) *conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.listener == nil {
		_ = c.Close()
		return nil
	}
	wrapped := newConn(c, s.faults.CutAfter)
	s.conns[wrapped] = true
	return wrapped
}

func (s *Server) close() {
	s.mu.Lock()
	s.closed = true
	if s.listener != nil {
		_ = s.listener.Close()
	}
	commands := s.commands
	s.mu.Unlock()
	s.Cut()
	for _, c := range commands {
		c.kill()
	}
	s.wg.Wait()
}

func (s *Server) serve(c *conn) {
	defer func() {
		_ = c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	faults, _ := s.now()
	if faults.Silent {
		<-c.closed
		return
	}
	if faults.Hangup {
		return
	}
	if faults.Babble != "" {
		_, _ = c.Write([]byte(faults.Babble))
		<-c.closed
		return
	}
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if faults.RefuseUser || string(key.Marshal()) != string(s.user.PublicKey().Marshal()) {
				return nil, errors.New("unknown key")
			}
			return &ssh.Permissions{}, nil
		},
	}
	if faults.WrongHostKey {
		config.AddHostKey(s.another)
	} else {
		config.AddHostKey(s.host)
	}
	server, channels, requests, err := ssh.NewServerConn(c, config)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	s.mu.Lock()
	s.logins++
	s.mu.Unlock()
	if faults.DropLogins {
		return
	}
	var sessions sync.WaitGroup
	defer sessions.Wait()
	sessions.Go(func() { ssh.DiscardRequests(requests) }) // and says no to keepalive, as OpenSSH does
	var open counter
	for request := range channels {
		faults, _ := s.now()
		limit := faults.MaxSessions
		if limit == 0 {
			limit = 10
		}
		if request.ChannelType() != "session" || open.value() >= limit {
			_ = request.Reject(ssh.ConnectionFailed, "open failed") // in the words of OpenSSH
			continue
		}
		channel, requests, err := request.Accept()
		if err != nil {
			return
		}
		open.add(1)
		sessions.Go(func() {
			defer open.add(-1)
			s.session(channel, requests, c.closed)
		})
	}
}

// session serves one channel until its program ends or the client closes it.
func (s *Server) session(channel ssh.Channel, requests <-chan *ssh.Request, gone <-chan struct{}) {
	defer func() { _ = channel.Close() }()
	var program sync.WaitGroup
	defer program.Wait()
	var running *command
	for r := range requests {
		faults, _ := s.now()
		var payload struct{ Text string }
		_ = ssh.Unmarshal(r.Payload, &payload)
		ok := false
		switch {
		case r.Type == "subsystem" && payload.Text == "sftp" && !faults.NoSFTP:
			ok = true
			program.Go(func() {
				defer func() { _ = channel.Close() }()
				newSFTP(s, channel, gone).serve()
			})
		case r.Type == "exec" && !faults.NoExec && running == nil:
			if running = s.command(payload.Text); running != nil {
				ok = true
				program.Go(func() {
					running.serve(channel)
					_ = channel.Close()
				})
			}
		case r.Type == "signal" && running != nil:
			running.signal(payload.Text)
		}
		if r.WantReply {
			_ = r.Reply(ok, nil)
		}
	}
	// The client closed the channel or the connection broke: sshd closes the program's files and leaves it at that.
	if running != nil {
		running.hangUp()
	}
}

// A counter is a number that can be waited for.
type counter struct {
	mu      sync.Mutex // guards what follows
	n       int
	changed chan struct{}
}

func (c *counter) add(d int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n += d
	if c.changed != nil {
		close(c.changed)
		c.changed = nil
	}
}

func (c *counter) value() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n
}

// patience bounds the waiting for what must happen.
const patience = 30 * time.Second

// reach waits until the number is at least n.
func (c *counter) reach(ctx context.Context, n int) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		c.mu.Lock()
		if c.n >= n {
			c.mu.Unlock()
			return true
		}
		if c.changed == nil {
			c.changed = make(chan struct{})
		}
		changed := c.changed
		c.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}
