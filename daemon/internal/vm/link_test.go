package vm_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"go.uber.org/zap/zaptest/observer"
)

// Each rung of the ladder breaks, is named, and is climbed once it is mended.
func TestLadder(t *testing.T) {
	set := func(f func(*vmtest.Faults)) func(*testing.T, *vmtest.Server) {
		return func(_ *testing.T, srv *vmtest.Server) { srv.Set(f) }
	}
	out := func(srv *vmtest.Server) string { return filepath.Join(srv.Dir(), pipe.Out) }
	for name, test := range map[string]struct {
		harm func(*testing.T, *vmtest.Server)
		mend func(*testing.T, *vmtest.Server)
		rung vm.Rung
		says string
		hint string
	}{
		"nobody listens": {
			func(_ *testing.T, srv *vmtest.Server) { srv.Refuse() },
			func(_ *testing.T, srv *vmtest.Server) { srv.Listen() },
			vm.RungTCP, "connection refused", "docker compose ps",
		},
		"QEMU listens, the VM doesn't": {
			set(func(f *vmtest.Faults) { f.Silent = true }),
			set(func(f *vmtest.Faults) { f.Silent = false }),
			vm.RungSSH, "no SSH greeting from 127.0.0.1", "the VM is probably still starting; its console: docker compose logs vm",
		},
		"the port closes at once": {
			set(func(f *vmtest.Faults) { f.Hangup = true }),
			set(func(f *vmtest.Faults) { f.Hangup = false }),
			vm.RungSSH, "closes the connection", "docker compose logs vm",
		},
		"no SSH server": {
			set(func(f *vmtest.Faults) { f.Babble = "HTTP/1.1 400 Bad Request\r\n" }),
			set(func(f *vmtest.Faults) { f.Babble = "" }),
			vm.RungSSH, `says "HTTP/1.1 400 Bad Request\r\n"`, "docker compose logs vm",
		},
		"a line that never ends": {
			set(func(f *vmtest.Faults) { f.Babble = strings.Repeat("x", 1<<20) }),
			set(func(f *vmtest.Faults) { f.Babble = "" }),
			vm.RungSSH, `says "xxxxxxxx`, "docker compose logs vm",
		},
		"a greeting and no more": {
			set(func(f *vmtest.Faults) { f.Babble = "SSH-2.0-OpenSSH_10.0\r\n" }),
			set(func(f *vmtest.Faults) { f.Babble = "" }),
			vm.RungSSH, "the SSH server greets, and goes no further", "docker compose logs vm",
		},
		"another host key": {
			set(func(f *vmtest.Faults) { f.WrongHostKey = true }),
			set(func(f *vmtest.Faults) { f.WrongHostKey = false }),
			vm.RungHostKey, "answers with the unknown key SHA256:", "restart the VM so that it takes it",
		},
		"user key unknown": {
			set(func(f *vmtest.Faults) { f.RefuseUser = true }),
			set(func(f *vmtest.Faults) { f.RefuseUser = false }),
			vm.RungUserKey, "refuses user builder with key SHA256:", "the VM doesn't know the sidecar's key",
		},
		"no SFTP": {
			set(func(f *vmtest.Faults) { f.NoSFTP = true }),
			set(func(f *vmtest.Faults) { f.NoSFTP = false }),
			vm.RungSFTP, "open an SFTP session", "make the VM's image anew: docker compose up -d --build vmimage, then docker compose restart vm",
		},
		"no posix-rename": {
			set(func(f *vmtest.Faults) { f.NoPosixRename = true }),
			set(func(f *vmtest.Faults) { f.NoPosixRename = false }),
			vm.RungSFTP, "lacks posix-rename@openssh.com", "make the VM's image anew: docker compose up -d --build vmimage, then docker compose restart vm",
		},
		"no fsync": {
			set(func(f *vmtest.Faults) { f.NoFsync = true }),
			set(func(f *vmtest.Faults) { f.NoFsync = false }),
			vm.RungSFTP, "lacks fsync@openssh.com", "make the VM's image anew: docker compose up -d --build vmimage, then docker compose restart vm",
		},
		"no pipe_out": {
			func(t *testing.T, srv *vmtest.Server) {
				if err := os.Rename(out(srv), out(srv)+"-away"); err != nil {
					t.Error(err)
				}
			},
			func(t *testing.T, srv *vmtest.Server) {
				if err := os.Rename(out(srv)+"-away", out(srv)); err != nil {
					t.Error(err)
				}
			},
			vm.RungPipe, "file does not exist", "the runner in the VM has not started",
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			p := vmtest.NewPipe(t, srv.Dir())
			test.harm(t, srv)
			timings := quick
			if test.rung == vm.RungSSH { // what else is slow, on a machine with much to do, must not pass for this one
				timings.Handshake = time.Second
			}
			r := start(t, srv, newSink(pipe.Position{}), timings)
			if err := r.sink.untilRung(t, test.rung); !strings.Contains(err.Error(), test.says) {
				t.Errorf("it says %q, want %q in it", err, test.says)
			}
			r.sink.until(t, "no link", func(s *sink) bool { return s.ups == 0 })
			if err := r.b.Send(t.Context(), []byte("true\n")); !errors.Is(err, vm.ErrDown) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Send: %v", err)
			}
			if _, err := r.b.Copy(t.Context(), "/x", 0, io.Discard); !errors.Is(err, vm.ErrDown) {
				t.Errorf("Copy: %v", err)
			}
			test.mend(t, srv)
			r.sink.untilUp(t, 1)
			r.sink.untilAt(t, p.End())
			wantLine(t, r.logs, test.rung, test.says, test.hint)
		})
	}
}

