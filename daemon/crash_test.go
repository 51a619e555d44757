package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"

	"osbuilder/daemon/internal/control"
	"osbuilder/daemon/internal/deliver"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// Both halves are stopped, with SIGKILL, before each of their effects, and
// started again. Whatever the point: each drop comes to one outcome, no
// attempt runs twice, and what is in output/ is whole.

// A dropped is a job of the test, and what has to come of it.
type dropped struct {
	name  string            // of the drop
	files map[string]string // of a folder; else only "" with the script
	job   string            // its folder in output/

	status    string
	log       string
	artifacts map[string]string

	// A file in the round's folder: once it is there the job is cancelled.
	cancelAt string
	early    bool // it may be cancelled before it runs
}

// counted is put in front of every script: the job itself says that it runs.
const counted = "echo \"$JOB_ID $JOB_ATTEMPT\" >>%q\n"

// numbers is what seq prints.
func numbers(from, to int) string {
	var b strings.Builder
	for i := from; i <= to; i++ {
		fmt.Fprintln(&b, i)
	}
	return b.String()
}

// shortPath is the one job whose pairs of stops are tried.
func shortPath() []dropped {
	return []dropped{{
		name: "short.sh", job: "short", status: "succeeded", log: "one\n",
		files:     map[string]string{"": "echo one; echo image >$OUT/short.iso\n"},
		artifacts: map[string]string{"short.iso": "image\n"},
	}}
}

// longPath has all kinds of jobs: output in several batches, an image of
// several chunks, inputs that are uploaded, a failure, one that is cancelled
// as it runs, and one as soon as it is known.
func longPath() []dropped {
	return []dropped{
		{
			name: "long.sh", job: "long", status: "succeeded", log: numbers(1, 300),
			files: map[string]string{"": "seq 1 100; sleep 0.06; seq 101 200; sleep 0.06; seq 201 300\n" +
				"seq 1 30000 >$OUT/big.iso; mkdir $OUT/sub; echo small >\"$OUT/sub/a file\"\n"},
			artifacts: map[string]string{"big.iso": numbers(1, 30000), "sub/a file": "small\n"},
		},
		{
			name: "machine", job: "machine", status: "succeeded", log: "built\n",
			files:     map[string]string{"configuration.nix": "{ imports = [ ./disk.nix ]; }\n", "disk.nix": "{ }\n", "sub/tool": "#!/bin/sh\n"},
			artifacts: map[string]string{"nixos.iso": "{ imports = [ ./disk.nix ]; }\n{ }\n"},
		},
		{
			name: "broken.sh", job: "broken", status: "failed", log: "no\n",
			files: map[string]string{"": "echo no; exit 3\n"},
		},
		{
			name: "stuck.sh", job: "stuck", status: "cancelled", log: "begun\n", cancelAt: "begun",
			files: map[string]string{"": "echo begun; : >../../../../begun; exec sleep 600\n"},
		},
		{
			name: "unwanted.sh", job: "unwanted", status: "cancelled", cancelAt: "jobs", early: true,
			files: map[string]string{"": "exec sleep 600\n"},
		},
	}
}

// builder stands for image-build in the VM.
const builder = `#!/bin/bash
set -eu
for source; do :; done
echo built
cat "$source/configuration.nix" "$source/disk.nix" >"$OUT/nixos.iso"
`

// A round is one round: a VM's SSH server in this process, and the two halves
// as processes that are started again whenever they stop.
type round struct {
	t    *testing.T
	dir  string
	vm   *vmtest.Server
	jobs []dropped

	sidecar, runner *half // this program, each time anew
	ended           chan ending
	cancelled       map[string]bool // those jobs that were
}

// A half is one of the two programs.
type half struct {
	mortal
	plan    []int64 // where its next lives end
	cmd     *exec.Cmd
	ended   chan struct{} // closed when cmd has
	log     bytes.Buffer  // of all its lives
	crashes int
}

type ending struct {
	half *half
	err  error
}

// patience bounds a round. Nothing waits so long unless something is wrong.
const patience = 5 * time.Minute

