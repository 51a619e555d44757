//go:build soak

package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/logging"
	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// Both halves, as processes of their own with nothing but their defaults, run
// small jobs as fast as they can, for long: what they need must not grow.
//
//	MINUTES=60 make soak

var minutes = flag.Float64("minutes", 60, "how long the soak is")

// asSoaked makes the test's own binary one of the two halves.
const asSoaked = "be-soaked"

// A soaked process is told on the first line of standard input what to be. For
// each line that follows it says on descriptor 3 how much it holds.
type soaked struct {
	Role string // sidecar or runner
	Dir  string
	Pipe string
	Addr string
	Host string // the server's public key
	Key  []byte
}

// held is what a process holds, by its own account.
type held struct {
	Goroutines int
	Heap       uint64 // alive, in bytes
}

func init() {
	if len(os.Args) > 1 && os.Args[1] == asSoaked {
		os.Exit(beSoaked())
	}
}

func beSoaked() int {
	ctx, cancel := untilSignal(context.Background()) //nolint:forbidigo // this is a program of its own
	defer cancel()
	in := bufio.NewScanner(os.Stdin)
	var s soaked
	if !in.Scan() {
		return 1
	}
	if err := json.Unmarshal(in.Bytes(), &s); err != nil {
		return explain(os.Stderr, err)
	}
	go func() {
		out := json.NewEncoder(os.NewFile(3, "held"))
		for in.Scan() {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			if err := out.Encode(held{runtime.NumGoroutine(), m.HeapAlloc}); err != nil {
				return
			}
		}
	}()
	return explain(os.Stderr, s.run(ctx))
}

func (s soaked) path(name string) string { return filepath.Join(s.Dir, name) }

func (s soaked) run(ctx context.Context) error {
	if s.Role == "runner" {
		return runner.New(runner.Config{
			Pipe: s.Pipe, Data: s.path("data"), Units: runner.ProcessUnits{}, Store: s.path("no-store"), GCRoots: s.path("no-roots"),
			Image: "soak-1", Version: "soak", Boot: "boot", Log: io.Discard,
		}).Run(ctx)
	}
	return s.sidecar(ctx)
}

func (s soaked) sidecar(ctx context.Context) (err error) {
	signer, err := ssh.ParsePrivateKey(s.Key)
	if err != nil {
		return err
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey([]byte(s.Host))
	if err != nil {
		return err
	}
	cfg, err := config.Load() // the defaults
	if err != nil {
		return err
	}
	cfg.Paths = config.Paths{Jobs: s.path("jobs"), Output: s.path("output"), State: s.path("state"), Health: s.path("health"), Control: s.path("control")}
	log, output, err := logging.New(logging.Options{Format: cfg.LogFormat, Level: cfg.LogLevel}, os.Stdout)
	if err != nil {
		return err
	}
	written, stopWriting := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- output.Run(written) }()
	defer func() {
		stopWriting()
		err = errors.Join(err, <-ended)
	}()
	link := vm.Config{Name: "vm", Addr: s.Addr, User: "builder", Signer: signer, HostKeys: ssh.FixedHostKey(host), Dir: s.Pipe}
	return serve(ctx, cfg, []vm.Config{link}, log)
}

// A soakedProcess is one of the two, seen from the test.
type soakedProcess struct {
	name  string
	cmd   *exec.Cmd
	ask   io.Writer
	holds *json.Decoder
	said  bytes.Buffer
}

func startSoaked(t *testing.T, s soaked) *soakedProcess {
	t.Helper()
	p := &soakedProcess{name: s.Role}
	p.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), os.Args[0], asSoaked)
	p.cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin"}
	p.cmd.Stderr = &p.said
	p.cmd.Stdout = io.Discard // by a pipe, as a log driver reads it
	ask, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p.cmd.ExtraFiles = []*os.File{w}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.Close()
	p.ask, p.holds = ask, json.NewDecoder(r)
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		if err := p.cmd.Wait(); err != nil {
			t.Errorf("%s: %v\n%s", p.name, err, p.said.String())
		}
		r.Close()
	})
	if err := json.NewEncoder(ask).Encode(s); err != nil {
		t.Fatal(err)
	}
	return p
}

