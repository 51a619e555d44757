package runner

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

func TestFinishedOfResult(t *testing.T) {
	code := func(n int) *int { return &n }
	ran := marker{Uptime: int64(time.Second)}
	for name, tc := range map[string]struct {
		result Result
		want   pipe.Finished
	}{
		"exit 0":  {Result{"success", "exited", "0", 4096, int64(3 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusSucceeded, ExitCode: code(0), Duration: 2000, Memory: 4096, Scope: "unit"}},
		"exit 3":  {Result{"exit-code", "exited", "3", 0, int64(3 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusFailed, ExitCode: code(3), Duration: 2000}},
		"signal":  {Result{"signal", "killed", "SEGV", 0, int64(3 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusFailed, Signal: "SIGSEGV", Duration: 2000}},
		"dumped":  {Result{"core-dump", "dumped", "ABRT", 0, int64(3 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusFailed, Signal: "SIGABRT", Duration: 2000}},
		"timeout": {Result{"timeout", "killed", "TERM", 0, int64(11 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusTimeout, Reason: "it ran longer than 10s", Duration: 10000}},
		// It ended by itself; what it left behind had to be killed.
		"leftovers":             {Result{"timeout", "exited", "0", 0, int64(5 * time.Second), false, false}, pipe.Finished{Status: pipe.StatusSucceeded, ExitCode: code(0), Duration: 4000}},
		"shut down":             {Result{"success", "killed", "TERM", 0, int64(3 * time.Second), true, false}, pipe.Finished{Status: pipe.StatusInterrupted, Reason: "the VM was shut down while it ran", Duration: 2000}},
		"shut down, trapped":    {Result{"exit-code", "exited", "2", 0, int64(3 * time.Second), true, false}, pipe.Finished{Status: pipe.StatusInterrupted, Reason: "the VM was shut down while it ran", Duration: 2000}},
		"shut down, unaffected": {Result{"success", "exited", "0", 0, int64(3 * time.Second), true, false}, pipe.Finished{Status: pipe.StatusSucceeded, ExitCode: code(0), Duration: 2000}},
		"odd":                   {Result{"resources", "", "", 0, 0, false, false}, pipe.Finished{Status: pipe.StatusFailed, Reason: "it ended with resources ( )"}},
	} {
		if d := cmp.Diff(tc.want, tc.result.finished(ran, 10*time.Second)); d != "" {
			t.Errorf("%s (-want +got):\n%s", name, d)
		}
	}
	for limit, want := range map[int64]string{
		1 << 30: "at its limit of 1024 MiB; give the VM more RAM_SIZE",
		2 << 30: "when it held 1000 MiB, because the VM had no more; give the VM more RAM_SIZE",
		0:       "when it held 1000 MiB, because the VM had no more",
	} {
		oom := Result{"oom-kill", "killed", "KILL", 1000 << 20, 0, false, false}.finished(marker{Memory: limit}, 0)
		if oom.Status != pipe.StatusFailed || !strings.HasPrefix(oom.Reason, "out of memory: it was killed") || !strings.Contains(oom.Reason, want) {
			t.Errorf("oom: %+v", oom)
		}
	}
}

func TestWriteResult(t *testing.T) {
	path := filepath.Join(t.TempDir(), "result")
	env := map[string]string{"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": "7"}
	if err := WriteResult(path, func(name string) string { return env[name] }, func() bool { return true }); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	r, err := parseResult(data)
	if err != nil || r.ServiceResult != "exit-code" || r.ExitStatus != "7" || r.Uptime <= 0 || !r.Stopping {
		t.Errorf("result %+v, %v", r, err)
	}
	if err := WriteResult(path, func(string) string { return "" }, func() bool { return false }); err == nil {
		t.Error("a result without an environment")
	}
}

func TestMemoryPeak(t *testing.T) {
	dir := t.TempDir()
	for path, content := range map[string]string{
		"self": "1:name=systemd:/other\n0::/jobs.slice/job-x.service\n",
		"v1":   "1:name=systemd:/other\n",
		"root/jobs.slice/job-x.service/memory.peak": "123456\n",
	} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := memoryPeak(filepath.Join(dir, "self"), filepath.Join(dir, "root")); err != nil || n != 123456 {
		t.Errorf("peak %d, %v", n, err)
	}
	if _, err := memoryPeak(filepath.Join(dir, "v1"), filepath.Join(dir, "root")); err == nil {
		t.Error("a peak without a unified group")
	}
}

func TestStatuses(t *testing.T) {
	for name, tc := range map[string]struct {
		script  string
		timeout int64
		status  pipe.Status
		code    int
		signal  string
	}{
		"exit":    {"exit 42\n", 0, pipe.StatusFailed, 42, ""},
		"signal":  {"kill -SEGV $$\n", 0, pipe.StatusFailed, 0, "SIGSEGV"},
		"timeout": {"sleep 1000\n", 1, pipe.StatusTimeout, 0, ""},
		"syntax":  {"if\n", 0, pipe.StatusFailed, 2, ""},
		"orphan":  {"sleep 1000 &\n", 0, pipe.StatusSucceeded, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			h := jobHeader("j", 1)
			h.Timeout = tc.timeout
			accepted(t, m.send(1, h, tc.script))
			f := m.finished("j")
			if f.Status != tc.status || f.Signal != tc.signal || tc.code != 0 && (f.ExitCode == nil || *f.ExitCode != tc.code) {
				t.Errorf("finished: %+v", f)
			}
			if f.Duration < tc.timeout*1000 {
				t.Errorf("took %d ms", f.Duration)
			}
		})
	}
}

func TestKillAll(t *testing.T) {
	m := boot(t)
	m.submit("j", "trap '' TERM; sleep 1000 & sleep 1000\n")
	m.await("start", 1, ofType(pipe.TypeStarted))
	m.stop()
	if err := (ProcessUnits{}).KillAll(t.Context(), m.cfg.Data); err != nil {
		t.Fatal(err)
	}
	m.start()
	if f := m.finished("j"); f.Status != pipe.StatusInterrupted {
		t.Errorf("finished: %+v", f)
	}
}

func TestEnvironment(t *testing.T) {
	m := boot(t)
	h := jobHeader("j", 3)
	h.Name = "a\tname\n"
	accepted(t, m.send(1, h, `echo "$JOB_ID|$JOB_NAME|$JOB_ATTEMPT|$NIX_REMOTE"
for d in "$OUT" "$TMPDIR" "$HOME" "$PWD"; do [[ $d == */data/jobs/j-3/* && -w $d ]] || echo "$d"; done
read -r line && echo "$line"
`))
	m.finished("j")
	if got := m.output("j"); got != "j|a name |3|daemon\n" {
		t.Errorf("output %q", got)
	}
}

// As many at once as there are slots, the rest in the order they came.
func TestSlots(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 2
	m.start()
	wait, open := m.gate("g")
	for _, id := range []string{"a", "b", "c", "d", "e"} {
		m.submit(id, wait)
	}
	m.await("two to start", 2, ofType(pipe.TypeStarted))
	m.settle("meanwhile")
	if n := len(find(m.events(), ofType(pipe.TypeStarted))); n != 2 {
		t.Errorf("%d run at once", n)
	}
	open()
	m.await("all to finish", 5, ofType(pipe.TypeFinished))
	var order string
	running := map[int]bool{}
	slot := map[string]int{}
	for _, e := range m.events() {
		switch e.Type { //nolint:exhaustive // these two say who runs
		case pipe.TypeStarted:
			order += e.Job
			if running[e.Started.Slot] || e.Started.Slot < 1 || e.Started.Slot > 2 {
				t.Errorf("%s in slot %d, which is busy or none", e.Job, e.Started.Slot)
			}
			running[e.Started.Slot], slot[e.Job] = true, e.Started.Slot
		case pipe.TypeFinished:
			running[slot[e.Job]] = false
		}
	}
	for _, first := range []string{"a", "b"} {
		if !strings.Contains(order[:2], first) {
			t.Errorf("started in the order %s", order)
		}
	}
}

func TestSystemdArguments(t *testing.T) {
	args := SystemdUnits{Hook: "/usr/lib/osbuilder/pipe-runner"}.arguments(Spec{
		Unit: "job-x-1", User: "job-1", Script: "/data/jobs/x-1/script", Dir: "/data/jobs/x-1", Work: "/data/jobs/x-1/work",
		Temp: "/data/jobs/x-1/tmp", Hidden: []string{"/nexus_bootstrap"}, Log: "/data/spool/jobs/x-1/log",
		Result: "/data/spool/jobs/x-1/result", Timeout: 90 * time.Second, Grace: DefaultGrace, Memory: 1 << 30, Env: []string{"A=b c"},
	})
	all := strings.Join(args, "\n") + "\n"
	for _, want := range []string{
		"--unit=job-x-1.service", "--property=IgnoreSIGPIPE=no", "--property=User=job-1", "--property=RuntimeMaxSec=90000ms",
		"--property=StandardOutput=append:/data/spool/jobs/x-1/log", "--property=CapabilityBoundingSet=",
		"--property=ExecStopPost=+/usr/lib/osbuilder/pipe-runner result --file /data/spool/jobs/x-1/result",
		"--property=InaccessiblePaths=-/sys/firmware -/run/osbuilder/ssh_host_ed25519_key -/run/osbuilder/authorized_keys -/nexus_bootstrap",
		"--setenv=A=b c", "--property=OOMPolicy=kill", "--property=TimeoutStopSec=40000ms",
		"--property=MemoryMax=1073741824", "--property=MemorySwapMax=0",
	} {
		if !strings.Contains(all, want+"\n") {
			t.Errorf("%q is missing in:\n%s", want, all)
		}
	}
	if !strings.HasSuffix(all, "--\n"+shell()+"\n/data/jobs/x-1/script\n") {
		t.Errorf("ends with %q", args[len(args)-3:])
	}
}

// What systemd 257 shows of units, as it was recorded, and what is made of it.
func TestRemembered(t *testing.T) {
	for name, tc := range map[string]struct {
		shown string
		want  Result
		ok    bool
	}{
		"hook failed": {
			"Result=exit-code\nExecMainExitTimestampMonotonic=99000000\nExecMainCode=1\nExecMainStatus=0\nActiveState=failed\nMemoryPeak=4096\n",
			Result{ServiceResult: "exit-code", ExitCode: "exited", ExitStatus: "0", MemoryPeak: 4096, Uptime: 99e9},
			true,
		},
		"hook killed after a failure": {
			"Result=exit-code\nExecMainExitTimestampMonotonic=5\nExecMainCode=1\nExecMainStatus=7\nActiveState=failed\nMemoryPeak=[not set]\n",
			Result{ServiceResult: "exit-code", ExitCode: "exited", ExitStatus: "7", Uptime: 5000},
			true,
		},
		"time limit": {
			"Result=timeout\nExecMainExitTimestampMonotonic=99000000\nExecMainCode=2\nExecMainStatus=15\nActiveState=failed\n",
			Result{ServiceResult: "timeout", ExitCode: "killed", ExitStatus: "TERM", Uptime: 99e9},
			true,
		},
		"gone":      {"Result=success\nExecMainExitTimestampMonotonic=0\nExecMainCode=0\nExecMainStatus=0\nActiveState=inactive\n", Result{}, false},
		"never ran": {"Result=resources\nExecMainExitTimestampMonotonic=0\nExecMainCode=0\nExecMainStatus=0\nActiveState=failed\n", Result{}, false},
		"nothing":   {"", Result{}, false},
	} {
		got, ok, err := parseRemembered(tc.shown)
		if err != nil || ok != tc.ok || got != tc.want {
			t.Errorf("%s: %+v, %v, %v; want %+v", name, got, ok, err, tc.want)
		}
	}
	ran := marker{Uptime: 9e9}
	for name, tc := range map[string]struct {
		r    Result
		want pipe.Status
	}{
		"succeeded, though its hook ran out of time": {Result{ServiceResult: "timeout", ExitCode: "exited", ExitStatus: "0", Uptime: 20e9}, pipe.StatusSucceeded},
		"ran into its limit":                         {Result{ServiceResult: "timeout", ExitCode: "killed", ExitStatus: "TERM", Uptime: 99e9}, pipe.StatusTimeout},
	} {
		if got := tc.r.finished(ran, time.Minute).Status; got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}

// A unit whose stop hook left no result has run all the same.
func TestResultFromMemory(t *testing.T) {
	m := newMachine(t)
	forgotten := new(atomic.Bool)
	m.cfg.Units = forgetful{forgotten: forgotten}
	// The disk stays full for a while: what systemd remembers must last until the outcome does.
	var fails atomic.Int32
	m.cfg.fault = func(_, path string) error {
		if strings.HasPrefix(filepath.Base(path), "outcome") && fails.Add(1) <= 2 {
			return unix.ENOSPC
		}
		return nil
	}
	m.start()
	accepted(t, m.send(1, jobHeader("a", 1), "echo said; echo made > $OUT/made\n"))
	f := m.finished("a")
	if f.Status != pipe.StatusSucceeded || f.Artifacts != 1 || f.LogLength != 5 {
		t.Errorf("finished %+v", f)
	}
	m.until("forgotten unit", forgotten.Load)
	if fails.Load() < 3 {
		t.Error("the disk was not full")
	}
}

// A job that fails so says why it may have, since its own words may be lost.
func TestFailureFromMemory(t *testing.T) {
	m := newMachine(t)
	m.cfg.Units = forgetful{forgotten: new(atomic.Bool), exit: 1}
	m.start()
	accepted(t, m.send(1, jobHeader("a", 1), "exit 1\n"))
	f := m.finished("a")
	if f.Status != pipe.StatusFailed || f.ExitCode == nil || *f.ExitCode != 1 || !strings.Contains(f.Reason, "no space left on the VM's data disk") {
		t.Errorf("finished %+v", f)
	}
}

// The same where the hook did find room, and the job had none. One that
// reports why it failed is believed.
func TestFailureOnFullDisk(t *testing.T) {
	const fill = "cat /dev/zero >fill 2>&1; truncate -s -512K fill; "
	const noRoom = "it may have failed because there was no space left on the VM's data disk as it ended; the end of its output may be missing"
	for script, want := range map[string]string{
		"exit 1":                          "",
		fill + "exit 1":                   noRoom,
		fill + "kill -KILL $$":            noRoom,
		fill + "rm fill; exit 1":          "",
		fill + "exit 0":                   "",
		fill + "echo {} >$REPORT; exit 1": "",
	} {
		t.Run(script, func(t *testing.T) {
			m := newMachine(t)
			m.smallDisk()
			m.start()
			m.submit("a", script+"\n")
			if f := m.finished("a"); f.Reason != want {
				t.Errorf("%s: reason %q, want %q", f.Status, f.Reason, want)
			}
		})
	}
}

// forgetful are units whose hook finds its disk full, of a systemd that
// remembers them.
type forgetful struct {
	ProcessUnits
	forgotten *atomic.Bool
	exit      int
}

func (u forgetful) Start(ctx context.Context, spec Spec) error {
	if err := os.Mkdir(spec.Result+tempSuffix, 0o700); err != nil {
		return err
	}
	return u.ProcessUnits.Start(ctx, spec)
}

func (u forgetful) Remembered(context.Context, Spec) (Result, bool, error) {
	if u.forgotten.Load() {
		return Result{}, false, nil
	}
	return Result{ServiceResult: "exit-code", ExitCode: "exited", ExitStatus: strconv.Itoa(u.exit), Uptime: 1}, true, nil
}

func (u forgetful) Forget(context.Context, Spec) error {
	u.forgotten.Store(true)
	return nil
}

// A systemd that answers neither to the start nor to the question after it
// may start the unit all the same: the job is no other's to run, and its slot
// is nobody else's, until it is known.
func TestUnknownStart(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 1
	m.cfg.Units = &tardy{silent: 3}
	m.start()
	m.submit("a", "echo ran\n")
	m.submit("b", "echo b\n")
	if f := m.finished("a"); f.Status != pipe.StatusSucceeded || m.output("a") != "ran\n" {
		t.Errorf("finished %+v, output %q", f, m.output("a"))
	}
	m.finished("b")
	var order []string
	for _, e := range m.events() {
		if e.Type == pipe.TypeStarted || e.Type == pipe.TypeFinished {
			order = append(order, string(e.Type)+" "+e.Job)
		}
	}
	if d := cmp.Diff([]string{"started a", "finished a", "started b", "finished b"}, order); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// tardy are units of a systemd that is too busy to answer at first, and starts
// the first of them when it comes to it.
type tardy struct {
	ProcessUnits

	mu     sync.Mutex // guards what follows
	silent int        // questions that get no answer
	late   *Spec      // to be started
	begun  bool
}

func (u *tardy) Start(ctx context.Context, spec Spec) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if !u.begun {
		u.begun, u.late = true, &spec
		return errors.New("systemd-run: timed out")
	}
	return u.ProcessUnits.Start(ctx, spec)
}

func (u *tardy) Alive(ctx context.Context, spec Spec) (bool, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.silent--; u.silent >= 0 {
		return false, errors.New("systemctl: timed out")
	}
	if late := u.late; late != nil {
		u.late = nil
		if err := u.ProcessUnits.Start(ctx, *late); err != nil {
			return false, err
		}
	}
	return u.ProcessUnits.Alive(ctx, spec)
}

func TestOverdue(t *testing.T) {
	for shown, want := range map[string]bool{
		"SubState=stop-sigterm\nStateChangeTimestampMonotonic=50000000\n": true,
		"StateChangeTimestampMonotonic=50000000\nSubState=stop-sigterm\n": true,
		"SubState=stop-sigterm\nStateChangeTimestampMonotonic=50000001\n": false, // the grace is not over
		"SubState=running\nStateChangeTimestampMonotonic=1\n":             false,
		"SubState=stop-post\nStateChangeTimestampMonotonic=1\n":           false, // its hook
		"SubState=stop-sigkill\nStateChangeTimestampMonotonic=1\n":        false,
		"SubState=dead\nStateChangeTimestampMonotonic=0\n":                false,
		"SubState=stop-sigterm\nStateChangeTimestampMonotonic=\n":         false,
		"": false,
	} {
		if got := overdue(shown, 60*time.Second, 10*time.Second); got != want {
			t.Errorf("%q: %v", shown, got)
		}
	}
}

func FuzzParseResult(f *testing.F) {
	f.Add([]byte(`{"service_result":"success","exit_code":"exited","exit_status":"0","memory_peak":1,"uptime_ns":2}`))
	f.Add([]byte(`{"service_result":"signal","exit_code":"killed","exit_status":"KILL"}`))
	f.Add([]byte(`{"service_result":"timeout","exit_status":"99999999999999999999","uptime_ns":-1}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseResult(data)
		if err != nil {
			return
		}
		fin := r.finished(marker{Uptime: 1}, time.Second)
		if fin.Status == pipe.StatusSucceeded && (fin.ExitCode == nil || *fin.ExitCode != 0) {
			t.Errorf("%s is a success", data)
		}
		if fin.Duration < 0 || fin.Memory < 0 {
			t.Errorf("%s: %+v", data, fin)
		}
	})
}

func FuzzRecords(f *testing.F) {
	f.Add([]byte(`{"order":1,"job":"a","attempt":1,"sha256":"x","accepted":"2026-01-02T03:04:05Z"}`), []byte("12"), []byte(`{"boot":"b","slot":1,"uptime_ns":5}`), []byte(`{"started":true,"finished":{"status":"succeeded"}}`))
	f.Add([]byte(`{`), []byte(""), []byte(""), []byte("null"))
	f.Add([]byte(`{"order":-1,"job":"../x","attempt":0}`), []byte("-5"), []byte(`[]`), []byte(`{"finished":{"log_length":-1}}`))
	f.Fuzz(func(t *testing.T, rec, base, ran, outcome []byte) {
		cfg := Config{Data: t.TempDir()}
		s := &spool{cfg: cfg}
		p := cfg.paths(pipe.JobRef{Job: "a", Attempt: 1})
		if err := os.MkdirAll(p.spool, 0o700); err != nil {
			t.Fatal(err)
		}
		for path, data := range map[string][]byte{p.record(): rec, p.base(): base, p.ran(): ran, p.outcome(): outcome} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		j, err := s.loadJob("a-1")
		if err != nil {
			return
		}
		if j.Job != "a" || j.Attempt != 1 || j.base < 0 || j.ran == nil || j.outcome == nil {
			t.Errorf("loaded %+v", j)
		}
		if _, err := json.Marshal(j.record); err != nil {
			t.Error(err)
		}
	})
}

func FuzzFolder(f *testing.F) {
	for _, s := range []string{"a-1", "a-b-12", "-1", "a-01", "a-0", "a", "../x-1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if ref, ok := parseFolder(name); ok && (folder(ref) != name || strings.ContainsAny(name, "/.")) {
			t.Errorf("%q is %+v", name, ref)
		}
	})
}