// scratch returns a folder, in memory where there is room: thousands of rounds
// sync all that they write.
func scratch(t *testing.T) string {
	t.Helper()
	const shm = "/dev/shm"
	var s syscall.Statfs_t
	if err := syscall.Statfs(shm, &s); err != nil || int64(s.Bavail)*s.Bsize < 2<<30 {
		return t.TempDir()
	}
	dir, err := os.MkdirTemp(shm, "crash-") //nolint:usetesting // t.TempDir is on the disk
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func newRound(t *testing.T, jobs []dropped, sidecar, vm []int64) *round {
	t.Helper()
	w := &round{t: t, dir: scratch(t), vm: vmtest.New(t), jobs: jobs, ended: make(chan ending, 2), cancelled: map[string]bool{}}
	w.vm.Set(func(f *vmtest.Faults) { f.NoInotify = true }) // polling is quicker than another process
	m := mortal{
		Dir: w.dir, Pipe: filepath.Join(w.dir, "pipe"), Boot: "boot", Addr: w.vm.Addr(),
		Host: string(ssh.MarshalAuthorizedKey(w.vm.HostKey())), Key: w.vm.PrivateKey(),
	}
	w.sidecar, w.runner = &half{mortal: m, plan: sidecar}, &half{mortal: m, plan: vm}
	w.sidecar.Role, w.runner.Role = "sidecar", "runner"
	t.Cleanup(w.end)
	for _, name := range []string{"jobs", "output", "state", "bin"} {
		w.must(os.Mkdir(w.path(name), 0o755))
	}
	executions := w.path("executions")
	w.must(os.WriteFile(executions, nil, 0o600))
	w.must(os.WriteFile(w.path("bin/image-build"), []byte(strings.Replace(builder, "set -eu\n", "set -eu\n"+fmt.Sprintf(counted, executions), 1)), 0o755))
	for i, j := range w.jobs {
		if script, ok := j.files[""]; ok {
			w.jobs[i].files = map[string]string{"": fmt.Sprintf(counted, executions) + script}
			w.must(os.WriteFile(w.path("jobs", j.name), []byte(w.jobs[i].files[""]), 0o644))
			continue
		}
		for name, text := range j.files {
			path := w.path("jobs", j.name, name)
			w.must(os.MkdirAll(filepath.Dir(path), 0o755))
			w.must(os.WriteFile(path, []byte(text), 0o644))
		}
	}
	return w
}

// end ends what a round that failed has left.
func (w *round) end() {
	for _, h := range []*half{w.sidecar, w.runner} {
		if h.cmd != nil {
			_ = h.cmd.Process.Kill()
			<-h.ended
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(w.t.Context()), patience)
	defer cancel()
	if err := (runner.ProcessUnits{}).KillAll(ctx, w.path("data")); err != nil {
		w.t.Error(err)
	}
}

func (w *round) path(names ...string) string {
	return filepath.Join(append([]string{w.dir}, names...)...)
}

func (w *round) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// start begins a life of a half.
func (w *round) start(ctx context.Context, h *half) {
	w.t.Helper()
	h.StopAt = 0
	if len(h.plan) > 0 {
		h.StopAt, h.plan = h.plan[0], h.plan[1:]
	}
	told, err := json.Marshal(h.mortal)
	w.must(err)
	h.cmd = exec.CommandContext(ctx, os.Args[0], asMortal)
	h.cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "GOGC=off", "GOMEMLIMIT=256MiB"}
	h.cmd.Stdin = bytes.NewReader(told)
	fmt.Fprintf(&h.log, "--- %s starts, to stop at %d\n", h.Role, h.StopAt)
	h.cmd.Stderr = &h.log
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} // not to outlive a test that is ended
	w.must(h.cmd.Start())
	cmd, ended := h.cmd, make(chan struct{})
	h.ended = ended
	go func() {
		err := cmd.Wait()
		close(ended)
		w.ended <- ending{h, err}
	}()
}