// A sample is what a process holds at one time: memory, in MiB, by the
// kernel's account and by its own.
type sample struct {
	rss, heap, goroutines, descriptors float64
}

func (p *soakedProcess) sample(t *testing.T) sample {
	t.Helper()
	var h held
	_, err := io.WriteString(p.ask, "\n")
	if err == nil {
		err = p.holds.Decode(&h)
	}
	if err != nil {
		t.Fatalf("%s ended: %v\n%s", p.name, err, p.said.String())
	}
	proc := filepath.Join("/proc", strconv.Itoa(p.cmd.Process.Pid))
	descriptors, err := os.ReadDir(filepath.Join(proc, "fd"))
	if err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(filepath.Join(proc, "status"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(status), "RssAnon:")
	kib, err := strconv.Atoi(strings.Fields(rest + " ?")[0])
	if err != nil {
		t.Fatalf("no RssAnon in %s", status)
	}
	return sample{rss: float64(kib) / 1024, heap: float64(h.Heap) / (1 << 20), goroutines: float64(h.Goroutines), descriptors: float64(len(descriptors))}
}

// A series is one figure over time, and by how much its last quarter may lie
// above its second. The first quarter is left to warm up.
type series struct {
	name   string
	slack  float64
	values []float64
}

// quarters returns the medians of the second and of the last quarter.
func (s series) quarters() (second, last float64) {
	n := len(s.values)
	return median(s.values[n/4 : n/2]), median(s.values[n-n/4:])
}

func (s series) grows() bool {
	second, last := s.quarters()
	return last > second+s.slack
}

func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[len(sorted)/2]
}

// What grows by 4 MiB between the second quarter and the last is found, and
// noise without a slope is none.
func TestSoakFindsGrowth(t *testing.T) {
	for name, at := range map[string]struct {
		value func(i int) float64
		grows bool
	}{
		"slope":          {func(i int) float64 { return 20 + 0.02*float64(i) }, true},
		"flat and noisy": {func(i int) float64 { return 20 + float64(i*7919%13) }, false},
		"warming up":     {func(i int) float64 { return min(20, float64(i)) }, false},
		"late step":      {func(i int) float64 { return 20 + 10*float64(i/600) }, true},
	} {
		s := series{name: name, slack: 4}
		for i := range 720 {
			s.values = append(s.values, at.value(i))
		}
		if s.grows() != at.grows {
			second, last := s.quarters()
			t.Errorf("%s: second quarter %g, last %g", name, second, last)
		}
	}
}

// soakJobs are what is dropped, over and over: mostly nothing.
var soakJobs = []struct {
	script string
	status string
}{
	{"true\n", "succeeded"},
	{"true\n", "succeeded"},
	{"true\n", "succeeded"},
	{"true\n", "succeeded"},
	{"echo building; echo image >\"$OUT/small.iso\"\n", "succeeded"},
	{"seq 1 20000; head -c 1000000 /dev/zero >\"$OUT/large.iso\"\n", "succeeded"},
	{"printf '{\"kind\":\"soak\"}' >\"$REPORT\"; head -c 300000 /dev/urandom\n", "succeeded"},
	{"echo no >&2; exit 3\n", "failed"},
}

// waitingDrops is how many are under way at any time.
const waitingDrops = 24

// sampleEvery is the time between two samples.
const sampleEvery = 5 * time.Second

