package vm_test

import (
	"bufio"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/internal/testenv"
	"osbuilder/pipe"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/crypto/ssh"
)

// An sshd is OpenSSH's server, as the VM has it, run by the test: with keys, a
// port and settings of its own.
type sshd struct {
	t        *testing.T
	dir      string
	cfg      vm.Config // how to reach it
	settings []string  // further ones
	base     string    // of its configuration
	cmd      *exec.Cmd
	read     chan struct{} // closed when its log has ended

	mu      sync.Mutex // guards what follows
	log     []string
	changed chan struct{} // closed and replaced when the log grows
}

const sftpSubsystem = "Subsystem sftp internal-sftp"

// newSSHD starts one with these further settings. To leave sftp out is theirs.
func newSSHD(t *testing.T, settings ...string) *sshd {
	t.Helper()
	for _, program := range []string{"/usr/sbin/sshd", "inotifywait"} {
		if _, err := exec.LookPath(program); err != nil {
			testenv.Lacks(t, "the test needs OpenSSH's server and inotifywait (apt-get install openssh-server inotify-tools): %v", err)
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	_ = l.Close()
	_, port, _ := net.SplitHostPort(addr)
	dir := t.TempDir()
	host, client := key(t, dir, "host"), key(t, dir, "client")
	s := &sshd{t: t, dir: dir, changed: make(chan struct{}), settings: settings}
	s.cfg = vm.Config{
		Name: "vm", Addr: addr, User: me.Username, Signer: client,
		HostKeys: ssh.FixedHostKey(host.PublicKey()), Dir: t.TempDir(), Timings: quick,
	}
	s.base = fmt.Sprintf(`Port %s
ListenAddress 127.0.0.1
HostKey %s/host
AuthorizedKeysFile %s/client.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
`, port, dir, dir)
	t.Cleanup(s.kill)
	s.start()
	return s
}

func key(t *testing.T, dir, name string) ssh.Signer {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".pub"), ssh.MarshalAuthorizedKey(signer.PublicKey()), 0o600); err != nil {
		t.Fatal(err)
	}
	return signer
}

// start runs the server and returns when it listens.
func (s *sshd) start() {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.dir, "sshd_config"), []byte(s.base+strings.Join(s.settings, "\n")+"\n"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	if os.Getuid() == 0 {
		if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd's own wish
			s.t.Fatal(err)
		}
	}
	output, input, err := os.Pipe()
	if err != nil {
		s.t.Fatal(err)
	}
	defer input.Close()
	s.cmd = exec.CommandContext(context.WithoutCancel(s.t.Context()), "/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(s.dir, "sshd_config"))
	s.cmd.Stderr = input
	before := s.logged("Server listening on")
	if err := s.cmd.Start(); err != nil {
		output.Close()
		s.t.Fatal(err)
	}
	s.read = make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		defer output.Close()
		for lines := bufio.NewScanner(output); lines.Scan(); {
			s.mu.Lock()
			s.log = append(s.log, lines.Text())
			close(s.changed)
			s.changed = make(chan struct{})
			s.mu.Unlock()
		}
	}(s.read)
	s.untilLogged("Server listening on", before+1)
}

func (s *sshd) logged(text string) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, line := range s.log {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// untilLogged waits until the server's log has n lines with the text.
func (s *sshd) untilLogged(text string, n int) {
	s.t.Helper()
	deadline := time.After(bound)
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		if s.logged(text) >= n {
			return
		}
		select {
		case <-changed:
		case <-deadline:
			s.mu.Lock()
			defer s.mu.Unlock()
			s.t.Fatalf("waited in vain for %d lines with %q of sshd; it said:\n%s", n, text, strings.Join(s.log[max(0, len(s.log)-30):], "\n"))
		}
	}
}

// sessions are the processes of sshd that serve connections: one for each,
// and those that it starts for SFTP.
func (s *sshd) sessions() []int {
	all := s.connections()
	for i := 0; i < len(all); i++ {
		all = append(all, sshdsOf(all[i])...)
	}
	return all
}

// connections are those that there is one of for each connection.
func (s *sshd) connections() []int { return sshdsOf(s.cmd.Process.Pid) }