// run has the round through and checks what came of it.
func (w *round) run() {
	w.t.Helper()
	defer func() {
		if w.t.Failed() {
			w.tell()
		}
	}()
	ctx, cancel := context.WithTimeout(w.t.Context(), patience)
	defer cancel()
	w.start(ctx, w.runner)
	w.start(ctx, w.sidecar)
	// The sidecar says when nothing is left to do; afterwards there is nobody to ask.
	w.conclude(ctx, w.sidecar, func() bool { return w.through() && w.settled(ctx) })
	w.conclude(ctx, w.runner, w.through)
	w.verify()
}

// conclude waits until all is done, and ends one half in order. Whatever stops
// itself on the way is started again.
func (w *round) conclude(ctx context.Context, h *half, done func() bool) {
	w.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for stopping := false; ; {
		select {
		case e := <-w.ended:
			switch by := signalOf(e.err); {
			case by == syscall.SIGKILL:
				e.half.crashes++
				w.visible()
			case e.half == h && stopping && (e.err == nil || by == syscall.SIGTERM): // by it, if it did not listen yet
				return
			default:
				w.t.Fatalf("the %s ended by itself: %v", e.half.Role, e.err)
			}
			stopping = stopping && e.half != h
			w.start(ctx, e.half)
		case <-tick.C:
			if stopping {
				continue
			}
			w.cancel(ctx)
			if stopping = done(); !stopping {
				continue
			}
			if err := h.cmd.Process.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
				w.must(err)
			}
		case <-ctx.Done():
			w.t.Fatal("the round does not come to its end")
		}
	}
}

// cancel cancels the jobs whose time has come. The sidecar may stop over it,
// so it is asked until it says yes.
func (w *round) cancel(ctx context.Context) {
	for _, j := range w.jobs {
		if j.cancelAt == "" || w.cancelled[j.name] {
			continue
		}
		if _, err := os.Stat(w.path(j.cancelAt)); err != nil {
			continue
		}
		_, err := control.Client{Path: w.path("control")}.Cancel(ctx, j.job, "no longer wanted")
		w.cancelled[j.name] = err == nil || errors.Is(err, control.ErrEnded)
	}
}

// signalOf returns the signal that ended a process, or 0.
func signalOf(err error) syscall.Signal {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	status, ok := exit.Sys().(syscall.WaitStatus)
	if !ok || !status.Signaled() {
		return 0
	}
	return status.Signal()
}

// tell says all there is to know of a round that failed.
func (w *round) tell() {
	for _, h := range []*half{w.sidecar, w.runner} {
		_ = h.cmd.Process.Kill()
		<-h.ended
		trace, _ := os.ReadFile(w.path(h.Role + ".trace"))
		w.t.Logf("%s\n--- effects of its last life:\n%s", h.log.String(), trace)
	}
	out, _ := os.ReadFile(filepath.Join(w.runner.Pipe, "pipe_out"))
	w.t.Logf("pipe_out:\n%s", out)
	var names []string
	_ = filepath.WalkDir(w.dir, func(path string, _ fs.DirEntry, _ error) error {
		names = append(names, strings.TrimPrefix(path, w.dir))
		return nil
	})
	w.t.Logf("files: %s", strings.Join(names, "\n"))
}

// through reports that every job is in output/ and forgotten by the VM.
func (w *round) through() bool {
	for _, j := range w.jobs {
		if _, err := os.Stat(w.path("output", j.job, "latest", "result.json")); err != nil {
			return false
		}
	}
	for _, dir := range []string{"data/spool/jobs", "data/artifacts", "data/jobs", "data/spool/trash"} {
		if left, err := os.ReadDir(w.path(dir)); err != nil || len(left) > 0 {
			return false
		}
	}
	return true
}

// settled reports that the sidecar says of every job that nothing is left to do.
func (w *round) settled(ctx context.Context) bool {
	n := 0
	err := control.Client{Path: w.path("control")}.AllJobs(ctx, func(jobs []control.Job) error {
		for _, j := range jobs {
			if j.Settled {
				n++
			}
		}
		return nil
	})
	return err == nil && n == len(w.jobs)
}

