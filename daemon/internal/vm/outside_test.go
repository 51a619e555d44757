package vm_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/console"
	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"
)

// besides is what the containers of a VM leave for the sidecar.
type besides struct {
	t   *testing.T
	dir string
}

func newBesides(t *testing.T) besides {
	t.Helper()
	b := besides{t, t.TempDir()}
	if err := os.Mkdir(filepath.Join(b.dir, "vm"), 0o755); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b besides) put(name, text string) {
	b.t.Helper()
	// By rename: whoever reads meanwhile gets one or the other.
	path := filepath.Join(b.dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		b.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		b.t.Fatal(err)
	}
}

func (b besides) config(c *vm.Config) { c.Console = console.Folder(b.dir).Of("vm") }

// What can be seen of the VM from outside is the rung that is told, whether
// QEMU takes the connection for the VM or nobody does; and it is left when the
// VM is there.
func TestRungsSeenFromOutside(t *testing.T) {
	refused := func(srv *vmtest.Server) func() { srv.Refuse(); return srv.Listen }
	silent := func(srv *vmtest.Server) func() {
		srv.Set(func(f *vmtest.Faults) { f.Silent = true })
		return func() { srv.Set(func(f *vmtest.Faults) { f.Silent = false }) }
	}
	for name, test := range map[string]struct {
		harm  func(*vmtest.Server) (mend func())
		files map[string]string
		rung  vm.Rung
		err   error
		says  string
		hint  string
	}{
		"image being made": {
			refused,
			map[string]string{"image": "making step 3 of 5: evaluating the VM's configuration\n"},
			vm.RungImage, console.ErrNoImage,
			"the VM has no image to boot: it is being made, step 3 of 5: evaluating the VM's configuration", "docker compose logs vmimage",
		},
		"image not made": {
			refused,
			map[string]string{"image": "failed there is not enough room to make the VM's ISO\n"},
			vm.RungImage, console.ErrNoImage, "the VM has no image to boot: there is not enough room to make the VM's ISO", "docker compose logs vmimage",
		},
		"image missing": {
			refused,
			map[string]string{"vm/state": "image there is neither /boot.iso nor /storage/boot.iso\n"},
			vm.RungImage, console.ErrNoImage, "no image to boot: there is neither /boot.iso nor", "docker compose up -d",
		},
		"image of junk": {
			refused,
			map[string]string{"vm/state": "unusable /storage/boot.iso is no ISO image\n", "image": "ready 0123\n"},
			vm.RungImage, console.ErrUnusable, "the VM's image does not boot: /storage/boot.iso is no ISO image", "remove boot.iso from the volume vm-storage",
		},
		"firmware finds nothing": {
			silent,
			map[string]string{"vm/state": "running\n", "vm/console": "SeaBIOS (version 1.17.0)\r\nBooting from DVD/CD...\r\nNo bootable device.\r\n"},
			vm.RungImage, console.ErrUnusable, "the VM's image does not boot: No bootable device.", "docker compose logs vm",
		},
		"kernel panics": {
			silent,
			map[string]string{"vm/state": "running\n", "vm/console": "Linux version 6.12\n[    2.1] Kernel panic - not syncing: VFS: Unable to mount root fs\n[    2.2] ---[ end\n"},
			vm.RungImage, console.ErrUnusable, "the VM's image does not boot: [    2.1] Kernel panic", "docker compose logs vm",
		},
		"QEMU paused for want of disk": {
			silent,
			map[string]string{"vm/state": "paused its disk could not grow, the host has 3 MiB free for it\n", "vm/console": "osbuilder: address 10.0.2.15/24\n"},
			vm.RungQEMU, console.ErrPaused,
			"QEMU stopped the VM because its disk can't grow: its disk could not grow, the host has 3 MiB free for it", "docker system df",
		},
		"QEMU ended": {
			refused,
			map[string]string{"vm/state": "ended only 700 MiB of memory are free here\n"},
			vm.RungQEMU, console.ErrEnded, "QEMU does not run: only 700 MiB of memory are free here", "docker compose logs vm",
		},
		"no address": {
			silent,
			map[string]string{"vm/state": "running\n", "vm/console": "Linux version 6.12\nosbuilder: the VM has no network address\n[   33.1] random: crng init done\n"},
			vm.RungAddress, console.ErrNoAddress, "the VM has no network address: osbuilder: the VM has no network address", "docker compose restart vm",
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			p := vmtest.NewPipe(t, srv.Dir())
			mend := test.harm(srv)
			b := newBesides(t)
			for file, text := range test.files {
				b.put(file, text)
			}
			timings := quick
			timings.Handshake, timings.Remind = 300*time.Millisecond, time.Millisecond
			r := start(t, srv, newSink(pipe.Position{}), timings, b.config)
			if err := r.sink.untilRung(t, test.rung); !errors.Is(err, test.err) {
				t.Errorf("%v is not %v", err, test.err)
			}
			if panics, ok := strings.CutSuffix(test.files["vm/console"], "---[ end\n"); ok { // and again, with another time
				b.put("vm/console", strings.ReplaceAll(panics, "2.1", "3.7"))
			}
			// What was met on the way is another each time, and no news.
			untilLines(t, r.logs, "builder still can't be reached", 2)
			if n := r.logs.FilterMessage("builder can't be reached yet").Len(); n != 1 {
				t.Errorf("it says %d times that it can't be reached yet", n)
			}
			r.sink.until(t, "one reason for the jobs to wait", func(s *sink) bool { return len(s.reasons) == 1 })
			if told := r.logs.FilterMessage("console of the VM").Len() > 0; told != (test.files["vm/console"] != "") {
				t.Errorf("told of the console: %t", told)
			}
			mend()
			r.sink.untilUp(t, 1)
			r.sink.untilAt(t, p.End())
			wantLine(t, r.logs, test.rung, test.says, test.hint)
		})
	}
}

