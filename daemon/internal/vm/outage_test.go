package vm_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
)

// These tests run with the timings that the program has, in a bubble, so that
// what they say of seconds and minutes is what happens.

// The bounds that the documents promise.
const (
	noticed   = 45 * time.Second // that a link is silent: one keepalive after another, and its answer
	returned  = 15 * time.Second // from the end of an outage until the link is up
	tenMinute = 10 * time.Minute
	// mostDials: in ten minutes of refused connections. Waits grow from half a second to 15 s, each spread by a half.
	mostDials = 135
)

// A world is a builder, its VM and the network between them.
type world struct {
	*rig
	t       *testing.T
	network *vmtest.Network
	pipe    *vmtest.Pipe
}

// bubble runs test in a world whose link is up.
func bubble(t *testing.T, test func(w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := &world{t: t, network: vmtest.NewNetwork()}
		srv := vmtest.NewOn(t, w.network)
		srv.Set(func(f *vmtest.Faults) { f.NoExec = true })
		w.pipe = vmtest.NewPipe(t, srv.Dir())
		core, logs := observer.New(zapcore.InfoLevel)
		w.rig = &rig{srv: srv, sink: newSink(pipe.Position{}), logs: logs, done: make(chan error, 1)}
		w.sink.patience = time.Hour
		cfg := config(srv, vm.Timings{})
		cfg.Dial = w.network.Dial
		w.b = vm.New(cfg, w.sink, zap.New(core))
		ctx, cancel := context.WithCancel(t.Context())
		w.stop = cancel
		go func() { w.done <- w.b.Run(ctx) }()
		w.sink.untilAt(t, w.pipe.End())
		test(w)
		if err := w.end(t); err != nil {
			t.Error(err)
		}
	})
}

// pass lets time pass in a bubble.
func pass(d time.Duration) {
	<-time.After(d)
	synctest.Wait()
}

// said returns the lines behind the first so many.
func (w *world) said(since int) []string {
	var lines []string
	for _, e := range w.logs.All()[since:] {
		if e.Message == "no wake-ups from the builder, polling instead" {
			continue // it has no watcher: see bubble
		}
		lines = append(lines, shown(e))
	}
	return lines
}

// shown is a line as a user reads it: message, rung, error and hint.
func shown(e observer.LoggedEntry) string {
	line := e.Message
	for _, name := range []string{"rung", "error", "hint"} {
		if value, ok := e.ContextMap()[name]; ok {
			line += fmt.Sprintf(" %s=%v", name, value)
		}
	}
	return line
}

// wantLines holds lines against their beginnings and what else is in them.
func wantLines(t *testing.T, got []string, want ...[]string) {
	t.Helper()
	ok := len(got) == len(want)
	for i := 0; ok && i < len(got); i++ {
		ok = strings.HasPrefix(got[i], want[i][0])
		for _, piece := range want[i] {
			ok = ok && strings.Contains(got[i], piece)
		}
	}
	if !ok {
		t.Errorf("it says\n\t%s\nwant %q", strings.Join(got, "\n\t"), want)
	}
}

var (
	lost  = []string{"link to the builder lost rung=link", "the VM went silent: no answer for 30s", "hint=it is connected again by itself"}
	unmet = []string{"builder can't be reached yet rung=tcp", "hint=the VM's container does not run, or the VM is still starting: docker compose ps"}
	again = []string{"builder is up"}
)

func (w *world) ups() int {
	w.sink.mu.Lock()
	defer w.sink.mu.Unlock()
	return w.sink.ups
}

// soon checks that the link comes back within a bound, and that nothing was
// lost and nothing came twice.
func (w *world) soon(within time.Duration, want []string) {
	w.t.Helper()
	mended, before := time.Now(), w.ups()
	w.sink.untilUp(w.t, before+1)
	if took := time.Since(mended); took > within {
		w.t.Errorf("up again after %s, want %s at most", took, within)
	}
	w.sink.untilAt(w.t, w.pipe.End())
	if got := w.sink.texts(); strings.Join(got, "|") != strings.Join(want, "|") {
		w.t.Errorf("events %q, want %q", got, want)
	}
}