// visible checks what a user finds in output/ at any moment: whole folders.
func (w *round) visible() {
	w.t.Helper()
	for _, j := range w.jobs {
		entries, err := os.ReadDir(w.path("output", j.job))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		w.must(err)
		for _, e := range entries {
			if e.IsDir() {
				w.whole(j, w.path("output", j.job, e.Name()))
			}
		}
	}
}

// whole checks a job's folder in output/.
func (w *round) whole(j dropped, folder string) {
	w.t.Helper()
	var r deliver.Result
	data, err := os.ReadFile(filepath.Join(folder, "result.json"))
	w.must(err)
	w.must(json.Unmarshal(data, &r))
	if string(r.Status) != j.status {
		w.t.Errorf("%s: status %s, want %s: %s", j.name, r.Status, j.status, r.Reason)
	}
	got := map[string]string{}
	for _, a := range r.Artifacts {
		data, err := os.ReadFile(filepath.Join(folder, a.Name))
		if err != nil {
			w.t.Errorf("%s: %v", j.name, err)
			continue
		}
		sum := sha256.Sum256(data)
		if hex.EncodeToString(sum[:]) != a.SHA256 {
			w.t.Errorf("%s: %s has another digest than result.json says", j.name, a.Name)
		}
		got[a.Name] = string(data)
	}
	if len(got) > 0 || len(j.artifacts) > 0 {
		if diff := cmp.Diff(j.artifacts, got); diff != "" {
			w.t.Errorf("%s: artifacts (-want +got):\n%s", j.name, diff)
		}
	}
	want := ""
	for n := 2; n <= r.Attempts; n++ { // the attempt before never ran
		want += fmt.Sprintf("[osbuilder: attempt %d begins, attempt %d did not end]\n", n, n-1)
	}
	want += j.log
	log, err := os.ReadFile(filepath.Join(folder, "build.log"))
	w.must(err)
	if diff := cmp.Diff(want, string(log)); diff != "" {
		w.t.Errorf("%s: build.log (-want +got):\n%s", j.name, diff)
	}
	w.same(j, filepath.Join(folder, "source"))
}

// same checks that a drop lies in a folder as it was dropped.
func (w *round) same(j dropped, folder string) {
	w.t.Helper()
	got := map[string]string{}
	w.must(filepath.WalkDir(filepath.Join(folder, j.name), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		name, _ := filepath.Rel(filepath.Join(folder, j.name), path)
		if name == "." {
			name = ""
		}
		got[name] = string(data)
		return err
	}))
	if diff := cmp.Diff(j.files, got); diff != "" {
		w.t.Errorf("%s in %s (-want +got):\n%s", j.name, folder, diff)
	}
}

// verify checks what came of the round, when both halves have ended.
func (w *round) verify() {
	w.t.Helper()
	w.visible()
	records := w.records()
	executed := w.executions()
	if len(records) != len(w.jobs) {
		w.t.Errorf("%d records of %d drops", len(records), len(w.jobs))
	}
	for _, j := range w.jobs {
		var found []job.Job
		for _, r := range records {
			if r.Drop == j.name {
				found = append(found, r)
			}
		}
		if len(found) != 1 {
			w.t.Errorf("%s: %d records, want 1", j.name, len(found))
			continue
		}
		r := found[0]
		if !r.Settled() || r.Output != filepath.Join(j.job, string(r.ID)) {
			w.t.Errorf("%s: record %+v", j.name, r)
		}
		ends := 0
		for _, step := range r.History {
			if step.State.Terminal() {
				ends++
			}
		}
		if ends != 1 {
			w.t.Errorf("%s: %d outcomes in its story: %+v", j.name, ends, r.History)
		}
		if entries := w.names("output", j.job); !slices.Equal(entries, []string{string(r.ID), "latest"}) {
			w.t.Errorf("%s: in output/ lie %q", j.name, entries)
		}
		if target, err := os.Readlink(w.path("output", j.job, "latest")); err != nil || target != string(r.ID) {
			w.t.Errorf("%s: latest leads to %q: %v", j.name, target, err)
		}
		for attempt := 1; attempt <= r.Attempt; attempt++ {
			n := executed[fmt.Sprintf("%s %d", r.ID, attempt)]
			if n > 1 || attempt == r.Attempt && n != 1 && !j.early {
				w.t.Errorf("%s: attempt %d of %d ran %d times", j.name, attempt, r.Attempt, n)
			}
			delete(executed, fmt.Sprintf("%s %d", r.ID, attempt))
		}
		if r.Attempt > 1 && w.runner.crashes == 0 {
			w.t.Errorf("%s: %d attempts, and the runner never stopped", j.name, r.Attempt)
		}
		w.same(j, w.path("jobs/.taken", string(r.ID)))
	}
	if len(executed) > 0 {
		w.t.Errorf("executions of nobody's attempts: %v", executed)
	}
	w.clean(records)
}

