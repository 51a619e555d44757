package runner

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// A job that waits, however old, is not given the slot of one that runs: not
// while the disk is full and neither gets on, nor by the next runner.
func TestSlotOfRunningJob(t *testing.T) {
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted %v", restarted), func(t *testing.T) {
			m := newMachine(t)
			m.cfg.Slots = 2
			preparing, release := make(chan struct{}), make(chan struct{})
			enter, leave := sync.OnceFunc(func() { close(preparing) }), sync.OnceFunc(func() { close(release) })
			var full atomic.Bool
			m.cfg.fault = func(op, path string) error {
				switch {
				case strings.HasSuffix(path, "/old-1/script") && !exists(filepath.Join(m.cfg.Data, "room")):
					enter()
					<-release
					return unix.ENOSPC
				case op == "append" && full.CompareAndSwap(true, false):
					leave()
					return unix.ENOSPC
				}
				return nil
			}
			m.start()
			t.Cleanup(leave)
			wait, open := m.gate("first")
			go1, open1 := m.gate("one")
			go2, open2 := m.gate("two")
			m.submit("first", wait)
			m.await("the first to start", 1, ofJob(pipe.TypeStarted, "first"))
			m.submit("old", go2)
			<-preparing // in the second slot
			m.submit("new", go1+"echo said\n"+go2)
			open()
			if e := m.await("the new one to start", 1, ofJob(pipe.TypeStarted, "new")); e.Started.Slot != 1 {
				t.Fatalf("new is in slot %d", e.Started.Slot)
			}
			if restarted {
				stopped := make(chan struct{})
				go func() { defer close(stopped); m.stop() }()
				m.until("the end of the runner", func() bool { return strings.Contains(m.log.String(), "the runner stops") })
				leave()
				<-stopped
			} else {
				full.Store(true)
				open1()
				<-release
			}
			if err := os.WriteFile(filepath.Join(m.cfg.Data, "room"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if restarted {
				m.start()
				open1()
			}
			if e := m.await("the old one to start", 1, ofJob(pipe.TypeStarted, "old")); e.Started.Slot != 2 {
				t.Errorf("old is in slot %d, where new runs", e.Started.Slot)
			}
			open2()
			m.finished("old")
			m.finished("new")
			if got := m.output("new"); got != "said\n" {
				t.Errorf("output %q", got)
			}
		})
	}
}
