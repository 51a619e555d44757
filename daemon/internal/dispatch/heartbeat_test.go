package dispatch

import (
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// The longer the silence, the seldomer a line: a build of six silent hours
// fills no log.
func TestPulse(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var p pulse
	if p.due(start) {
		t.Error("due at once")
	}
	beats := func(from time.Time, minutes int) (at []int) {
		for m := 1; m <= minutes; m++ {
			if p.due(from.Add(time.Duration(m) * time.Minute)) {
				at = append(at, m)
			}
		}
		return at
	}
	if diff := cmp.Diff([]int{1, 3, 7, 15, 31, 47, 63, 79}, beats(start, 90)); diff != "" {
		t.Error("minutes of silence after which a line comes:", diff)
	}
	p.heard(start, []byte("x\n"))
	if diff := cmp.Diff([]int{1, 3, 7}, beats(start, 10)); diff != "" {
		t.Error("after a line of output:", diff)
	}
	if p.due(start.Add(-time.Hour)) { // the clock was set back
		t.Error("due before the silence began")
	}
}

func TestLastLine(t *testing.T) {
	long := strings.Repeat("x", 3*maxLastLine)
	for _, tt := range []struct {
		said []string
		want string
	}{
		{nil, ""},
		{[]string{"\n \n"}, ""},
		{[]string{"one\ntwo\n"}, "two"},
		{[]string{"one\nt", "wo", "\n\n"}, "two"},
		{[]string{"one\n", "10%\r20%\r"}, "20%"},
		{[]string{long, "\nend"}, "end"},
		{[]string{long}, long[:maxLastLine]},
		{[]string{"a\n" + long[:maxLastLine-10], "y\n"}, long[:maxLastLine-10] + "y"},
		{[]string{strings.Repeat("ü", maxLastLine) + "x"}, strings.Repeat("ü", maxLastLine/2-1) + "x"},
	} {
		var p pulse
		for _, s := range tt.said {
			p.heard(time.Now(), []byte(s))
		}
		if got := p.last(); got != tt.want || len(p.tail) > maxLastLine {
			t.Errorf("%.40q: last line %q, want %q; %d bytes kept", tt.said, got, tt.want, len(p.tail))
		}
	}
}

// The user reads that a silent build still runs, and what it said last.
func TestSilentBuild(t *testing.T) {
	b := newBench(t)
	core, logs := observer.New(zap.InfoLevel)
	b.cfg.Log = zap.New(core)
	var ahead atomic.Int64
	b.cfg.Now = func() time.Time { return time.Now().Add(time.Duration(ahead.Load())) }
	b.vm.hold = true
	id := b.add("quiet")
	_, stop := b.run()
	defer stop()
	b.until(id, "a start", func(j job.Job) bool { return !j.Started.IsZero() })
	b.wait("its output", func() bool { return b.log(id) == "first\nend\n" })
	if n := logs.FilterMessage("job still runs").Len(); n != 0 {
		t.Errorf("%d lines say that a job still runs, which has just spoken", n)
	}
	ahead.Store(int64(5 * time.Minute))
	b.wait("line about the silence", func() bool { return logs.FilterMessage("job still runs").Len() > 0 })
	fields := logs.FilterMessage("job still runs").All()[0].ContextMap()
	silent, _ := fields["silent"].(time.Duration)
	running, _ := fields["running"].(time.Duration)
	if fields["job"] != "quiet" || fields["id"] != string(id) || fields["last"] != "end" || silent < 5*time.Minute-time.Second || running < silent {
		t.Errorf("it says %v", fields)
	}
	b.vm.mu.Lock()
	b.vm.outcome = func() pipe.Finished {
		return pipe.Finished{Status: pipe.StatusSucceeded, LogLength: 10, Duration: 61_000}
	}
	for i, size := range []int64{5, 7_000_000, 6} {
		b.vm.say(pipe.Event{Type: pipe.TypeArtifact, Job: string(id), Attempt: 1, Artifact: &pipe.Artifact{
			Name: []string{"SUMS", "disk.iso", "notes"}[i], Size: size, SHA256: strings.Repeat("0", 64),
		}})
	}
	b.vm.end(string(id), 1)
	b.vm.mu.Unlock()
	b.settled(id)
	closing := logs.FilterMessage("job is done").All()
	if len(closing) != 1 {
		t.Fatalf("%d closing lines", len(closing))
	}
	got := closing[0].ContextMap()
	delete(got, "after")
	want := map[string]any{
		"job": "quiet", "id": string(id), "duration": 61 * time.Second, "image": "disk.iso", "bytes": int64(7_000_000),
		"artifacts": int64(3), "output": got["output"],
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("the closing line:", diff)
	}
}