// clean checks that nothing lies about.
func (w *round) clean(records []job.Job) {
	w.t.Helper()
	ids := make([]string, len(records))
	for i, r := range records {
		ids[i] = string(r.ID)
	}
	slices.Sort(ids)
	if left := w.names("jobs"); !slices.Equal(left, []string{".taken"}) {
		w.t.Errorf("in the inbox lie %q", left)
	}
	for _, dir := range []string{"state/jobs", "jobs/.taken"} {
		if got := w.names(dir); !slices.Equal(got, ids) {
			w.t.Errorf("in %s lie %q, want %q", dir, got, ids)
		}
	}
	for _, r := range records {
		want := []string{"build.log", "source"}
		if r.Attempt == 0 { // it never came to a log
			want = want[1:]
		}
		if got := w.names("state/jobs", string(r.ID)); !slices.Equal(got, want) {
			w.t.Errorf("in state/jobs/%s lie %q, want %q", r.ID, got, want)
		}
	}
	if left := w.names("output/.partial"); len(left) > 0 {
		w.t.Errorf("in output/.partial lie %q", left)
	}
	for _, name := range w.names("pipe") {
		// A request that was not yet whole stays an hour, and an upload that was
		// made again, as its answer was on the way, a day.
		if name != "pipe_in" && name != "pipe_out" && !strings.HasPrefix(name, ".pipe_in.") && !strings.HasPrefix(name, "pipe_out.") &&
			!strings.HasPrefix(name, "inputs-") {
			w.t.Errorf("in the pipe's folder lies %s", name)
		}
	}
}

