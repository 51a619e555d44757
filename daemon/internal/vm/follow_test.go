package vm_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"github.com/google/go-cmp/cmp"
)

// never is longer than any test: what paces the follower then isn't this.
const never = time.Hour

func lines(n int) []pipe.Event {
	var events []pipe.Event
	for i := range n {
		events = append(events, vmtest.LogEvent("a-job", int64(i), fmt.Sprint(i)))
	}
	return events
}

func TestFollowHandsOverEveryEventOnce(t *testing.T) {
	r, p := up(t, quick)
	var want []string
	for i := range 300 {
		text := fmt.Sprintf("line %d\n", i)
		want = append(want, text)
		p.Append(vmtest.LogEvent("a-job", 0, text))
	}
	r.sink.untilAt(t, p.End())
	if diff := cmp.Diff(want, r.sink.texts()); diff != "" {
		t.Error(diff)
	}
	if err := r.end(t); err != nil {
		t.Errorf("Run: %v", err)
	}
}

func TestFollowReadsMuchInFewReads(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	for range 20 {
		p.Append(lines(1000)...)
	}
	r := start(t, srv, newSink(pipe.Position{}), quick)
	r.sink.untilAt(t, p.End())
	if n := len(r.sink.texts()); n != 20_000 {
		t.Errorf("%d events, want 20000", n)
	}
	// One read for 255 KiB, a few for the hello and the end.
	if reads, most := srv.Requests("read"), int(p.End().Offset/261120)+20; reads > most {
		t.Errorf("%d reads for %d bytes, want at most %d", reads, p.End().Offset, most)
	}
}

func TestFollowIsWokenAtRest(t *testing.T) {
	timings := quick
	timings.Poll = never // only the watcher can help
	r, p := up(t, timings)
	for i := range 5 {
		// Let it come to rest: the watcher is armed and nothing is read any more.
		r.srv.AwaitWatcher(t, i+1)
		p.Append(vmtest.LogEvent("a-job", 0, "wake up"))
		r.sink.untilAt(t, p.End())
	}
	if r.logs.FilterMessageSnippet("no wake-ups").Len() != 0 {
		t.Error("the watcher was complained about")
	}
}

func TestFollowPollsWithoutWatcher(t *testing.T) {
	for name, fault := range map[string]func(*vmtest.Faults){
		"exec refused":        func(f *vmtest.Faults) { f.NoExec = true },
		"one session allowed": func(f *vmtest.Faults) { f.MaxSessions = 1 },
		"not installed":       func(f *vmtest.Faults) { f.NoInotify = true },
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			srv.Set(fault)
			p := vmtest.NewPipe(t, srv.Dir())
			timings := quick
			timings.Poll = never
			r := start(t, srv, newSink(pipe.Position{}), timings)
			r.sink.untilAt(t, p.End())
			untilLogged(t, r.logs, "no wake-ups from the builder, polling instead")
			p.Append(lines(3)...)
			r.sink.untilAt(t, p.End())
			if n := r.logs.FilterMessage("no wake-ups from the builder, polling instead").Len(); n != 1 {
				t.Errorf("%d lines about it, want 1", n)
			}
		})
	}
}

func TestFollowPollCoversLostWakeUp(t *testing.T) {
	r, p := up(t, quick)
	r.srv.AwaitWatcher(t, 1)
	r.srv.KillWatchers()
	// Each finds its way by the poll, and the first that does has the watcher armed again.
	events := time.NewTicker(4 * quick.Poll)
	defer events.Stop()
	for r.srv.Watchers() < 2 {
		p.Append(lines(2)...)
		r.sink.untilAt(t, p.End())
		select {
		case <-events.C:
		case <-t.Context().Done():
			t.Fatal("the watcher isn't armed again")
		}
	}
}