func TestSoak(t *testing.T) {
	dir := t.TempDir()
	server := vmtest.New(t)
	at := soaked{
		Dir: dir, Pipe: server.Dir(), Addr: server.Addr(),
		Host: string(ssh.MarshalAuthorizedKey(server.HostKey())), Key: server.PrivateKey(),
	}
	for _, name := range []string{"jobs", "output", "state", "new"} {
		if err := os.Mkdir(at.path(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	at.Role = "runner"
	halves := []*soakedProcess{startSoaked(t, at)}
	at.Role = "sidecar"
	halves = append(halves, startSoaked(t, at))

	var watched []*series
	for _, p := range halves {
		for _, s := range []series{{"memory, MiB", 4, nil}, {"heap alive, MiB", 1, nil}, {"goroutines", 2, nil}, {"descriptors", 2, nil}} {
			watched = append(watched, &series{p.name + ": " + s.name, s.slack, nil})
		}
	}
	files := &soakFiles{dir: dir, pipe: server.Dir()}
	begun, done := time.Now(), 0
	d := drops{t: t, dir: dir, under: map[string]int{}}
	sampling, feeding := time.NewTicker(sampleEvery), time.NewTicker(10*time.Millisecond)
	defer sampling.Stop()
	defer feeding.Stop()
	end := time.After(time.Duration(*minutes * float64(time.Minute)))
	for soaking := true; soaking; {
		select {
		case <-feeding.C:
			d.feed()
			done += d.harvest()
		case <-sampling.C:
			for i, p := range halves {
				v := p.sample(t)
				for j, x := range []float64{v.rss, v.heap, v.goroutines, v.descriptors} {
					s := watched[4*i+j]
					s.values = append(s.values, x)
				}
			}
			files.look(t, done)
		case <-end:
			soaking = false
		}
	}
	elapsed := time.Since(begun)
	t.Logf("%s: %d jobs, %.0f a minute, %d samples", elapsed.Round(time.Second), done, float64(done)/elapsed.Minutes(), len(watched[0].values))
	if done == 0 || len(watched[0].values) < 48 { // four minutes
		t.Fatal("too short to tell anything")
	}
	for _, s := range watched {
		second, last := s.quarters()
		t.Logf("%-26s second quarter %7.1f, last %7.1f, most %7.1f", s.name, second, last, slices.Max(s.values))
		if s.grows() {
			t.Errorf("%s grows: %.1f, then %.1f; %g more are allowed", s.name, second, last, s.slack)
		}
	}
	files.report(t)
}

// drops puts jobs into the inbox and takes their outcomes away.
type drops struct {
	t     *testing.T
	dir   string
	next  int
	under map[string]int // name: which of soakJobs
	stale time.Time      // since when nothing came
}

func (d *drops) path(names ...string) string {
	return filepath.Join(append([]string{d.dir}, names...)...)
}

func (d *drops) feed() {
	for n := 0; len(d.under) < waitingDrops; n++ {
		name := "job" + strconv.Itoa(n)
		if _, busy := d.under[name]; busy {
			continue
		}
		kind := d.next % len(soakJobs)
		d.next++
		file := d.path("new", name+".sh")
		if err := os.WriteFile(file, []byte(soakJobs[kind].script), 0o644); err != nil {
			d.t.Fatal(err)
		}
		if err := os.Rename(file, d.path("jobs", name+".sh")); err != nil {
			d.t.Fatal(err)
		}
		d.under[name] = kind
	}
}

// harvest removes what came into output/, which would grow by design.
func (d *drops) harvest() (done int) {
	for name, kind := range d.under {
		id, err := os.Readlink(d.path("output", name, "latest"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			d.t.Fatal(err)
		}
		data, err := os.ReadFile(d.path("output", name, id, "result.json"))
		if err != nil {
			d.t.Fatal(err)
		}
		var result struct{ Status string }
		if err := json.Unmarshal(data, &result); err != nil || result.Status != soakJobs[kind].status {
			d.t.Fatalf("job %s %q: %s, %v", name, soakJobs[kind].script, data, err)
		}
		// The link last: with it gone the name is free.
		if err := errors.Join(os.RemoveAll(d.path("output", name, id)), os.Remove(d.path("output", name, "latest"))); err != nil {
			d.t.Fatal(err)
		}
		delete(d.under, name)
		done++
	}
	switch {
	case done > 0 || d.stale.IsZero():
		d.stale = time.Now()
	case time.Since(d.stale) > 2*time.Minute:
		d.t.Fatalf("for 2 minutes no job came to its end; under way: %v", d.under)
	}
	return done
}

// soakFiles are what could only grow on either disk.
type soakFiles struct {
	dir, pipe string
	jobs      []int // done at each look
	seen      map[string][]int64
}

// growing is what grows with the number of jobs, because users or the protocol
// want it. Everything else stays flat.
var growing = map[string]string{
	"jobs/.taken, entries": "the drops, which are the user's",
	"state/jobs, entries":  "sources and logs of all jobs on record",
	"osbuilder.db, bytes":  "the records",
	"spool/gone, entries":  "tombstones; 11,000 at most",
	"pipe_out, bytes":      "offsets stay true, blocks go",
}

func (f *soakFiles) look(t *testing.T, done int) {
	t.Helper()
	if f.seen == nil {
		f.seen = map[string][]int64{}
	}
	f.jobs = append(f.jobs, done)
	entries := func(name, path string) {
		list, err := os.ReadDir(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		f.seen[name] = append(f.seen[name], int64(len(list)))
	}
	size := func(name, path string) int64 {
		var st syscall.Stat_t
		if err := syscall.Stat(path, &st); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		f.seen[name] = append(f.seen[name], st.Size)
		return st.Blocks
	}
	entries("jobs, entries", filepath.Join(f.dir, "jobs"))
	entries("jobs/.taken, entries", filepath.Join(f.dir, "jobs", ".taken"))
	entries("state, entries", filepath.Join(f.dir, "state"))
	entries("state/jobs, entries", filepath.Join(f.dir, "state", "jobs"))
	entries("output/.partial, entries", filepath.Join(f.dir, "output", ".partial"))
	for _, name := range []string{"gone", "jobs", "trash", "inputs", "aside", "damaged"} {
		entries("spool/"+name+", entries", filepath.Join(f.dir, "data", "spool", name))
	}
	entries("data/jobs, entries", filepath.Join(f.dir, "data", "jobs"))
	entries("data/artifacts, entries", filepath.Join(f.dir, "data", "artifacts"))
	entries("pipe, entries", f.pipe)
	size("osbuilder.db, bytes", filepath.Join(f.dir, "state", "osbuilder.db"))
	size("osbuilder.db-wal, bytes", filepath.Join(f.dir, "state", "osbuilder.db-wal"))
	f.seen[blocks] = append(f.seen[blocks], size("pipe_out, bytes", filepath.Join(f.pipe, "pipe_out")))
}

// maxBlocks of pipe_out: what the sidecar lets come together before it says
// that it has it, twice, and what the runner allocates ahead.
const maxBlocks = 36 << 20 / 512

func (f *soakFiles) report(t *testing.T) {
	t.Helper()
	n := len(f.jobs)
	jobs := f.jobs[n-1] - f.jobs[n/4]
	for _, name := range slices.Sorted(maps.Keys(f.seen)) {
		s := series{name: name, slack: waitingDrops}
		switch {
		case strings.HasSuffix(name, "bytes"):
			s.slack = 1 << 20
		case name == blocks:
			s.slack = maxBlocks
		}
		for _, v := range f.seen[name] {
			s.values = append(s.values, float64(v))
		}
		first, last := s.values[n/4], s.values[n-1]
		t.Logf("%-26s %12.0f after the first quarter, %12.0f at the end, most %12.0f; %9.1f for 1000 jobs  %s",
			name, first, last, slices.Max(s.values), 1000*(last-first)/float64(max(1, jobs)), growing[name])
		if growing[name] == "" && s.grows() {
			t.Errorf("%s grows", name)
		}
	}
	if most := slices.Max(f.seen[blocks]); most > maxBlocks {
		t.Errorf("pipe_out took %d blocks of the disk, at most %d are expected", most, maxBlocks)
	}
}

// blocks are what pipe_out takes of the disk.
const blocks = "pipe_out, 512 B blocks"