// wantLine checks the one line of a rung that a user reads.
func wantLine(t *testing.T, logs *observer.ObservedLogs, rung vm.Rung, says, hint string) {
	t.Helper()
	lines := logs.FilterMessage("builder can't be reached yet").All()
	if len(lines) != 1 {
		t.Fatalf("%d lines about it, want 1: %v", len(lines), lines)
	}
	fields := lines[0].ContextMap()
	said, _ := fields["error"].(string)
	what, _ := fields["hint"].(string)
	if fields["builder"] != "vm" || fields["rung"] != string(rung) || !strings.Contains(said, says) || !strings.Contains(what, hint) {
		t.Errorf("the line says %v, want rung %q, error %q and hint %q in it", fields, rung, says, hint)
	}
}

func TestHelloThatCannotBeReadNamesTheRung(t *testing.T) {
	const time = `"time":"2026-01-01T00:00:00Z"`
	for name, test := range map[string]struct {
		line string
		rung vm.Rung
		says string
		hint string
	}{
		"empty":       {"", vm.RungPipe, "no hello in it yet", "the runner in the VM has not started"},
		"half a line": {`{"seq":1`, vm.RungPipe, "no hello in it yet", "the runner in the VM has not started"},
		"newer protocol": {
			`{"seq":1,` + time + `,"type":"hello","hello":{"generation":"1-00000000","protocol":2,"runner":"9.0","image":"i"}}` + "\n", vm.RungProtocol,
			"runner 9.0 in image i speaks version 2 of the pipe's protocol, this sidecar version 1", "bring both up to date: docker compose up -d --build, then docker compose restart vm",
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			if err := os.WriteFile(filepath.Join(srv.Dir(), pipe.Out), []byte(test.line), 0o600); err != nil {
				t.Fatal(err)
			}
			r := start(t, srv, newSink(pipe.Position{}), quick)
			_ = r.sink.untilRung(t, test.rung)
			wantLine(t, r.logs, test.rung, test.says, test.hint)
		})
	}
}

func TestLongHello(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	p.Rotate(func(h *pipe.Hello) {
		for i := range 5000 {
			h.Jobs = append(h.Jobs, pipe.JobRef{Job: "20260101-000000-abcdef", Attempt: i + 1})
		}
	})
	r := start(t, srv, newSink(pipe.Position{}), quick)
	r.sink.untilAt(t, p.End())
	r.sink.until(t, "all jobs of the hello", func(s *sink) bool { return len(s.entries[0].Event.Hello.Jobs) == 5000 })
}

// However often it is tried, nobody logs in at a stranger's: the link comes up
// with the right key, and in no other way.
func TestWrongHostKeyNeverGoesOnByItself(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	srv.Set(func(f *vmtest.Faults) { f.WrongHostKey = true })
	timings := quick
	timings.RetryHostKey, timings.Remind = time.Millisecond, time.Millisecond
	r := start(t, srv, newSink(pipe.Position{}), timings)
	untilLines(t, r.logs, "builder still can't be reached", 4) // of attempts ever more
	if srv.Logins() != 0 {
		t.Error("logged in at a stranger's")
	}
	r.sink.until(t, "one reason, and no link", func(s *sink) bool { return len(s.reasons) == 1 && s.ups == 0 })
	wantLine(t, r.logs, vm.RungHostKey, "answers with the unknown key SHA256:", "the VM doesn't have the host key that `init` made for it")
	srv.Set(func(f *vmtest.Faults) { f.WrongHostKey = false })
	r.sink.untilUp(t, 1)
}