// A link that breaks because QEMU stopped the VM, or ended, says so at once, and
// not only when the next one can't be had.
func TestStoppedUnderTheLink(t *testing.T) {
	for state, says := range map[string]string{
		"paused the host has 3 MiB free for it\n": "QEMU stopped the VM because its disk can't grow: the host has 3 MiB free for it",
		"ended with status 1\n":                   "QEMU does not run: with status 1",
		"running\n":                               "",
		"off\n":                                   "",
	} {
		t.Run(state, func(t *testing.T) {
			srv := vmtest.New(t)
			p := vmtest.NewPipe(t, srv.Dir())
			b := newBesides(t)
			b.put("vm/state", "running\n")
			b.put("vm/console", "No bootable device.\n") // of a way up that is over
			timings := quick
			timings.Keepalive, timings.KeepaliveReply = 20*time.Millisecond, 200*time.Millisecond
			r := start(t, srv, newSink(pipe.Position{}), timings, b.config)
			r.sink.untilUp(t, 1)
			b.put("vm/state", state)
			srv.Freeze()
			untilLogged(t, r.logs, "link to the builder lost")
			b.put("vm/state", "running\n")
			fields := r.logs.FilterMessage("link to the builder lost").All()[0].ContextMap()
			said, _ := fields["error"].(string)
			want := vm.RungQEMU
			if says == "" {
				want, says = vm.RungLink, "the VM went silent"
			}
			if fields["rung"] != string(want) || !strings.Contains(said, says) || !strings.Contains(said, "the VM went silent") {
				t.Errorf("it says %v, want rung %q and %q", fields, want, says)
			}
			r.sink.untilUp(t, 2)
			r.sink.untilAt(t, p.End())
		})
	}
}