func TestWatcherIsReaped(t *testing.T) {
	for name, end := range map[string]func(*rig, *testing.T){
		"clean stop": func(r *rig, t *testing.T) {
			if err := r.end(t); err != nil {
				t.Error(err)
			}
		},
		"cut": func(r *rig, _ *testing.T) { r.srv.Refuse() },
	} {
		t.Run(name, func(t *testing.T) {
			timings := quick
			timings.Poll = never
			r, _ := up(t, timings)
			r.srv.AwaitWatcher(t, 1)
			end(r, t)
			ctx, cancel := context.WithTimeout(t.Context(), bound)
			defer cancel()
			if err := r.srv.Reaped(ctx); err != nil {
				t.Errorf("processes are left in the VM: %v", err)
			}
		})
	}
}

func TestFollowGoesOnAtPosition(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	from := p.Append(lines(3)...)
	p.Append(vmtest.LogEvent("a-job", 3, "next"))
	r := start(t, srv, newSink(from), quick)
	r.sink.untilAt(t, p.End())
	if diff := cmp.Diff([]string{"next"}, r.sink.texts()); diff != "" {
		t.Error(diff)
	}
	said := r.logs.FilterMessage("builder is up").All()[0].ContextMap() // though what the runner said lies before
	if said["slots"] != int64(2) || said["generation"] != string(p.End().Generation) {
		t.Errorf("it says %v", said)
	}
}

func TestFollowAcrossCuts(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	srv.Set(func(f *vmtest.Faults) { f.CutAfter = 600_000 }) // two reads and a part of the third
	var want []string
	for _, e := range lines(15_000) {
		want = append(want, string(e.Log.Data))
	}
	p.Append(lines(15_000)...)
	r := start(t, srv, newSink(pipe.Position{}), quick)
	r.sink.until(t, "two cuts", func(s *sink) bool { return len(s.reasons) >= 2 })
	srv.Set(func(f *vmtest.Faults) { f.CutAfter = 0 })
	r.sink.untilAt(t, p.End())
	if diff := cmp.Diff(want, r.sink.texts()); diff != "" {
		t.Error(diff)
	}
}