func TestEveryRungHasAHint(t *testing.T) {
	for _, rung := range []vm.Rung{
		vm.RungImage, vm.RungQEMU, vm.RungAddress, vm.RungTCP, vm.RungSSH, vm.RungHostKey, vm.RungUserKey, vm.RungSFTP,
		vm.RungDisk, vm.RungPipe, vm.RungProtocol, vm.RungLink,
	} {
		hint := (&vm.RungError{Rung: rung, Err: errors.New("x")}).Hint("vm2")
		if hint == "" || strings.Contains(hint, "$") || strings.Contains(hint, "restart ") && !strings.Contains(hint, "restart vm2") {
			t.Errorf("%s: %q", rung, hint)
		}
	}
}

func TestWrongHostKeyIsRetriedSlowly(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	srv.Set(func(f *vmtest.Faults) { f.WrongHostKey = true })
	timings := quick
	timings.RetryHostKey = never
	r := start(t, srv, newSink(pipe.Position{}), timings)
	_ = r.sink.untilRung(t, vm.RungHostKey)
	if srv.Logins() != 0 {
		t.Error("logged in at a stranger's")
	}
	if err := r.end(t); err != nil { // and the wait ends with the context
		t.Error(err)
	}
}

func TestRungsAreNewsOnce(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	srv.Set(func(f *vmtest.Faults) { f.RefuseUser = true })
	timings := quick
	timings.Remind = 50 * time.Millisecond
	r := start(t, srv, newSink(pipe.Position{}), timings)
	untilLogged(t, r.logs, "builder still can't be reached")
	srv.Set(func(f *vmtest.Faults) { f.RefuseUser, f.NoSFTP = false, true })
	_ = r.sink.untilRung(t, vm.RungSFTP)
	srv.Set(func(f *vmtest.Faults) { f.NoSFTP = false })
	r.sink.untilUp(t, 1)
	if n := r.logs.FilterMessage("builder can't be reached yet").Len(); n != 2 {
		t.Errorf("%d lines about two rungs", n)
	}
	r.sink.until(t, "two reasons", func(s *sink) bool { return len(s.reasons) == 2 })
}

func TestSilentLinkIsClosed(t *testing.T) {
	timings := quick
	timings.Keepalive, timings.KeepaliveReply = 20*time.Millisecond, 200*time.Millisecond
	r, p := up(t, timings)
	r.sink.untilAt(t, p.End())
	r.srv.Freeze()
	r.sink.until(t, "its cause", func(s *sink) bool {
		return len(s.reasons) > 0 && errors.Is(s.reasons[0], vm.ErrStalled) && strings.Contains(s.reasons[0].Error(), "keepalive")
	})
	r.sink.untilUp(t, 2)
	p.Append(lines(1)...)
	r.sink.untilAt(t, p.End())
}

func TestCallWithoutAnswerClosesTheLink(t *testing.T) {
	timings := quick
	timings.Call = 200 * time.Millisecond
	r, p := up(t, timings)
	r.sink.untilAt(t, p.End())
	r.srv.Set(func(f *vmtest.Faults) { f.StallReads = pipe.Out })
	r.sink.until(t, "its cause", func(s *sink) bool {
		return len(s.reasons) > 0 && errors.Is(s.reasons[0], vm.ErrStalled)
	})
	r.srv.Set(func(f *vmtest.Faults) { f.StallReads = "" })
	r.sink.untilUp(t, 2)
}

func TestRunEndsWhileEverythingHangs(t *testing.T) {
	for name, harm := range map[string]func(*vmtest.Server){
		"frozen":  (*vmtest.Server).Freeze,
		"stalled": func(srv *vmtest.Server) { srv.Set(func(f *vmtest.Faults) { f.StallReads = pipe.Out }) },
		"gone":    (*vmtest.Server).Refuse,
	} {
		t.Run(name, func(t *testing.T) {
			r, p := up(t, quick)
			r.sink.untilAt(t, p.End())
			harm(r.srv)
			if err := r.end(t); err != nil {
				t.Error(err)
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		srv := vmtest.New(t)
		srv.Set(func(f *vmtest.Faults) { f.Silent = true })
		r := start(t, srv, newSink(pipe.Position{}), quick)
		if err := r.end(t); err != nil {
			t.Error(err)
		}
	})
}
