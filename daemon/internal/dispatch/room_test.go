package dispatch

import (
	"strings"
	"sync/atomic"
	"testing"

	"osbuilder/daemon/internal/job"
)

// While a disk is nearly full no job is begun, and each says so; one that runs
// goes on and is published.
func TestNoJobIsBegunWithoutRoom(t *testing.T) {
	b := newBench(t)
	var full atomic.Bool
	full.Store(true)
	b.cfg.Room = func() string {
		if full.Load() {
			return "room in /output: 1.0 MB are free"
		}
		return ""
	}
	first, second := b.add("hello"), b.add("other")
	d, stop := b.run()
	defer stop()
	for _, id := range []job.ID{first, second} {
		b.until(id, "waiting for room", func(j job.Job) bool { return strings.Contains(j.Why, "room in /output: 1.0 MB are free") })
	}
	if err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.vm.mu.Lock()
	if n := len(b.vm.spool); n > 0 {
		t.Errorf("%d jobs were sent", n)
	}
	b.vm.mu.Unlock()
	full.Store(false)
	b.settled(first)
	b.settled(second)
}