// A short cut is sat out: no line, no second connection, and what was said
// meanwhile arrives.
func TestCutOfTenSeconds(t *testing.T) {
	for _, after := range []time.Duration{0, 7 * time.Second, 14900 * time.Millisecond} { // keepalives are 15 s apart
		t.Run(after.String(), func(t *testing.T) {
			bubble(t, func(w *world) {
				pass(after)
				w.network.Cut(vmtest.ToVM | vmtest.FromVM)
				w.pipe.Append(vmtest.LogEvent("a", 0, "during"))
				pass(10 * time.Second)
				w.network.Cut(0)
				w.sink.untilAt(t, w.pipe.End())
				pass(time.Minute)
				wantLines(t, w.said(0), again)
				if n := len(w.network.Dials()); n != 1 {
					t.Errorf("%d connections", n)
				}
			})
		})
	}
}

// A long cut: the silence is noticed, the reason is said and now and then
// said again, attempts are few, and when it is over the link is soon back.
func TestCutOfTenMinutes(t *testing.T) {
	for name, way := range map[string]vmtest.Direction{
		"both ways": vmtest.ToVM | vmtest.FromVM, "to the VM": vmtest.ToVM, "from the VM": vmtest.FromVM,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(w *world) {
				w.pipe.Append(vmtest.LogEvent("a", 0, "before"))
				w.sink.untilAt(t, w.pipe.End())
				cut, dials, mark := time.Now(), len(w.network.Dials()), w.logs.Len()
				w.network.Cut(way)
				w.pipe.Append(vmtest.LogEvent("a", 6, "during"))
				w.sink.until(t, "the loss", func(s *sink) bool { return len(s.reasons) == 1 })
				if took := time.Since(cut); took > noticed {
					t.Errorf("noticed after %s, want %s at most", took, noticed)
				}
				if err := w.b.Send(t.Context(), []byte("true\n")); !errors.Is(err, vm.ErrDown) || !errors.Is(err, vm.ErrStalled) {
					t.Errorf("Send meanwhile: %v", err)
				}
				pass(tenMinute - time.Since(cut))
				w.network.Cut(0)
				if n := len(w.network.Dials()) - dials; n < 20 || n > mostDials/2 { // each takes its 10 s
					t.Errorf("%d attempts in ten minutes", n)
				}
				w.soon(returned, []string{"before", "during"})
				lines := w.said(mark)
				reminders := 0
				for len(lines) > 3 && strings.HasPrefix(lines[2], "builder still can't be reached rung=tcp") {
					lines = append(lines[:2], lines[3:]...)
					reminders++
				}
				wantLines(t, lines, lost, unmet, again)
				if reminders < 2 || reminders > 4 { // after one minute, two more, four more, as soon as an attempt shows it
					t.Errorf("%d reminders", reminders)
				}
			})
		})
	}
}

// The VM's container is stopped for ten minutes: the connection ends, further
// ones are refused.
func TestVMPoweredOffAndOn(t *testing.T) {
	bubble(t, func(w *world) {
		dials, mark := len(w.network.Dials()), w.logs.Len()
		w.network.Refuse(true)
		w.srv.Cut()
		pass(tenMinute)
		if n := len(w.network.Dials()) - dials; n < 40 || n > mostDials {
			t.Errorf("%d attempts in ten minutes", n)
		}
		wantLines(t, w.said(mark)[:2], []string{"link to the builder lost rung=link", "connection ended: "}, unmet)
		// QEMU is there before the VM's SSH server is, and that before the runner.
		mark = w.logs.Len()
		w.srv.Set(func(f *vmtest.Faults) { f.Silent = true })
		w.network.Refuse(false)
		_ = w.sink.untilRung(t, vm.RungSSH)
		wantLines(t, w.said(mark)[:1], []string{"builder can't be reached yet rung=ssh", "no SSH greeting from", "hint=the VM is probably still starting"})
		pass(time.Minute)
		w.pipe.Rotate(nil)
		w.pipe.Append(vmtest.LogEvent("a", 0, "after"))
		w.srv.Set(func(f *vmtest.Faults) { f.Silent = false })
		w.soon(30*time.Second+returned, []string{"after"}) // an attempt may just have begun to wait for a greeting
	})
}

