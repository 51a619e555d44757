package dispatch

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

const archive = "an archive"

// addNixOS adds a job that has inputs and wants a system.
func (b *bench) addNixOS(name, system string) job.ID {
	b.t.Helper()
	id := b.add(name)
	j, err := b.store.Get(b.t.Context(), id)
	if err != nil {
		b.t.Fatal(err)
	}
	sum := sha256.Sum256([]byte(archive))
	j.Recipe = job.RecipeNixOS
	j.Inputs = &job.Inputs{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(archive))}
	j.NixOS = &job.NixOS{Format: "iso", System: system, Nixpkgs: "nixos-26.05"}
	if _, err := b.store.Update(b.t.Context(), j); err != nil {
		b.t.Fatal(err)
	}
	return id
}

func writeArchive(_ job.Job, w io.Writer) error {
	_, err := io.WriteString(w, archive)
	return err
}

func (m *machine) uploaded() []bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.uploads)
}

func TestInputsGoFirst(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	id := b.addNixOS("host", "x86_64-linux")
	_, stop := b.run()
	defer stop()
	j := b.settled(id)
	want := []job.Event{job.Created, job.Claimed, job.Accepted, job.Finished, job.PublishedDone}
	if diff := cmp.Diff(want, story(j)); diff != "" {
		t.Errorf("story (-want +got):\n%s", diff)
	}
	if got := b.vm.uploaded(); len(got) != 1 || got[0] {
		t.Errorf("uploads %v", got)
	}
}

// An upload that fails is tried again; other jobs don't wait for it.
func TestInputsAreTriedAgain(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	tried, mend := make(chan struct{}), make(chan struct{})
	first := sync.OnceFunc(func() { close(tried) })
	b.vm.broken = func() error {
		select {
		case <-mend:
			return nil
		default:
		}
		first()
		return errors.New("no room")
	}
	slow, quick := b.addNixOS("slow", "x86_64-linux"), b.add("quick")
	_, stop := b.run()
	defer stop()
	b.settled(quick)
	if j := b.until(slow, "claimed", func(j job.Job) bool { return j.Attempt == 1 }); j.State != job.Sending {
		t.Errorf("state %s", j.State)
	}
	<-tried
	close(mend)
	if j := b.settled(slow); j.State != job.Done {
		t.Errorf("state %s", j.State)
	}
}

// A long upload is not a request that nobody answers.
func TestSlowUploadIsWaitedFor(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	b.cfg.AnswerTimeout = 10 * time.Millisecond
	began, goOn := make(chan struct{}, 10), make(chan struct{})
	b.vm.broken = func() error { began <- struct{}{}; <-goOn; return nil }
	id := b.addNixOS("slow", "x86_64-linux")
	_, stop := b.run()
	defer stop()
	<-began
	other := b.add("other") // known to the next dispatcher only
	<-time.After(5 * b.cfg.AnswerTimeout)
	close(goOn)
	b.settled(id)
	if n := len(b.vm.uploaded()); n != 1 {
		t.Errorf("%d uploads", n)
	}
	if j, err := b.store.Get(t.Context(), other); err != nil || j.State != job.Queued {
		t.Errorf("%s, %v", j.State, err)
	}
}

// Refused for their inputs, they are uploaded from the beginning.
func TestRefusedInputs(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	b.vm.refuse = []pipe.Refused{
		{Reason: pipe.ReasonInputs, Retryable: true, Message: "other bytes"},
		{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"},
	}
	id := b.addNixOS("host", "x86_64-linux")
	_, stop := b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s, attempt %d", j.State, j.Attempt)
	}
	// A disk that was full for the request has them still.
	if diff := cmp.Diff([]bool{false, true}, b.vm.uploaded()); diff != "" {
		t.Errorf("uploads, whether fresh (-want +got):\n%s", diff)
	}
}

// The VM dies under the job: its next attempt brings the inputs again.
func TestInputsOfTheNextAttempt(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	outcomes := []pipe.Finished{{Status: pipe.StatusInterrupted, LogLength: 10}, {Status: pipe.StatusSucceeded, LogLength: 10}}
	b.vm.outcome = func() pipe.Finished {
		o := outcomes[0]
		outcomes = outcomes[1:]
		return o
	}
	id := b.addNixOS("host", "x86_64-linux")
	_, stop := b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 2 {
		t.Errorf("%s, attempt %d", j.State, j.Attempt)
	}
	if diff := cmp.Diff([]bool{false, false}, b.vm.uploaded()); diff != "" {
		t.Errorf("uploads, whether fresh (-want +got):\n%s", diff)
	}
}

// A copy of the drop that was damaged can't be built.
func TestDamagedSource(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = func(job.Job, io.Writer) error { return fmt.Errorf("%w: other bytes", ErrSource) }
	id := b.addNixOS("host", "x86_64-linux")
	_, stop := b.run()
	defer stop()
	j := b.settled(id)
	if j.State != job.Failed || j.Result == nil || !strings.Contains(j.Result.Reason, "other bytes") {
		t.Errorf("%s, %+v", j.State, j.Result)
	}
}

// No builder for its system: the job says so, lets others pass, and runs when
// one is there.
func TestSystemNobodyHas(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = writeArchive
	id, other := b.addNixOS("arm", "aarch64-linux"), b.add("other")
	_, stop := b.run()
	b.settled(other)
	j := b.until(id, "explained", func(j job.Job) bool { return j.Why != "" })
	if want := "no builder for aarch64-linux: vm builds for x86_64-linux"; !strings.HasPrefix(j.Why, want) || j.State != job.Queued {
		t.Errorf("%s, why %q, want %q", j.State, j.Why, want)
	}
	stop()
	b.vm.mu.Lock()
	b.vm.systems = []string{"x86_64-linux", "aarch64-linux"}
	b.vm.hello()
	b.vm.mu.Unlock()
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Why != "" {
		t.Errorf("%s, why %q", j.State, j.Why)
	}
}

