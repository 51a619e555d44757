//go:build e2e

package chaos

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"osbuilder/e2e/internal/harness"
	"osbuilder/internal/testenv"
)

const (
	// patience is how long nothing at all may move.
	patience = 6 * time.Minute
	// calm is how long the next fault waits for one to be got over.
	calm = 2 * time.Minute
	// ahead is how many jobs may wait or run, beyond those that are done.
	ahead = 8
)

var installation *machine

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, func(ctx context.Context, p *harness.Project) error {
		begin := time.Now()
		installation = &machine{p: p}
		if err := installation.start(ctx, int64(64+4*jobs())<<20); err != nil {
			return err
		}
		fmt.Printf("the VM is up after %.0f s\n", time.Since(begin).Seconds())
		return nil
	}, "KVM=N", "SLOTS=4", "LOG_LEVEL=info", "MIN_FREE=1M", "NIXPKGS="+nixpkgs, fmt.Sprintf("JOB_TIMEOUT=%s", jobTimeout)))
}

// number is a setting of scripts/chaos.sh.
func number(name string, otherwise uint64) uint64 {
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		fmt.Fprintf(os.Stderr, "chaos: %s=%s is no number\n", name, text)
		os.Exit(2)
	}
	return n
}

// jobTimeout is how long a job may run: many times what the longest needs that
// is not meant to run into it, on a machine that does other things as well.
const jobTimeout = 4 * time.Minute

func jobs() int { return int(number("OSBUILDER_CHAOS_JOBS", 20)) }

// What is promised holds while everything breaks.
func TestChaos(t *testing.T) {
	plan := NewPlan(number("OSBUILDER_CHAOS_SEED", 1), jobs())
	begin := time.Now()
	o := play(t, installation, plan)
	r := Check(o)
	fmt.Printf("seed %d, %d jobs, %d faults, %s\n%s", plan.Seed, len(plan.Jobs), len(o.Faults), time.Since(begin).Round(time.Second), r.Table(o))
	told := make(map[string]bool)
	for _, v := range r.Violations {
		t.Error(v)
		if !told[v.Job] {
			told[v.Job] = true
			evidence(t, installation, v.Job)
		}
	}
}

