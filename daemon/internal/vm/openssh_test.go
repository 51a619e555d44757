package vm_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/internal/testenv"
	"osbuilder/pipe"

	"go.uber.org/zap"
)

// The link against OpenSSH itself; that also holds vmtest against the real
// thing.

func TestOpenSSH(t *testing.T) {
	s := newSSHD(t, sftpSubsystem)
	cfg := s.cfg
	cfg.Timings.Poll = never // real wake-ups
	cfg.Timings.Keepalive = 50 * time.Millisecond
	r, p := s.up(cfg)
	for range 5 {
		watching(t, cfg.Dir, 1)
		p.Append(lines(3)...)
		r.sink.untilAt(t, p.End())
	}
	watching(t, cfg.Dir, 1)
	p.Rotate(nil)
	r.sink.untilAt(t, p.End())
	transfers(t, r, cfg.Dir)
	if err := r.end(t); err != nil {
		t.Error(err)
	}
	watching(t, cfg.Dir, 0)
	wantLines(t, r.warnings())
	r.sink.until(t, "one link", func(s *sink) bool { return s.ups == 1 })
}

// transfers sends a request, and moves files both ways.
func transfers(t *testing.T, r *rig, dir string) {
	t.Helper()
	request := bytes.Repeat([]byte("x"), pipe.MaxRequest/8)
	if err := r.b.Send(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	wantFile(t, filepath.Join(dir, pipe.In), request)
	if info, err := os.Stat(filepath.Join(dir, pipe.In)); err != nil || info.Mode().Perm() != 0o660 {
		t.Error(info.Mode(), err)
	}
	data := make([]byte, 2_000_001)
	_, _ = rand.Read(data)
	name := filepath.Join(dir, "image.iso")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int64{0, 7, 261120, int64(len(data))} {
		var got bytes.Buffer
		n, err := r.b.Copy(t.Context(), name, offset, &got)
		if err != nil || n != int64(len(data))-offset || !bytes.Equal(got.Bytes(), data[offset:]) {
			t.Errorf("from %d: %d bytes, %v", offset, n, err)
		}
	}
	if _, err := r.b.Copy(t.Context(), name+"-not", 0, &bytes.Buffer{}); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	// An upload that goes on where it stopped, one that begins anew, and one that is there.
	inputs := content(1_000_001)
	half, whole := filepath.Join(dir, ".inputs-"+digest), filepath.Join(dir, "inputs-"+digest)
	if err := os.WriteFile(half, inputs[:434_567], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, fresh := range []bool{false, true, false} {
		if err := r.b.Upload(t.Context(), digest, int64(len(inputs)), fresh, writes(inputs)); err != nil {
			t.Fatal(err)
		}
		wantFile(t, whole, inputs)
		absent(t, half)
	}
}

// OpenSSH has no word for a disk that is full; the error has, with figures, and
// the link stays.
func TestOpenSSHFullDisk(t *testing.T) {
	s := newSSHD(t, sftpSubsystem)
	if err := syscall.Mount("tmpfs", s.cfg.Dir, "tmpfs", 0, "size=4m"); err != nil {
		testenv.Lacks(t, "no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(s.cfg.Dir, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	r, _ := s.up(s.cfg)
	data := content(6_000_000)
	err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data))
	says := regexp.MustCompile(`: no room on the VM's data disk: [12]\.\d MB are needed, (0 bytes|[0-9.]+ kB) are free \(write .*\.inputs-.*: sftp: "Failure" \(SSH_FX_FAILURE\)\); ` +
		`it is tried again by itself, jobs that end make room, and a larger DISK_SIZE counts from the VM's next start$`)
	if !errors.Is(err, vm.ErrFull) || !says.MatchString(err.Error()) {
		t.Errorf("Upload: %v\nwant %s", err, says)
	}
	if err := r.b.Send(t.Context(), content(400_000)); !errors.Is(err, vm.ErrFull) || !strings.Contains(err.Error(), ": 400.0 kB are needed, ") {
		t.Errorf("Send: %v", err)
	}
	if err := os.Truncate(filepath.Join(s.cfg.Dir, ".inputs-"+digest), 0); err != nil {
		t.Fatal(err)
	}
	if err := r.b.Upload(t.Context(), digest, 1_000_000, false, writes(data[:1_000_000])); err != nil {
		t.Error(err)
	}
	wantLines(t, r.warnings())
}

// The server is restarted. Alone, that is nothing to the link; with its
// sessions, the link is lost, said so, and made anew.
func TestOpenSSHRestarted(t *testing.T) {
	s := newSSHD(t, sftpSubsystem)
	r, p := s.up(s.cfg)
	watching(t, s.cfg.Dir, 1)
	sessions := s.sessions()
	s.stop()
	s.start()
	p.Append(lines(3)...)
	r.sink.untilAt(t, p.End())
	wantLines(t, r.warnings())

	s.stop()
	for _, pid := range sessions { // of the process before
		kill(t, pid)
	}
	untilLogged(t, r.logs, "builder can't be reached yet")
	p.Append(lines(3)...)
	s.start()
	r.sink.untilUp(t, 2)
	r.sink.untilAt(t, p.End())
	watching(t, s.cfg.Dir, 1) // the new one; the one before is gone
	wantLines(t, r.warnings(),
		[]string{"link to the builder lost rung=link", "connection ended: ", "hint=it is connected again by itself"},
		[]string{"builder can't be reached yet rung=tcp", "connection refused", "hint=the VM's container does not run"})
	if got := len(r.sink.texts()); got != 6 {
		t.Errorf("%d events, want 6", got)
	}
}

// With fewer sessions than it would like the link works, and says what it
// does without; with none it says what to change.
func TestOpenSSHMaxSessions(t *testing.T) {
	polling := []string{"no wake-ups from the builder, polling instead", "open failed", "hint=", "raise MaxSessions in its sshd_config"}
	for sessions, want := range map[string][][]string{"1": {polling}, "2": nil} {
		t.Run(sessions, func(t *testing.T) {
			s := newSSHD(t, sftpSubsystem, "MaxSessions "+sessions)
			r, p := s.up(s.cfg)
			p.Append(lines(3)...)
			r.sink.untilAt(t, p.End())
			transfers(t, r, s.cfg.Dir)
			p.Append(lines(3)...)
			r.sink.untilAt(t, p.End())
			wantLines(t, r.warnings(), want...)
			if got := len(r.sink.texts()); got != 6 || r.logs.FilterMessage("builder is up").Len() != 1 {
				t.Errorf("%d events, want 6; lines %v", got, r.logs.All())
			}
		})
	}
	t.Run("0", func(t *testing.T) {
		s := newSSHD(t, sftpSubsystem, "MaxSessions 0")
		r := s.link(s.cfg)
		_ = r.sink.untilRung(t, vm.RungSFTP)
		wantLines(t, r.warnings(), []string{"builder can't be reached yet rung=sftp", "open failed", "hint=", "raise MaxSessions in its sshd_config"})
	})
}

// Without SFTP no link can be, and the line says what sshd lacks; when it has
// it, the link is made.
func TestOpenSSHWithoutSFTP(t *testing.T) {
	for name, test := range map[string]struct{ settings, says string }{
		"not configured": {"", "subsystem request failed"},
		"not installed":  {"Subsystem sftp /nonexistent/sftp-server", "open an SFTP session: it ended at once"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSSHD(t, test.settings)
			r := s.link(s.cfg)
			_ = r.sink.untilRung(t, vm.RungSFTP)
			wantLines(t, r.warnings(), []string{
				"builder can't be reached yet rung=sftp", test.says,
				"hint=the VM wants an OpenSSH server with its sftp subsystem (Subsystem sftp internal-sftp in its sshd_config)",
			})
			s.kill()
			s.settings = []string{sftpSubsystem}
			p := vmtest.NewPipe(t, s.cfg.Dir)
			s.start()
			r.sink.untilAt(t, p.End())
		})
	}
}

// New keys are agreed on after a megabyte, by the server's wish or by ours,
// while files go both ways and a large log is followed: not a byte is lost.
func TestOpenSSHRekeys(t *testing.T) {
	for name, test := range map[string]struct {
		setting string
		after   uint64
		size    int
	}{
		"server": {"RekeyLimit 1M", 0, 32 << 20},
		"client": {"", 1 << 20, 8 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSSHD(t, sftpSubsystem, test.setting, "LogLevel DEBUG1")
			cfg := s.cfg
			cfg.RekeyAfter = test.after
			r, p := s.up(cfg)
			data := make([]byte, test.size)
			_, _ = rand.Read(data)
			// rekeyed checks that what was just done met new keys again and again.
			rekeys := 0
			rekeyed := func(what string) {
				t.Helper()
				now := s.logged("set_newkeys: rekeying")
				if now-rekeys < test.size>>22 { // what is under way when the limit is met still comes
					t.Errorf("%s: %d new keys in %d MiB", what, now-rekeys, test.size>>20)
				}
				rekeys = now
			}
			if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data)); err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(cfg.Dir, "inputs-"+digest)
			wantFile(t, name, data)
			rekeyed("upload")
			var got bytes.Buffer
			if _, err := r.b.Copy(t.Context(), name, 0, &got); err != nil || !bytes.Equal(got.Bytes(), data) {
				t.Errorf("download: %d bytes, %v", got.Len(), err)
			}
			rekeyed("download")
			const piece, length = 64 << 10, 4 << 20
			for at := 0; at < length; at += piece {
				p.Append(vmtest.LogEvent("a", int64(at), string(data[at:at+piece])))
			}
			r.sink.untilAt(t, p.End())
			if log := strings.Join(r.sink.texts(), ""); log != string(data[:length]) {
				t.Errorf("a log of %d bytes came, not the one of %d", len(log), length)
			}
			wantLines(t, r.warnings())
		})
	}
}