// The VM reboots, by itself or by QEMU's reset, which tells nobody. While it
// boots QEMU takes connections that nobody greets.
func TestVMRebooted(t *testing.T) {
	for name, test := range map[string]struct {
		silent time.Duration // until it is up again and ends connections that it doesn't know
		lost   []string
	}{
		"shut down":         {0, []string{"link to the builder lost rung=link", "connection ended: ", "hint=it is connected again by itself"}},
		"reset":             {20 * time.Second, []string{"link to the builder lost rung=link", "connection ended: ", "hint=it is connected again by itself"}},
		"reset, boots long": {3 * time.Minute, lost},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(w *world) {
				w.pipe.Append(vmtest.LogEvent("a", 0, "before"))
				w.sink.untilAt(t, w.pipe.End())
				mark := w.logs.Len()
				w.srv.Set(func(f *vmtest.Faults) { f.Silent = true })
				w.network.Freeze()
				pass(test.silent)
				w.srv.Cut()
				_ = w.sink.untilRung(t, vm.RungSSH)
				w.pipe.Rotate(nil)
				w.pipe.Append(vmtest.LogEvent("a", 6, "after"))
				w.srv.Set(func(f *vmtest.Faults) { f.Silent = false })
				w.soon(30*time.Second+returned, []string{"before", "after"})
				lines := w.said(mark)
				wantLines(t, append(lines[:2:2], lines[len(lines)-1]), test.lost,
					[]string{"builder can't be reached yet rung=ssh", "no SSH greeting from", "hint=the VM is probably still starting"}, again)
			})
		})
	}
}

// Whatever a VM does with new connections, there are few of them; and how
// often it is said is bounded too.
func TestReconnectionNeverStorms(t *testing.T) {
	for name, test := range map[string]struct {
		set   func(*vmtest.Faults)
		first []string
	}{
		"hung up on after the login": {
			func(f *vmtest.Faults) { f.DropLogins = true },
			[]string{"builder can't be reached yet rung=ssh", "start SFTP: the link to the VM is down", "hint=the VM is probably still starting"},
		},
		"cut in the greeting": {
			func(f *vmtest.Faults) { f.CutAfter = 10 },
			[]string{"builder can't be reached yet rung=ssh", "hint=the VM is probably still starting"},
		},
		"the user's key unknown": {
			func(f *vmtest.Faults) { f.RefuseUser = true },
			[]string{"builder can't be reached yet rung=user key", "refuses user builder"},
		},
		"no SFTP": {
			func(f *vmtest.Faults) { f.NoSFTP = true },
			[]string{"builder can't be reached yet rung=sftp", "subsystem request failed", "hint=the VM wants an OpenSSH server with its sftp subsystem (Subsystem sftp internal-sftp"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(w *world) {
				dials, mark := len(w.network.Dials()), w.logs.Len()
				w.srv.Set(test.set)
				w.srv.Cut()
				pass(tenMinute)
				if n := len(w.network.Dials()) - dials; n < 40 || n > mostDials {
					t.Errorf("%d attempts in ten minutes", n)
				}
				lines := w.said(mark)
				if len(lines) > 2+10 {
					t.Errorf("%d lines in ten minutes:\n%s", len(lines), strings.Join(lines, "\n"))
				}
				wantLines(t, lines[:2], []string{"link to the builder lost rung=link"}, test.first)
				w.srv.Set(func(f *vmtest.Faults) { *f = vmtest.Faults{NoExec: true} })
				w.soon(returned, nil)
			})
		})
	}
}

// Links that come up and break before they held for a while are made anew ever
// more slowly; one that held is made anew at once.
func TestFlappingLinkBacksOff(t *testing.T) {
	bubble(t, func(w *world) {
		from, dials := time.Now(), len(w.network.Dials())
		for time.Since(from) < tenMinute {
			n := w.ups()
			pass(time.Second)
			w.srv.Cut()
			w.sink.untilUp(t, n+1)
		}
		if n := len(w.network.Dials()) - dials; n < 40 || n > mostDials {
			t.Errorf("%d connections in ten minutes of links that break after a second", n)
		}
		w.srv.Cut()
		w.sink.untilUp(t, w.ups()+1)
		pass(31 * time.Second) // it held
		w.srv.Cut()
		w.soon(750*time.Millisecond, nil)
	})
}