func sshdsOf(pid int) []int {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return nil // it ended
	}
	var found []int
	for _, field := range strings.Fields(string(children)) {
		child, _ := strconv.Atoi(field)
		name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", child))
		if strings.HasPrefix(string(name), "sshd") {
			found = append(found, child)
		}
	}
	return found
}

// stop ends the listening process alone, as systemctl restart does with
// KillMode=process.
func (s *sshd) stop() {
	s.t.Helper()
	_ = s.cmd.Process.Kill()
	_ = s.cmd.Wait()
}

// kill ends all of it, connections included. What runs in sessions is left to
// notice.
func (s *sshd) kill() {
	if s.cmd == nil {
		return
	}
	sessions := s.sessions()
	s.stop() // first, or it would take the next connection
	for _, pid := range sessions {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	<-s.read
	s.cmd = nil
}

// kill ends a process at once.
func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// link runs a builder.
func (s *sshd) link(cfg vm.Config) *rig {
	s.t.Helper()
	core, logs := observer.New(zapcore.DebugLevel)
	r := &rig{sink: newSink(pipe.Position{}), logs: logs, done: make(chan error, 1)}
	r.b = vm.New(cfg, r.sink, zap.New(core))
	ctx, cancel := context.WithCancel(s.t.Context())
	r.stop = cancel
	go func() { r.done <- r.b.Run(ctx) }()
	s.t.Cleanup(func() {
		if err := r.end(s.t); err != nil {
			s.t.Error(err)
		}
	})
	return r
}

// up is a server whose link is up, with a generation begun.
func (s *sshd) up(cfg vm.Config) (*rig, *vmtest.Pipe) {
	s.t.Helper()
	p := vmtest.NewPipe(s.t, cfg.Dir)
	r := s.link(cfg)
	r.sink.untilAt(s.t, p.End())
	return r, p
}

// eventually waits until a number that is no event of ours is what it should
// be.
func eventually(t *testing.T, what string, want int, count func() int) {
	t.Helper()
	deadline := time.After(bound)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		got := count()
		if got == want {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d %s, waited for %d", got, what, want)
		}
	}
}

// watching waits until n inotifywaits watch dir.
func watching(t *testing.T, dir string, n int) {
	t.Helper()
	eventually(t, "inotifywaits in "+dir, n, func() int {
		names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		found := 0
		for _, name := range names {
			line, err := os.ReadFile(name)
			if err == nil && strings.HasPrefix(string(line), "inotifywait\x00") && strings.Contains(string(line), dir) {
				found++
			}
		}
		return found
	})
}

// A front passes connections on until they are cut, or silenced.
type front struct {
	net.Listener

	mu    sync.Mutex // guards what follows
	pairs []*pair
	all   int // connections so far
}

// A pair is a connection's two sides.
type pair struct {
	client, server net.Conn
	silent         vmtest.Direction // guarded by the front's mu
}

func proxy(t *testing.T, to string) *front {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{Listener: l}
	var passing sync.WaitGroup
	passing.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var d net.Dialer
			up, err := d.DialContext(context.WithoutCancel(t.Context()), "tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			p := &pair{client: c, server: up}
			f.mu.Lock()
			f.pairs = append(f.pairs, p)
			f.all++
			f.mu.Unlock()
			passing.Go(func() { f.pass(p, vmtest.ToVM, c, up) })
			passing.Go(func() { f.pass(p, vmtest.FromVM, up, c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		f.cut()
		passing.Wait()
	})
	return f
}

// pass carries one way. What goes to a silenced side is swallowed, and so is
// the end.
func (f *front) pass(p *pair, way vmtest.Direction, from, to net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		f.mu.Lock()
		silent := p.silent&way != 0
		f.mu.Unlock()
		if !silent && n > 0 {
			_, _ = to.Write(buf[:n])
		}
		if err != nil {
			if !silent {
				_ = to.Close()
			}
			return
		}
	}
}

// cut ends all connections.
func (f *front) cut() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pairs {
		_ = p.client.Close()
		_ = p.server.Close()
	}
	f.pairs = nil
}

// silence makes all present connections carry nothing these ways, for good.
func (f *front) silence(ways vmtest.Direction) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pairs {
		p.silent = ways
	}
}