// A server that asks whether we are there gets its answer, while nothing else
// happens.
func TestOpenSSHAsksWhetherWeLive(t *testing.T) {
	s := newSSHD(t, sftpSubsystem, "ClientAliveInterval 1", "ClientAliveCountMax 1", "LogLevel DEBUG1")
	cfg := s.cfg
	cfg.Timings.Poll = never // a request of ours is an answer, too
	r, p := s.up(cfg)
	s.untilLogged("for keepalive", 3)
	p.Append(lines(1)...)
	r.sink.untilAt(t, p.End())
	wantLines(t, r.warnings())
}

// A connection is half open: it is there, and nothing passes it, one way or
// both. Each side notices by itself, the link is made anew, and nothing is
// left in the VM.
func TestOpenSSHHalfOpen(t *testing.T) {
	for name, ways := range map[string]vmtest.Direction{
		"both ways": vmtest.ToVM | vmtest.FromVM, "to the VM": vmtest.ToVM, "from the VM": vmtest.FromVM,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each waits most of the time
			s := newSSHD(t, sftpSubsystem, "ClientAliveInterval 3", "ClientAliveCountMax 1")
			front := proxy(t, s.cfg.Addr)
			cfg := s.cfg
			cfg.Addr = front.Addr().String()
			cfg.Timings.Keepalive, cfg.Timings.KeepaliveReply = 100*time.Millisecond, 3*time.Second // so it is we who notice first
			r, p := s.up(cfg)
			watching(t, cfg.Dir, 1)
			front.silence(ways)
			p.Append(lines(2)...)
			r.sink.untilUp(t, 2)
			r.sink.untilAt(t, p.End())
			// That of the old connection is gone as soon as the server has noticed.
			eventually(t, "connections at the server", 1, func() int { return len(s.connections()) })
			watching(t, cfg.Dir, 1)
			wantLines(t, r.warnings(), []string{"link to the builder lost rung=link", "the VM went silent: no answer for 3s", "hint=it is connected again by itself"})
		})
	}
}