func TestFollowOldGenerations(t *testing.T) {
	build := func(t *testing.T) (*vmtest.Server, *vmtest.Pipe, []pipe.Position) {
		srv := vmtest.New(t)
		p := vmtest.NewPipe(t, srv.Dir())
		var after []pipe.Position
		for i := 1; i <= 11; i++ { // two digits: their order is by number
			after = append(after, p.Append(vmtest.LogEvent("a-job", 0, fmt.Sprintf("%d first", i))))
			p.Append(vmtest.LogEvent("a-job", 0, fmt.Sprintf("%d second", i)))
			if i < 11 {
				p.Rotate(nil)
			}
		}
		return srv, p, after
	}
	t.Run("all there", func(t *testing.T) {
		srv, p, after := build(t)
		r := start(t, srv, newSink(after[7]), quick)
		r.sink.untilAt(t, p.End())
		want := []string{"8 second", "9 first", "9 second", "10 first", "10 second", "11 first", "11 second"}
		if diff := cmp.Diff(want, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
		if len(r.sink.damages) != 0 {
			t.Errorf("damages %v though nothing is gone", r.sink.damages)
		}
	})
	t.Run("the position's is gone", func(t *testing.T) {
		srv, p, after := build(t)
		for _, at := range []int{7, 8} {
			if err := os.Remove(filepath.Join(srv.Dir(), after[at].Generation.File())); err != nil {
				t.Fatal(err)
			}
		}
		r := start(t, srv, newSink(after[7]), quick)
		r.sink.untilAt(t, p.End())
		want := []string{"10 first", "10 second", "11 first", "11 second"}
		if diff := cmp.Diff(want, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
		if d := r.sink.untilDamaged(t, 1); d.place != after[7] || !errors.Is(d.reason, vm.ErrGone) {
			t.Errorf("damage at %v: %v", d.place, d.reason)
		}
	})
	t.Run("of another disk", func(t *testing.T) {
		srv, p, _ := build(t)
		r := start(t, srv, newSink(pipe.Position{Generation: "40-00000000", Offset: 5}), quick)
		r.sink.untilAt(t, p.End())
		if diff := cmp.Diff([]string{"11 first", "11 second"}, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("zero is the current one's start", func(t *testing.T) {
		srv, p, _ := build(t)
		r := start(t, srv, newSink(pipe.Position{}), quick)
		r.sink.untilAt(t, p.End())
		if diff := cmp.Diff([]string{"11 first", "11 second"}, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
	})
	t.Run("the old one lost its tail in a crash", func(t *testing.T) {
		srv, p, after := build(t)
		if err := os.Truncate(filepath.Join(srv.Dir(), after[9].Generation.File()), after[9].Offset-3); err != nil {
			t.Fatal(err)
		}
		r := start(t, srv, newSink(after[9]), quick)
		r.sink.untilAt(t, p.End())
		if diff := cmp.Diff([]string{"11 first", "11 second"}, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
		if r.logs.FilterMessageSnippet("gone from an old generation").Len() != 1 {
			t.Error("no warning")
		}
	})
	t.Run("the old one has a hole", func(t *testing.T) {
		srv, p, after := build(t)
		name := filepath.Join(srv.Dir(), after[9].Generation.File())
		if err := errors.Join(os.Truncate(name, after[9].Offset), os.Truncate(name, after[9].Offset+60)); err != nil {
			t.Fatal(err)
		}
		r := start(t, srv, newSink(after[9]), quick)
		r.sink.untilAt(t, p.End())
		if diff := cmp.Diff([]string{"11 first", "11 second"}, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
		if d := r.sink.untilDamaged(t, 1); d.place != after[9] || !errors.Is(d.reason, pipe.ErrPunched) {
			t.Errorf("damage at %v: %v", d.place, d.reason)
		}
	})
	t.Run("the old one ends within a line", func(t *testing.T) {
		srv, p, after := build(t)
		if err := os.Truncate(filepath.Join(srv.Dir(), after[9].Generation.File()), after[9].Offset+9); err != nil {
			t.Fatal(err)
		}
		r := start(t, srv, newSink(after[9]), quick)
		r.sink.untilAt(t, p.End())
		if diff := cmp.Diff([]string{"11 first", "11 second"}, r.sink.texts()); diff != "" {
			t.Error(diff)
		}
		if r.logs.FilterMessageSnippet("was cut off").Len() != 1 {
			t.Error("no warning")
		}
	})
}

func TestFollowNoticesNewGeneration(t *testing.T) {
	for name, poll := range map[string]time.Duration{"by its watcher": never, "by its poll": quick.Poll} {
		t.Run(name, func(t *testing.T) {
			timings := quick
			timings.Poll = poll
			srv := vmtest.New(t)
			if poll != never {
				srv.Set(func(f *vmtest.Faults) { f.NoExec = true })
			}
			p := vmtest.NewPipe(t, srv.Dir())
			r := start(t, srv, newSink(pipe.Position{}), timings)
			r.sink.untilUp(t, 1)
			var want []string
			for i := range 4 {
				before, after := fmt.Sprint(i, " before"), fmt.Sprint(i, " after")
				p.Append(vmtest.LogEvent("a-job", 0, before))
				p.Rotate(nil)
				p.Append(vmtest.LogEvent("a-job", 0, after))
				if i%2 == 0 { // or two at once
					r.sink.untilAt(t, p.End())
				}
				want = append(want, before, after)
			}
			r.sink.untilAt(t, p.End())
			if diff := cmp.Diff(want, r.sink.texts()); diff != "" {
				t.Error(diff)
			}
			r.sink.until(t, "one link", func(s *sink) bool { return s.ups == 1 })
		})
	}
}

func TestFollowPassesOverWhatItCannotRead(t *testing.T) {
	r, p := up(t, quick)
	for seq := range uint64(2) {
		p.Raw(fmt.Appendf(nil, "{\"seq\":%d,\"time\":\"2026-01-01T00:00:00Z\",\"type\":\"telepathy\"}\n", seq+2))
		p.Skip(1)
	}
	// Torn by a full disk, ended with the next event, and the numbers go on.
	p.Append(vmtest.LogEvent("a-job", 0, "one"))
	p.Raw([]byte("{\"seq\":5,\"ti\n"))
	p.Append(vmtest.LogEvent("a-job", 3, "two"))
	p.Raw([]byte("{\"se\n"))
	p.Append(vmtest.LogEvent("a-job", 6, "three"))
	r.sink.untilAt(t, p.End())
	if diff := cmp.Diff([]string{"one", "two", "three"}, r.sink.texts()); diff != "" {
		t.Error(diff)
	}
	for _, message := range []string{"unknown event passed over", "line that is no event passed over"} {
		if n := r.logs.FilterMessage(message).Len(); n != 1 {
			t.Errorf("%d lines %q, want 1", n, message)
		}
	}
	if len(r.sink.damages) > 0 {
		t.Errorf("damages %v", r.sink.damages)
	}
}

// What other hands do to the file that is being read: it is told once, with
// its place, and what the VM says afterwards is read all the same.
func TestFollowReportsOtherHands(t *testing.T) {
	for name, test := range map[string]struct {
		harm func(*testing.T, *vmtest.Server, *vmtest.Pipe)
		want error // besides vm.ErrDamaged
		says string
	}{
		"punched at the end": {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) { p.Raw(make([]byte, 4096)) }, pipe.ErrPunched, "punched"},
		"punched in the middle": {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) {
			p.Raw(make([]byte, 4096))
			p.Raw(fmt.Append(nil, "of a line\n"))
		}, pipe.ErrPunched, "punched"},
		"cut":     {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) { p.Truncate(p.End().Offset - 40) }, vm.ErrShrunk, "became shorter"},
		"emptied": {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) { p.Truncate(0) }, vm.ErrShrunk, "0 bytes"},
		"a line without an end": {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) {
			p.Raw([]byte(strings.Repeat("x", pipe.MaxLine+1)))
		}, pipe.ErrLineTooLong, "too long"},
		// The next generation happens to be as long.
		"garbage": {func(t *testing.T, s *vmtest.Server, p *vmtest.Pipe) {
			p.Raw([]byte("hello?\n"))
			before := time.Now().Add(-time.Hour)
			if err := os.Chtimes(filepath.Join(s.Dir(), pipe.Out), before, before); err != nil {
				t.Fatal(err)
			}
		}, pipe.ErrEvent, "malformed"},
		"lines taken out": {func(_ *testing.T, _ *vmtest.Server, p *vmtest.Pipe) {
			p.Skip(3)
			p.Append(vmtest.LogEvent("a-job", 0, "after a gap"))
		}, pipe.ErrEvent, "number 6 follows number 2"},
		"removed": {func(t *testing.T, s *vmtest.Server, _ *vmtest.Pipe) {
			if err := os.Remove(filepath.Join(s.Dir(), pipe.Out)); err != nil {
				t.Fatal(err)
			}
		}, nil, "removed"},
		"the folder removed": {func(t *testing.T, s *vmtest.Server, _ *vmtest.Pipe) {
			if err := os.RemoveAll(s.Dir()); err != nil {
				t.Fatal(err)
			}
		}, nil, "removed"},
	} {
		t.Run(name, func(t *testing.T) {
			r, p := up(t, quick)
			good := p.Append(vmtest.LogEvent("a-job", 0, "good"))
			r.sink.untilAt(t, good)
			test.harm(t, r.srv, p)
			d := r.sink.untilDamaged(t, 1)
			if d.place != good || !errors.Is(d.reason, vm.ErrDamaged) || test.want != nil && !errors.Is(d.reason, test.want) ||
				!strings.Contains(d.reason.Error(), test.says) {
				t.Errorf("damage at %v: %v", d.place, d.reason)
			}
			if err := os.MkdirAll(r.srv.Dir(), 0o700); err != nil {
				t.Fatal(err)
			}
			p.Lose(nil)
			p.Append(vmtest.LogEvent("a-job", 0, "told again"))
			r.sink.untilAt(t, p.End())
			if texts := r.sink.texts(); texts[len(texts)-1] != "told again" {
				t.Errorf("texts %q", texts)
			}
			if len(r.sink.damages) != 1 || r.sink.ups != 1 {
				t.Errorf("%d links, damages %v", r.sink.ups, r.sink.damages)
			}
		})
	}
}

// Answers that come behind the damage, in the same generation, are read.
func TestFollowReadsOnBehindDamage(t *testing.T) {
	r, p := up(t, quick)
	for i := range 2 {
		p.Truncate(p.End().Offset + 300_000) // more than one read; at once, for half a write is seen, too
		p.Raw([]byte("rest of a line\n"))
		p.Append(lines(100)...)
		r.sink.untilDamaged(t, i+1)
		p.Append(vmtest.LogEvent("a-job", 0, fmt.Sprint("behind ", i)))
		r.sink.untilAt(t, p.End())
	}
	// What lies between the damage and the file's end when it was found is no
	// loss: it is told again.
	var behind []string
	for _, text := range r.sink.texts() {
		if strings.HasPrefix(text, "behind") {
			behind = append(behind, text)
		}
	}
	if diff := cmp.Diff([]string{"behind 0", "behind 1"}, behind); diff != "" {
		t.Error(diff)
	}
}

// Numbers go on over a new link: what was taken out in the meantime is missed.
func TestFollowMissesLinesAfterACut(t *testing.T) {
	r, p := up(t, quick)
	at := p.Append(lines(3)...)
	r.sink.untilAt(t, at)
	r.srv.Refuse()
	p.Skip(1)
	p.Append(vmtest.LogEvent("a-job", 9, "after a gap"))
	r.srv.Listen()
	if d := r.sink.untilDamaged(t, 1); d.place != at || !strings.Contains(d.reason.Error(), "number 6 follows number 4") {
		t.Errorf("damage at %v: %v", d.place, d.reason)
	}
}

// The first line is not the runner's: no reason to stay away, since only a
// request can mend it.
func TestFollowWithoutHello(t *testing.T) {
	for name, test := range map[string]struct {
		harm func(*vmtest.Pipe)
		says string
	}{
		"garbage":       {func(p *vmtest.Pipe) { p.Overwrite(0, []byte("nonsense")) }, "malformed event"},
		"punched":       {func(p *vmtest.Pipe) { p.Overwrite(0, make([]byte, 100)) }, "punched"},
		"no end":        {func(p *vmtest.Pipe) { p.Overwrite(0, []byte(strings.Repeat("x", pipe.MaxLine+5))) }, "too long"},
		"another event": {func(p *vmtest.Pipe) { p.Overwrite(0, logLine()) }, `first event is "log"`},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			p := vmtest.NewPipe(t, srv.Dir())
			p.Append(vmtest.LogEvent("a-job", 0, "before"))
			p.Rotate(nil)
			from := p.Append(lines(3)...)
			test.harm(p)
			r := start(t, srv, newSink(from), quick)
			d := r.sink.untilDamaged(t, 1)
			if _, valid := d.place.Generation.Number(); !valid || d.place.Generation == from.Generation ||
				!errors.Is(d.reason, vm.ErrDamaged) || !strings.Contains(d.reason.Error(), test.says) {
				t.Errorf("damage at %v: %v", d.place, d.reason)
			}
			if err := r.b.Send(t.Context(), []byte("true\n")); err != nil {
				t.Errorf("Send: %v", err)
			}
			p.Lose(nil)
			p.Append(vmtest.LogEvent("a-job", 0, "told again"))
			r.sink.untilAt(t, p.End())
			if diff := cmp.Diff([]string{"told again"}, r.sink.texts()); diff != "" || len(r.sink.damages) != 1 {
				t.Errorf("damages %v, texts (-want +got):\n%s", r.sink.damages, diff)
			}
		})
	}
}

// logLine is a line that is as long as it has to be, and no hello.
func logLine() []byte {
	line, err := pipe.MarshalEvent(pipe.Event{
		Seq: 1, Time: time.Unix(0, 0).UTC(), Type: pipe.TypeLog, Job: "a-job", Attempt: 1, Log: &pipe.Log{Data: []byte("x")},
	})
	if err != nil {
		panic(err)
	}
	return line
}

// A reader that knows nothing of what was read before meets what the runner
// has freed.
func TestFollowFromNothingMeetsAHole(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	p.Append(lines(2)...)
	sound := p.End()
	p.Raw(make([]byte, 1<<20))
	p.Raw([]byte("rest of a line\n"))
	p.Append(lines(3)...)
	r := start(t, srv, newSink(pipe.Position{}), quick)
	d := r.sink.untilDamaged(t, 1)
	if d.place != sound || !errors.Is(d.reason, vm.ErrGone) || errors.Is(d.reason, vm.ErrDamaged) {
		t.Errorf("damage at %v: %v", d.place, d.reason)
	}
}

// The Sink is told once when it has all that there was.
func TestFollowTellsThatItCaughtUp(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	for range 3 { // more than one read
		p.Append(lines(1000)...)
	}
	s := newSink(pipe.Position{})
	s.block = make(chan struct{})
	r := start(t, srv, s, quick)
	s.until(t, "an event on its way", func(s *sink) bool { return s.taking })
	if s.caughtUp > 0 {
		t.Error("caught up with nothing")
	}
	close(s.block)
	s.until(t, "all", func(s *sink) bool { return s.caughtUp == 1 && s.position == p.End() })
	p.Rotate(nil)
	p.Append(lines(3)...)
	s.until(t, "the next generation", func(s *sink) bool { return s.caughtUp == 2 && s.position == p.End() })
	r.srv.Cut()
	s.until(t, "the next link", func(s *sink) bool { return s.caughtUp == 3 && s.ups == 2 })
}

func TestSinkErrorEndsRun(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	s := newSink(pipe.Position{})
	s.fail = errors.New("disk full")
	r := start(t, srv, s, quick)
	if err := r.wait(t); !errors.Is(err, s.fail) || !strings.Contains(err.Error(), "builder vm") {
		t.Errorf("Run: %v", err)
	}
}

// An error of the Sink's own doesn't go under in a stop.
func TestSinkErrorWhileStopping(t *testing.T) {
	srv := vmtest.New(t)
	vmtest.NewPipe(t, srv.Dir())
	s := newSink(pipe.Position{})
	s.fail, s.block = errors.New("disk full"), make(chan struct{})
	s.deaf = true
	r := start(t, srv, s, quick)
	s.until(t, "an event on its way", func(s *sink) bool { return s.taking })
	r.stop()
	close(s.block)
	if err := r.wait(t); !errors.Is(err, s.fail) {
		t.Errorf("Run: %v", err)
	}
}

func TestSinkHoldsReadingBack(t *testing.T) {
	srv := vmtest.New(t)
	p := vmtest.NewPipe(t, srv.Dir())
	for range 5 {
		p.Append(lines(1000)...)
	}
	s := newSink(pipe.Position{})
	s.block = make(chan struct{})
	r := start(t, srv, s, quick)
	s.untilUp(t, 1)
	if reads := srv.Requests("read"); reads > 3 {
		t.Errorf("%d reads while nothing is taken", reads)
	}
	close(s.block)
	s.untilAt(t, p.End())
	if err := r.end(t); err != nil {
		t.Error(err)
	}
}