// evidence prints all that is known of a job, since nothing of it outlives the
// test.
func evidence(t *testing.T, m *machine, name string) {
	t.Helper()
	story, err := command(t.Context(), "docker", "exec", m.sidecar, "osbuilder", "show", name)
	fmt.Printf("--- %s: %v\n%s", name, err, story)
	log, err := command(t.Context(), "docker", "logs", m.sidecar)
	fmt.Printf("--- the sidecar's log of it: %v\n", err)
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"`+name+`"`) && !strings.Contains(line, `"build output"`) {
			fmt.Print(line)
		}
	}
	for _, out := range outcomes(t, m, name) {
		log, err := m.agent(t.Context(), fmt.Sprintf("journalctl --no-pager -o short-iso | grep -F %s", out.ID))
		fmt.Printf("--- the VM's log of %s since it was last reset: %v\n%s\n", out.ID, err, log)
	}
}

// The disk beneath the VM's is full, and QEMU stops the VM in the middle of a
// job. The VM's container and the sidecar say so, and once there is room all
// goes on by itself, as if nothing had been.
func TestHostDiskFull(t *testing.T) {
	m := installation
	if m.storage == "" {
		testenv.Lacks(t, "only root can give the VM's storage a small disk of its own")
	}
	l := look(t, m)
	l.drop(Job{Name: "chaos-still", Kind: Long, Lines: 200, Pause: 100 * time.Millisecond})
	harness.Eventually(t, harness.JobTimeout, "execution", func() bool {
		all, err := m.executions(t.Context())
		return err == nil && len(all) > l.before
	})
	free, err := m.standStill(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	free = sync.OnceValue(free)
	defer func() { _ = free() }() // in case that it is still full
	vmSays := func(what string) func() bool {
		return func() bool { return strings.Contains(harness.Docker(t, "logs", m.vm), what) }
	}
	harness.Eventually(t, harness.StepTimeout, "word of the VM's container",
		vmSays("qemu: warning: the VM stands still: its disk could not grow, the host has 0 MiB free for it. It goes on by itself when there are 512 MiB"))
	harness.Eventually(t, harness.StepTimeout, "word of the sidecar", func() bool {
		return m.p.Logged(t, `"link to the builder lost"`, `"rung":"qemu"`,
			"QEMU stopped the VM because its disk can't grow: the host has 0 MiB free for it", "make room on the disk of Docker's volumes")
	})
	if l.ended() > 0 {
		t.Error("the job came to its end: its VM never stood still")
	}
	if err := free(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.StepTimeout, "VM that goes on", vmSays("free again: the VM goes on"))
	harness.Eventually(t, harness.JobTimeout, "outcome", func() bool { return l.ended() == 1 })
	r := Check(l.result())
	for _, v := range r.Violations {
		t.Error(v)
	}
	if r.Attempts != 1 || r.Executions != 1 || r.Found != 200 || r.Cuts > 0 {
		t.Errorf("%d attempts, %d executions, %d lines, %d cuts", r.Attempts, r.Executions, r.Found, r.Cuts)
	}
}

// The control: with the naive loop in the runner's place one job and two
// faults are enough to break a promise, and Check sees it. Else it would see
// nothing at all.
func TestNaiveLoopBreaks(t *testing.T) {
	m := installation
	if _, err := m.agent(t.Context(), `touch /data/chaos/naive && systemctl stop pipe-runner && systemctl start chaos-naive`); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := m.agent(t.Context(), `rm /data/chaos/naive && systemctl stop chaos-naive && systemctl start pipe-runner`); err != nil {
			t.Error(err)
		}
	}()
	l := look(t, m)
	runs := func(n int) func() bool {
		return func() bool {
			all, err := m.executions(t.Context())
			return err == nil && len(all) >= l.before+n
		}
	}
	l.drop(Job{Name: "chaos-naive", Kind: Long, Lines: 60, Pause: 100 * time.Millisecond})
	harness.Eventually(t, harness.JobTimeout, "job in the naive loop", runs(1))
	l.inject(t.Context(), Fault{Break: KillRunner})
	harness.Eventually(t, harness.JobTimeout, "second execution of one attempt", func() bool {
		l.inject(t.Context(), Fault{Break: Repeat})
		return runs(2)()
	})
	harness.Eventually(t, harness.JobTimeout, "outcome", func() bool { return l.ended() == 1 })
	o := l.result()
	r := Check(o)
	fmt.Printf("the naive loop, 1 job, %d faults\n%s", len(o.Faults), r.Table(o))
	for _, v := range r.Violations {
		fmt.Println("  as it should be:", v)
	}
	if !r.has(ExecutedTwice) {
		t.Error("the checker does not see what the naive loop did twice")
	}
}

// A lookout drops jobs, has faults happen, and sees what comes of it.
type lookout struct {
	t    *testing.T
	m    *machine
	w    watcher
	stop func() []string // returns what was half visible

	before int // executions that are not of these jobs

	mu sync.Mutex // guards o
	o  Observed
}

func look(t *testing.T, m *machine) *lookout {
	t.Helper()
	before, err := m.executions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	l := &lookout{t: t, m: m, before: len(before)}
	var wg sync.WaitGroup
	var wrong []string
	wg.Go(func() { l.w.run(ctx, m.sidecar) })
	wg.Go(func() { wrong = half(ctx, m.p) })
	l.stop = sync.OnceValue(func() []string {
		cancel()
		wg.Wait()
		return wrong
	})
	t.Cleanup(func() { l.stop() })
	return l
}

// drop drops a job.
func (l *lookout) drop(j Job) {
	l.t.Helper()
	if j.Kind == Folder {
		l.m.p.DropFolder(l.t, j.Name, j.Files())
	} else {
		l.m.p.Drop(l.t, j.Name+".sh", j.Script())
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.o.Jobs = append(l.o.Jobs, Seen{Job: j, Dropped: time.Now()})
}

// inject has a fault happen. What it can't do is an error of the test's.
func (l *lookout) inject(ctx context.Context, f Fault) Injected {
	done, err := l.m.inject(ctx, f)
	if err != nil && ctx.Err() == nil {
		l.t.Errorf("the test itself: %v", err)
	}
	fmt.Printf("%s  %s, %.1f s\n", done.From.UTC().Format(time.TimeOnly), f.Break, done.To.Sub(done.From).Seconds())
	l.mu.Lock()
	defer l.mu.Unlock()
	l.o.Faults = append(l.o.Faults, done)
	return done
}

// cancel has a job cancelled, as a user does it; for as long as the sidecar
// can't be asked, again and again.
func (l *lookout) cancel(ctx context.Context, j Job) {
	pause(ctx, j.Cancel)
	for ctx.Err() == nil {
		out, err := command(ctx, "docker", "exec", l.m.sidecar, "osbuilder", "cancel", j.Name)
		if err == nil || strings.Contains(out, "ended") {
			return
		}
		pause(ctx, time.Second)
	}
}

// counts says how many jobs were dropped and how many faults happened.
func (l *lookout) counts() (jobs, faults int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.o.Jobs), len(l.o.Faults)
}

// ended notes which jobs have an outcome, and returns how many.
func (l *lookout) ended() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for i := range l.o.Jobs {
		s := &l.o.Jobs[i]
		if s.Ended.IsZero() {
			if found, _ := filepath.Glob(l.m.p.Output(s.Job.Name, "*", "result.json")); len(found) > 0 {
				s.Ended = time.Now()
			}
		}
		if !s.Ended.IsZero() {
			n++
		}
	}
	return n
}

// play does what the plan says, until every job has its outcome, or nothing
// moves any more.
func play(t *testing.T, m *machine, plan Plan) Observed {
	t.Helper()
	l := look(t, m)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		for _, f := range plan.Faults {
			if pause(ctx, f.After); ctx.Err() != nil {
				return
			}
			done := l.inject(context.WithoutCancel(ctx), f)
			for until := time.Now().Add(calm); f.Calm && ctx.Err() == nil && time.Now().Before(until) && l.w.recovered(done, nil) == 0; {
				pause(ctx, 100*time.Millisecond)
			}
		}
	})
	defer wg.Wait()
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	cancels := &sync.WaitGroup{}
	defer cancels.Wait()
	last, progress := 0, time.Now()
	for last < len(plan.Jobs) && time.Since(progress) < patience {
		// Drops and faults keep in step, so that neither outlives the other.
		dropped, faults := l.counts()
		for dropped < len(plan.Jobs) && dropped*len(plan.Faults) <= (faults+1)*len(plan.Jobs)+ahead*len(plan.Faults) {
			l.drop(plan.Jobs[dropped])
			if j := plan.Jobs[dropped]; j.Kind == Cancel {
				cancels.Go(func() { l.cancel(ctx, j) })
			}
			dropped++
		}
		if n := l.ended(); n > last {
			last, progress = n, time.Now()
		}
		<-tick.C
	}
	cancel()
	wg.Wait() // what was filled is free again
	if last == len(plan.Jobs) {
		settle(t, m)
	}
	return l.result()
}

// result completes what was observed.
func (l *lookout) result() Observed {
	t, m := l.t, l.m
	t.Helper()
	l.ended()
	o := l.o
	o.Half = l.stop()
	all, err := m.executions(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	o.Executions = all[l.before:]
	for i := range o.Faults {
		var next *Injected
		if i+1 < len(o.Faults) {
			next = &o.Faults[i+1]
		}
		o.Faults[i].Recovered = l.w.recovered(o.Faults[i], next)
	}
	for i := range o.Jobs {
		o.Jobs[i].Outcomes = outcomes(t, m, o.Jobs[i].Job.Name)
	}
	for _, pattern := range []string{m.p.Jobs("chaos-*"), m.p.Jobs("rejected", "*")} {
		left, err := filepath.Glob(pattern)
		if err != nil {
			t.Error(err)
		}
		o.Inbox = append(o.Inbox, left...)
	}
	return o
}

// settle waits until the VM has forgotten all jobs: nothing more can come.
func settle(t *testing.T, m *machine) {
	t.Helper()
	harness.Eventually(t, harness.BootTimeout, "VM that knows no job", func() bool {
		out, err := m.agent(t.Context(), "ls /data/artifacts /data/jobs")
		return err == nil && strings.TrimSpace(out) == "/data/artifacts:\n\n/data/jobs:"
	})
}

// outcomes reads what is in output/NAME.
func outcomes(t *testing.T, m *machine, name string) []Outcome {
	t.Helper()
	var all []Outcome
	for _, r := range m.p.Results(t, name) {
		out := Outcome{
			ID: r.Job, Status: r.Status, ExitCode: r.ExitCode, Reason: r.Reason, Attempts: r.Attempts, Log: r.Log,
			Files: make(map[string]string), Told: make(map[string]string),
		}
		for _, a := range r.Artifacts {
			out.Told[a.Name] = a.SHA256
		}
		entries, err := os.ReadDir(r.Folder)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			switch e.Name() {
			case "build.log", "result.json", "source", "SHA256SUMS":
				continue
			}
			sum, err := digest(filepath.Join(r.Folder, e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			out.Files[e.Name()] = sum
		}
		all = append(all, out)
	}
	return all
}

func digest(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}