// A hundred connections break, one after another. Nothing is left of them:
// here no goroutine and no file, at the server no session, in the VM no
// watcher; and each event came once.
func TestOpenSSHHundredReconnections(t *testing.T) {
	s := newSSHD(t, sftpSubsystem, "MaxStartups 1000")
	front := proxy(t, s.cfg.Addr)
	cfg := s.cfg
	cfg.Addr = front.Addr().String()
	cfg.Timings.Held = time.Nanosecond // no waiting
	r, p := s.up(cfg)
	quiet := func() (goroutines, files int) {
		watching(t, cfg.Dir, 1)
		eventually(t, "connections at the server", 1, func() int { return len(s.connections()) })
		open, _ := os.ReadDir("/proc/self/fd")
		return runtime.NumGoroutine(), len(open)
	}
	const warm, all = 5, 100
	goroutines, files := 0, 0
	for n := range all {
		if n == warm {
			goroutines, files = quiet()
		}
		if n%10 == 0 {
			p.Append(lines(1)...)
		}
		front.cut()
		r.sink.untilUp(t, n+2)
	}
	r.sink.untilAt(t, p.End())
	if g, f := quiet(); g > goroutines+2 || f > files+2 {
		t.Errorf("%d goroutines and %d files after %d connections, %d and %d after %d", g, f, all, goroutines, files, warm)
	}
	if got := len(r.sink.texts()); got != all/10 {
		t.Errorf("%d events, want %d", got, all/10)
	}
	if n := r.logs.FilterMessage("link to the builder lost").Len(); n != all {
		t.Errorf("%d links were lost, want %d", n, all)
	}
	if err := r.end(t); err != nil {
		t.Error(err)
	}
	watching(t, cfg.Dir, 0)
	eventually(t, "connections at the server", 0, func() int { return len(s.connections()) })
}

// warnings are the lines that say that something is wrong.
func (r *rig) warnings() []string {
	var lines []string
	for _, e := range r.logs.FilterLevelExact(zap.WarnLevel).All() {
		lines = append(lines, shown(e))
	}
	return lines
}