func TestUnbuildable(t *testing.T) {
	hello := func(systems ...string) *pipe.Hello { return &pipe.Hello{Systems: systems} }
	for name, tc := range map[string]struct {
		workers map[string]*worker
		system  string
		want    string
	}{
		"any":         {map[string]*worker{"a": {hello: hello("x")}}, "", ""},
		"has it":      {map[string]*worker{"a": {hello: hello("x", "y")}}, "y", ""},
		"none":        {map[string]*worker{"a": {hello: hello("x", "y")}, "b": {hello: hello("z")}}, "w", "no builder for w: a builds for x, y; b builds for z; "},
		"not heard":   {map[string]*worker{"a": {hello: hello("x")}, "b": {}}, "w", ""},
		"no builders": {nil, "w", ""},
	} {
		d := New(Config{}, nil)
		d.workers = tc.workers
		if got := d.unbuildable(tc.system); !strings.HasPrefix(got, tc.want) || tc.want == "" && got != "" {
			t.Errorf("%s: %q, want %q", name, got, tc.want)
		}
	}
}

// A VM that is down is no reason while another one takes jobs, and one that is
// ready for other systems only is none for a job that it can't build.
func TestWaitsFor(t *testing.T) {
	hello := func(systems ...string) *pipe.Hello { return &pipe.Hello{Systems: systems} }
	now := time.Now()
	busy := func(systems ...string) *worker { return &worker{up: true, current: true, hello: hello(systems...)} }
	down := func(h *pipe.Hello) *worker {
		return &worker{why: "no link to it", down: obstacle{why: "no link to it"}, hello: h}
	}
	for name, tc := range map[string]struct {
		a, b   *worker
		system string
		want   string
		moment bool
	}{
		"second down":               {busy("x"), down(nil), "x", "a free slot on a", false},
		"first down":                {down(nil), busy("x"), "x", "a free slot on b", false},
		"both down":                 {down(nil), down(nil), "", "no link to it", false},
		"ready for others":          {busy("y"), down(hello("x")), "x", "no link to it", false},
		"unfit":                     {busy("x"), &worker{up: true, current: true, hello: &pipe.Hello{Systems: []string{"x"}, Unfit: "no Nix"}}, "x", "a free slot on a", false},
		"just up":                   {down(nil), &worker{up: true, upSince: now}, "x", "no link to it", true},
		"just up, another is ready": {busy("x"), &worker{up: true, upSince: now}, "x", "a free slot on a", false},
		"for none":                  {busy("y"), busy("z"), "x", "no builder for x: a builds for y; b builds for z; ", false},
	} {
		d := New(Config{Now: func() time.Time { return now }, AnswerTimeout: time.Second}, nil)
		d.workers = map[string]*worker{"a": tc.a, "b": tc.b}
		if got, known := d.waitsFor(tc.system, ""); !strings.HasPrefix(got, tc.want) || known == tc.moment {
			t.Errorf("%s: %q, known %t", name, got, known)
		}
	}
}

// What the job's program reports is the reason, where the exit code alone says
// nothing.
func TestReportedReason(t *testing.T) {
	report := pipe.Report(`{"error":{"summary":"undefined variable","at":"a.nix:1:2","advice":"Define it."}}`)
	code := 1
	for name, tc := range map[string]struct {
		finished pipe.Finished
		want     string
	}{
		"failed":      {pipe.Finished{Status: pipe.StatusFailed, ExitCode: &code, Report: report}, "undefined variable (at a.nix:1:2)"},
		"no report":   {pipe.Finished{Status: pipe.StatusFailed, ExitCode: &code}, ""},
		"out of time": {pipe.Finished{Status: pipe.StatusTimeout, Reason: "it ran longer than 1h", Report: report}, "it ran longer than 1h"},
		"killed":      {pipe.Finished{Status: pipe.StatusFailed, Reason: "out of memory", Report: report}, "out of memory"},
		"succeeded":   {pipe.Finished{Status: pipe.StatusSucceeded, Report: report}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			tc.finished.LogLength = 10
			b.vm.outcome = func() pipe.Finished { return tc.finished }
			id := b.add("host")
			_, stop := b.run()
			defer stop()
			j := b.settled(id)
			if j.Result.Reason != tc.want || string(j.Result.Report) != string(tc.finished.Report) {
				t.Errorf("reason %q, want %q; report %s", j.Result.Reason, tc.want, j.Result.Report)
			}
		})
	}
}

// The dispatcher stops while an upload is under way.
func TestStopInMidUpload(t *testing.T) {
	b := newBench(t)
	ctx, cancel := context.WithCancel(t.Context())
	b.cfg.Inputs = writeArchive
	began := make(chan struct{}, 10)
	b.vm.broken = func() error { began <- struct{}{}; <-ctx.Done(); return ctx.Err() }
	id := b.addNixOS("host", "x86_64-linux")
	_, stop := b.run()
	<-began
	cancel()
	stop()
	b.vm.mu.Lock()
	b.vm.broken = nil
	b.vm.mu.Unlock()
	_, stop = b.run()
	defer stop()
	if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
		t.Errorf("%s, attempt %d", j.State, j.Attempt)
	}
}