func (w *round) names(path ...string) []string {
	w.t.Helper()
	entries, err := os.ReadDir(w.path(path...))
	w.must(err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (w *round) records() []job.Job {
	w.t.Helper()
	s, err := store.Open(w.t.Context(), w.path("state/osbuilder.db"))
	w.must(err)
	defer func() { w.must(s.Close()) }()
	jobs, damaged, err := s.List(w.t.Context(), "", 1000)
	w.must(err)
	if len(damaged) > 0 {
		w.t.Errorf("damaged records: %+v", damaged)
	}
	return jobs
}

// executions counts what the jobs themselves say.
func (w *round) executions() map[string]int {
	w.t.Helper()
	data, err := os.ReadFile(w.path("executions"))
	w.must(err)
	n := map[string]int{}
	for line := range strings.Lines(string(data)) {
		n[strings.TrimSpace(line)]++
	}
	return n
}

// effects returns how many effects the last life of a half had.
func (w *round) effects(h *half) int64 {
	w.t.Helper()
	data, err := os.ReadFile(w.path(h.Role + ".trace"))
	w.must(err)
	return int64(bytes.Count(data, []byte("\n")))
}

// tooMany failures end a test: the others would say the same.
const tooMany = 5

// rounds calls try for each of a row of numbers, several at a time, until it
// returns false, too much failed, or it is past the time, unless that is zero.
func rounds(t *testing.T, until time.Time, try func(t *testing.T, n int64) bool) {
	var next, failed atomic.Int64
	var over atomic.Bool
	var all sync.WaitGroup
	for range atOnce {
		all.Go(func() {
			for !over.Load() && failed.Load() < tooMany && (until.IsZero() || time.Now().Before(until)) {
				n := next.Add(1)
				ok := t.Run(fmt.Sprint(n), func(t *testing.T) {
					if !try(t, n) {
						over.Store(true)
					}
				})
				if !ok {
					failed.Add(1)
				}
			}
		})
	}
	all.Wait()
}

// each stops one half before each effect, one after the other, until it came
// to its end several times without. It returns the number of the last effect.
func each(t *testing.T, role string, path func() []dropped) int64 {
	const enough = 3
	var mu sync.Mutex // guards what follows
	var last, count, unstopped int64
	rounds(t, time.Time{}, func(t *testing.T, n int64) bool {
		w := newRound(t, path(), plan(role, "sidecar", n), plan(role, "runner", n))
		w.run()
		mu.Lock()
		defer mu.Unlock()
		count++
		if w.sidecar.crashes+w.runner.crashes > 0 {
			last = max(last, n)
			return true
		}
		unstopped++
		return unstopped < enough
	})
	t.Logf("%d effects, %d rounds", last, count)
	return last
}

// plan stops the half of that role at n.
func plan(role, half string, n int64) []int64 {
	if role == half {
		return []int64{n}
	}
	return nil
}

// several plays rounds, of which plans says where each half stops, for at most
// that long.
func several(t *testing.T, path func() []dropped, plans [][2][]int64, limit time.Duration) {
	var count, stopped atomic.Int64
	rounds(t, time.Now().Add(limit), func(t *testing.T, n int64) bool {
		if n > int64(len(plans)) {
			return false
		}
		w := newRound(t, path(), plans[n-1][0], plans[n-1][1])
		w.run()
		count.Add(1)
		stopped.Add(int64(w.sidecar.crashes + w.runner.crashes))
		return true
	})
	t.Logf("%d rounds of %d, %d stops", count.Load(), len(plans), stopped.Load())
}

var seed = flag.Int64("seed", 0, "of the rounds of TestStopped that are chosen at random; 0: another one each time")

// At random a sixth of the points of the short path are tried, some of the long
// one, some pairs of a sidecar's and a runner's stop, and some rounds in which both
// stop several times. With the tag "long" it is every point and every pair.
func TestStopped(t *testing.T) {
	if *seed == 0 {
		*seed = time.Now().UnixNano()
	}
	t.Logf("seed %d", *seed)
	random := rand.New(rand.NewPCG(uint64(*seed), 0))
	count := func(path func() []dropped) (n [2]int64) {
		t.Run("count", func(t *testing.T) {
			w := newRound(t, path(), nil, nil)
			w.run()
			n = [2]int64{w.effects(w.sidecar), w.effects(w.runner)}
			t.Logf("the sidecar has %d effects, the runner %d", n[0], n[1])
		})
		return n
	}
	short, long := count(shortPath), count(longPath)
	for i, role := range []string{"sidecar", "runner"} {
		// points are some of a path's, in another order each time.
		points := func(path [2]int64, share int) (plans [][2][]int64) {
			for _, n := range random.Perm(int(path[i])) {
				plans = append(plans, [2][]int64{plan(role, "sidecar", int64(n)+1), plan(role, "runner", int64(n)+1)})
			}
			return plans[:len(plans)/share]
		}
		t.Run("short path/"+role, func(t *testing.T) {
			if everything {
				each(t, role, shortPath)
			} else {
				several(t, shortPath, points(short, 6), time.Hour)
			}
		})
		t.Run("long path/"+role, func(t *testing.T) {
			if everything {
				each(t, role, longPath)
			} else {
				several(t, longPath, points(long, 5), sampling)
			}
		})
	}
	t.Run("pairs", func(t *testing.T) {
		var plans [][2][]int64
		for _, n := range random.Perm(int(short[0] * short[1])) {
			plans = append(plans, [2][]int64{{int64(n)%short[0] + 1}, {int64(n)/short[0] + 1}})
		}
		several(t, shortPath, plans[:min(len(plans), pairs)], sampling)
	})
	t.Run("again", func(t *testing.T) {
		plans := make([][2][]int64, again)
		for n := range plans {
			for i, points := range short {
				for range 3 {
					plans[n][i] = append(plans[n][i], 1+random.Int64N(points))
				}
			}
		}
		several(t, shortPath, plans, sampling)
	})
}
