//go:build sshd

package vm_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/crypto/ssh"
)

// These tests want OpenSSH's server and inotify-tools, as the VM has them:
//
//	apt-get install openssh-server inotify-tools
//	go test -tags sshd -run OpenSSH ./daemon/internal/vm
//
// They hold vmtest against the real thing.

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

// openSSH starts sshd and returns how to reach it, and how to stop it with
// all its connections.
func openSSH(t *testing.T) (vm.Config, func()) {
	t.Helper()
	dir, pipeDir := t.TempDir(), t.TempDir()
	host, client := key(t, dir, "host"), key(t, dir, "client")
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, port, _ := net.SplitHostPort(l.Addr().String())
	_ = l.Close()
	settings := fmt.Sprintf(`Port %s
ListenAddress 127.0.0.1
HostKey %s/host
AuthorizedKeysFile %s/client.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
PidFile none
Subsystem sftp internal-sftp
`, port, dir, dir)
	if err := os.WriteFile(filepath.Join(dir, "sshd_config"), []byte(settings), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // sshd's own wish
		t.Fatal(err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "/usr/sbin/sshd", "-D", "-e", "-f", filepath.Join(dir, "sshd_config"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop := func() { _ = cmd.Process.Kill() }
	t.Cleanup(func() { stop(); _ = cmd.Wait() })
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	return vm.Config{
		Name: "vm", Addr: "127.0.0.1:" + port, User: me.Username, Signer: client,
		HostKeys: ssh.FixedHostKey(host.PublicKey()), Dir: pipeDir, Timings: quick,
	}, stop
}

func TestOpenSSH(t *testing.T) {
	cfg, _ := openSSH(t)
	cfg.Timings.Poll = never // real wake-ups
	cfg.Timings.Keepalive = 50 * time.Millisecond
	p := vmtest.NewPipe(t, cfg.Dir)
	core, logs := observer.New(zapcore.DebugLevel)
	s := newSink(pipe.Position{})
	b := vm.New(cfg, s, zap.New(core))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	s.untilUp(t, 1)
	for range 5 {
		watching(t, cfg.Dir, 1)
		p.Append(lines(3)...)
		s.untilAt(t, p.End())
	}
	watching(t, cfg.Dir, 1)
	p.Rotate(nil)
	s.untilAt(t, p.End())

	request := bytes.Repeat([]byte("x"), pipe.MaxRequest)
	if err := b.Send(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(filepath.Join(cfg.Dir, pipe.In)); !bytes.Equal(got, request) {
		t.Error("the request didn't arrive")
	}
	if info, err := os.Stat(filepath.Join(cfg.Dir, pipe.In)); err != nil || info.Mode().Perm() != 0o660 {
		t.Error(info.Mode(), err)
	}
	data := make([]byte, 100_000_001)
	_, _ = rand.Read(data)
	name := filepath.Join(cfg.Dir, "image.iso")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int64{0, 7, 261120, int64(len(data))} {
		var got bytes.Buffer
		began := time.Now()
		n, err := b.Copy(t.Context(), name, offset, &got)
		if err != nil || n != int64(len(data))-offset || !bytes.Equal(got.Bytes(), data[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, n, err)
		}
		t.Logf("%d bytes in %s", n, time.Since(began))
	}
	if _, err := b.Copy(t.Context(), name+"-not", 0, &bytes.Buffer{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	// An upload that goes on where it stopped, one that begins anew, and one that is there.
	inputs := content(3_000_001)
	half, whole := filepath.Join(cfg.Dir, ".inputs-"+digest), filepath.Join(cfg.Dir, "inputs-"+digest)
	if err := os.WriteFile(half, inputs[:1_234_567], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, fresh := range []bool{false, true, false} {
		if err := b.Upload(t.Context(), digest, int64(len(inputs)), fresh, writes(inputs)); err != nil {
			t.Fatal(err)
		}
		wantFile(t, whole, inputs)
		absent(t, half)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	watching(t, cfg.Dir, 0)
	if n := logs.FilterMessageSnippet("no wake-ups").Len(); n != 0 {
		t.Error("the watcher was complained about:", logs.All())
	}
	s.until(t, "one link", func(s *sink) bool { return s.ups == 1 })
}

// A broken connection ends the watcher too.
func TestOpenSSHReapsAfterACut(t *testing.T) {
	cfg, _ := openSSH(t)
	p := vmtest.NewPipe(t, cfg.Dir)
	front := proxy(t, cfg.Addr)
	cfg.Addr = front.Addr().String()
	s := newSink(pipe.Position{})
	b := vm.New(cfg, s, zap.NewNop())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- b.Run(ctx) }()
	s.untilAt(t, p.End())
	watching(t, cfg.Dir, 1)
	front.cut()
	s.until(t, "the cut", func(s *sink) bool { return len(s.reasons) > 0 })
	s.untilUp(t, 2)
	watching(t, cfg.Dir, 1) // the new one, and the old one is gone
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	watching(t, cfg.Dir, 0)
}

// watching waits until n inotifywaits watch dir.
func watching(t *testing.T, dir string, n int) {
	t.Helper()
	deadline := time.After(bound)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		names, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		found := 0
		for _, name := range names {
			line, err := os.ReadFile(name)
			if err == nil && strings.HasPrefix(string(line), "inotifywait\x00") && strings.Contains(string(line), dir) {
				found++
			}
		}
		if found == n {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("%d inotifywaits watch %s, waited for %d", found, dir, n)
		}
	}
}

// A front passes connections on until they are cut.
type front struct {
	net.Listener
	conns chan net.Conn
}

func proxy(t *testing.T, to string) *front {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &front{Listener: l, conns: make(chan net.Conn, 100)}
	t.Cleanup(func() { _ = l.Close(); f.cut() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			var d net.Dialer
			up, err := d.DialContext(t.Context(), "tcp", to)
			if err != nil {
				_ = c.Close()
				continue
			}
			f.conns <- c
			f.conns <- up
			for _, pair := range [][2]net.Conn{{c, up}, {up, c}} {
				go func() {
					defer func() { _ = pair[0].Close() }()
					_, _ = pair[0].(*net.TCPConn).ReadFrom(pair[1])
				}()
			}
		}
	}()
	return f
}

func (f *front) cut() {
	for {
		select {
		case c := <-f.conns:
			_ = c.Close()
		default:
			return
		}
	}
}