// The connection ends while sessions are opened on it: nothing waits for them
// for ever.
func TestCutWhileSessionsAreOpened(t *testing.T) {
	bubble(t, func(w *world) {
		for range 100 {
			n := w.ups()
			w.srv.Cut()
			w.sink.untilUp(t, n+1) // the watcher's comes next
		}
	})
}

// A connection goes silent after any number of bytes: in the greeting, while
// keys are agreed on, in the login, while SFTP starts, in the first reads. Each
// time a bound ends it, the reason says so, and the next connection is made.
func TestSilentAtAnyPoint(t *testing.T) {
	bubble(t, func(w *world) {
		rungs := map[vm.Rung]int{}
		for after := 1; after < 4000; after += 197 {
			from, before, known := time.Now(), w.ups(), 0
			w.sink.until(t, "nothing", func(s *sink) bool { known = len(s.reasons); return true })
			w.network.Hold(after)
			w.srv.Cut()
			w.sink.until(t, "the reason", func(s *sink) bool {
				for _, reason := range s.reasons[known:] {
					if errors.Is(reason, vm.ErrStalled) || errors.Is(reason, vm.ErrSlow) || errors.Is(reason, vm.ErrNoGreeting) && errors.Is(reason, os.ErrDeadlineExceeded) {
						rungs[rung(reason)]++
						return true
					}
				}
				return false
			})
			if took := time.Since(from); took > returned+noticed {
				t.Errorf("silent after %d bytes: said after %s", after, took)
			}
			w.network.Hold(0)
			w.sink.untilUp(t, before+1)
		}
		if rungs[vm.RungSSH] < 5 || rungs[vm.RungLink] < 1 {
			t.Errorf("silences on the rungs %v", rungs)
		}
	})
}

// rung returns the rung that an error names.
func rung(err error) vm.Rung {
	var broken *vm.RungError
	if errors.As(err, &broken) {
		return broken.Rung
	}
	return vm.RungLink
}

// Transfers end with the link when it goes silent under them, each way, and can
// be made again.
func TestSilentDuringTransfers(t *testing.T) {
	data := content(1 << 20)
	for name, way := range map[string]vmtest.Direction{"to the VM": vmtest.ToVM, "from the VM": vmtest.FromVM} {
		for kind, transfer := range map[string]func(w *world, onTheWay func()) error{
			"upload": func(w *world, onTheWay func()) error {
				return w.b.Upload(w.t.Context(), digest, int64(len(data)), true, func(out io.Writer) error {
					if err := writes(data[:len(data)/2])(out); err != nil {
						return err
					}
					onTheWay()
					return writes(data[len(data)/2:])(out)
				})
			},
			"download": func(w *world, onTheWay func()) error {
				name := filepath.Join(w.srv.Dir(), "image.iso")
				if err := os.WriteFile(name, data, 0o600); err != nil {
					return err
				}
				var got bytes.Buffer
				_, err := w.b.Copy(w.t.Context(), name, 0, writer(func(p []byte) (int, error) {
					if got.Len() == 0 {
						onTheWay()
					}
					return got.Write(p)
				}))
				if err == nil && !bytes.Equal(got.Bytes(), data) {
					w.t.Error("other bytes came")
				}
				return err
			},
		} {
			t.Run(kind+", silent "+name, func(t *testing.T) {
				bubble(t, func(w *world) {
					var cut time.Time
					err := transfer(w, func() {
						cut = time.Now()
						w.network.Cut(way)
					})
					if took := time.Since(cut); took > noticed || !errors.Is(err, vm.ErrDown) || !errors.Is(err, vm.ErrStalled) {
						t.Errorf("ended after %s: %v", took, err)
					}
					w.network.Cut(0)
					w.sink.untilUp(t, 2)
					if err := transfer(w, func() {}); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}

type writer func(p []byte) (int, error)

func (w writer) Write(p []byte) (int, error) { return w(p) }