// What is seen from outside explains that the VM is out of reach, and nothing
// else: not a key that is wrong, and not a VM that starts.
func TestOutsideExplainsNoMoreThanItCan(t *testing.T) {
	for name, test := range map[string]struct {
		fault func(*vmtest.Faults)
		files map[string]string
		rung  vm.Rung
	}{
		"wrong user key": {func(f *vmtest.Faults) { f.RefuseUser = true }, map[string]string{"vm/state": "ended by force\n"}, vm.RungUserKey},
		"it boots": {
			func(f *vmtest.Faults) { f.Silent = true },
			map[string]string{"vm/state": "running\n", "vm/console": "No bootable device.\nLinux version 6.12\n", "image": "making step 1 of 5\n"},
			vm.RungSSH,
		},
		"it has an address": {
			func(f *vmtest.Faults) { f.Silent = true },
			map[string]string{"vm/state": "running\n", "vm/console": "osbuilder: the VM has no network address\nosbuilder: address 10.0.2.15/24, gateway 10.0.2.1\n"},
			vm.RungSSH,
		},
		"nothing is there": {func(f *vmtest.Faults) { f.Silent = true }, nil, vm.RungSSH},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			srv.Set(test.fault)
			b := newBesides(t)
			for file, text := range test.files {
				b.put(file, text)
			}
			timings := quick
			if test.rung == vm.RungSSH {
				timings.Handshake = 200 * time.Millisecond
			}
			r := start(t, srv, newSink(pipe.Position{}), timings, b.config)
			_ = r.sink.untilRung(t, test.rung)
			r.sink.until(t, "one reason", func(s *sink) bool { return len(s.reasons) == 1 })
		})
	}
}

// A step of the making is news; the same step again is none.
func TestStepsOfTheImageAreTold(t *testing.T) {
	srv := vmtest.New(t)
	srv.Refuse()
	b := newBesides(t)
	b.put("image", "making step 1 of 5: looking for room\n")
	r := start(t, srv, newSink(pipe.Position{}), quick, b.config)
	r.sink.until(t, "the first step", func(s *sink) bool { return len(s.reasons) == 1 })
	b.put("image", "making step 2 of 5: fetching nixpkgs\n")
	r.sink.until(t, "the second step", func(s *sink) bool {
		return len(s.reasons) == 2 && strings.Contains(s.reasons[1].Error(), "step 2 of 5")
	})
	if n := r.logs.FilterMessage("builder can't be reached yet").Len(); n != 2 {
		t.Errorf("%d lines about two steps", n)
	}
}

// The end of the console is told with a rung that stays broken: once, and
// again when there is more of it.
func TestConsoleIsToldWhenARungStaysBroken(t *testing.T) {
	srv := vmtest.New(t)
	srv.Set(func(f *vmtest.Faults) { f.Silent = true })
	b := newBesides(t)
	b.put("vm/state", "running\n")
	b.put("vm/console", strings.Repeat("an old line\n", 300)+"\x1b[2J\x1b[0;32mStarting\x1b[0m ssh\r\n\r\n10%\r20%\r\n\a"+"\u202egnp.exe\n")
	timings := quick
	timings.Handshake, timings.Remind = 50*time.Millisecond, 60*time.Millisecond
	r := start(t, srv, newSink(pipe.Position{}), timings, b.config)
	untilLogged(t, r.logs, "builder still can't be reached")
	told := func() (lines []string) {
		for _, e := range r.logs.FilterMessage("console of the VM").All() {
			fields := e.ContextMap()
			if fields["builder"] != "vm" {
				t.Errorf("a line of %v", fields["builder"])
			}
			lines = append(lines, fields["line"].(string))
		}
		return lines
	}
	untilLines(t, r.logs, "builder still can't be reached", 2)
	lines := told()
	if len(lines) != 20 || lines[0] != "an old line" {
		t.Errorf("%d lines, the first is %q", len(lines), lines[0])
	}
	if diff := cmp.Diff([]string{"an old line", "Starting ssh", "20%", `\a\u202egnp.exe`}, lines[16:]); diff != "" {
		t.Errorf("the last lines (-want +got):\n%s", diff)
	}
	b.put("vm/console", "one more\n")
	untilLines(t, r.logs, "console of the VM", 21)
	if lines := told(); lines[20] != "one more" {
		t.Errorf("then %q", lines[20])
	}
}

func untilLines(t *testing.T, logs *observer.ObservedLogs, message string, n int) {
	t.Helper()
	deadline := time.After(bound)
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for logs.FilterMessage(message).Len() < n {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain for %d lines %q", n, message)
		}
	}
}
