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

// A disk that fills up is looked at, and said, also where no job waits for it.
func TestRoomIsLookedAtWithoutJobs(t *testing.T) {
	b := newBench(t)
	var looks atomic.Int64
	b.cfg.Room = func() string { looks.Add(1); return "" }
	d, stop := b.run()
	defer stop()
	if err := d.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if looks.Load() == 0 {
		t.Error("nobody looked")
	}
}

// How much room there is changes all the time. That is no news of a job that
// waits for it.
func TestSameReason(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		same bool
	}{
		{"", "", true},
		{"no room: 1.0 MB are free", "no room: 12 bytes are free", true},
		{"no room: 1.0 MB are free", "no room: 1.0 MB are free", true},
		{"no room on a: 1.0 MB are free", "no room on b: 1.0 MB are free", false},
		{"a free slot on vm1", "a free slot on vm2", false},
		{"", "no link", false},
	} {
		if got := sameReason(tc.a, tc.b); got != tc.same {
			t.Errorf("%q, %q: %t", tc.a, tc.b, got)
		}
	}
}
