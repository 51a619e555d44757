package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"osbuilder/daemon/internal/control"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
	"osbuilder/daemon/internal/vmtest"
)

// osbuilder runs a command about jobs, as a person does.
func (s *sidecar) osbuilder(args ...string) (stdout, stderr string, code int) {
	var out, errs bytes.Buffer
	code = start(append(args, "--control", s.cfg.Paths.Control), &out, &errs)
	return out.String(), errs.String(), code
}

// must runs one that works.
func (s *sidecar) must(args ...string) string {
	s.t.Helper()
	out, errs, code := s.osbuilder(args...)
	if code != 0 || errs != "" {
		s.t.Fatalf("osbuilder %s: exit code %d: %s%s", strings.Join(args, " "), code, out, errs)
	}
	return out
}

func (s *sidecar) show(ref string) (j control.Job) {
	s.t.Helper()
	if err := json.Unmarshal([]byte(s.must("show", ref, "--json")), &j); err != nil {
		s.t.Fatal(err)
	}
	return j
}

// is waits until a job is in that state.
func (s *sidecar) is(ref string, state job.State) (j control.Job) {
	s.t.Helper()
	s.until("job "+ref+" that is "+string(state), func() bool {
		out, _, code := s.osbuilder("show", ref, "--json")
		return code == 0 && json.Unmarshal([]byte(out), &j) == nil && j.State == state
	})
	return j
}

// gate makes a script that says "up" and waits, and what opens it.
func gate(t *testing.T) (script string, open func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "gate")
	return "echo up\nuntil [ -e '" + path + "' ]; do sleep 0.05; done\n", func() {
		if err := os.WriteFile(path, nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestCommandsWithoutADaemon(t *testing.T) {
	s := &sidecar{t: t}
	s.cfg.Paths.Control = filepath.Join(t.TempDir(), "none.sock")
	for _, args := range [][]string{{"jobs"}, {"jobs", "--all"}, {"show", "x"}, {"cancel", "x"}, {"retry", "x"}, {"priority", "x", "-1"}} {
		out, errs, code := s.osbuilder(args...)
		if code != exitFailed || out != "" || !strings.Contains(errs, "hint: The daemon does not run here") || strings.Count(errs, "\n") != 2 {
			t.Errorf("%v: exit code %d, %q, %q", args, code, out, errs)
		}
	}
	for _, args := range [][]string{{"show"}, {"cancel", "a", "b"}, {"priority", "x"}, {"priority", "x", "high"}, {"jobs", "x"}, {"jobs", "--fly"}} {
		if out, errs, code := s.osbuilder(args...); code != exitUsage || out != "" || !strings.Contains(errs, "osbuilder --help") {
			t.Errorf("%v: exit code %d, %q, %q", args, code, out, errs)
		}
	}
}

// A job from its drop to its end, as the commands tell it.
func TestCommands(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.until("socket", func() bool {
		_, _, code := s.osbuilder("jobs")
		return code == 0
	})
	if out := s.must("jobs"); !strings.HasPrefix(out, "no job waits or runs") {
		t.Errorf("no job: %q", out)
	}
	if out := s.must("jobs", "--json"); strings.TrimSpace(out) != "[]" {
		t.Errorf("no job, for programs: %q", out)
	}
	script, open := gate(t)
	s.drop("gate.sh", script)
	s.is("gate", job.Running)
	out := s.must("jobs")
	if lines := strings.Split(out, "\n"); len(lines) != 3 || !strings.HasPrefix(lines[0], "ID ") || !strings.Contains(lines[1], " gate ") || !strings.HasSuffix(lines[1], "on vm") {
		t.Errorf("jobs: %q", out)
	}
	if _, errs, code := s.osbuilder("retry", "gate"); code != exitFailed || !strings.Contains(errs, "is running") || !strings.Contains(errs, "hint: ") {
		t.Errorf("retry: exit code %d, %q", code, errs)
	}
	open()
	j := s.is("gate.sh", job.Done)
	if j.Status != "succeeded" || j.Attempt != 1 || j.Output != "gate/"+string(j.ID) {
		t.Errorf("%+v", j)
	}
	text := s.must("show", string(j.ID))
	for _, want := range []string{"outcome  succeeded after ", "output   output/gate/", "  queued      created ", "  sending     claimed ", "on vm\n", "  done        published-done "} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if out := s.must("jobs", "--all"); !strings.Contains(out, "  gate  done ") {
		t.Errorf("all jobs: %q", out)
	}
	if _, errs, code := s.osbuilder("cancel", "gate"); code != exitFailed || !strings.Contains(errs, "already ended") {
		t.Errorf("cancel: exit code %d, %q", code, errs)
	}
	if _, errs, code := s.osbuilder("show", "none"); code != exitFailed || !strings.Contains(errs, "no such job") {
		t.Errorf("show: exit code %d, %q", code, errs)
	}

	// Again, as a job of its own.
	if out := s.must("retry", "gate"); !strings.Contains(out, "does again what "+string(j.ID)) {
		t.Errorf("retry: %q", out)
	}
	s.until("second outcome", func() bool { return s.show("gate").State == job.Done })
	again := s.show("gate")
	if again.ID == j.ID || again.RetryOf != j.ID || again.Status != "succeeded" {
		t.Errorf("%+v", again)
	}
	if source, err := os.ReadFile(filepath.Join(s.cfg.Paths.Output, again.Output, "source", "gate.sh")); err != nil || string(source) != script {
		t.Errorf("its source: %q, %v", source, err)
	}
}

// Of what waits the highest priority is next, and a cancelled one never.
func TestPrioritiesAndCancelOfWhatWaits(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	script, open := gate(t)
	s.drop("first.sh", script)
	s.is("first", job.Running)
	s.drop("second.sh", script) // the VM has two slots
	s.is("second", job.Running)
	for _, name := range []string{"a", "b", "c", "d"} {
		s.drop(name+".sh", "true\n")
		if j := s.is(name, job.Queued); j.Why == "" {
			t.Errorf("%s waits, and nobody says why", name)
		}
	}
	s.must("priority", "c", "7")
	s.must("priority", "a", "-7", "--json")
	if out := s.must("cancel", "b", "--reason", "not wanted"); !strings.Contains(out, "is cancelled") {
		t.Errorf("cancel: %q", out)
	}
	status, _, folder := s.outcome("b")
	if r := result(t, folder); status != "cancelled" || r.Reason != "not wanted" || r.Attempts != 0 {
		t.Errorf("status %s, result %+v", status, r)
	}
	if j := s.is("b", job.Cancelled); j.CancelAsked.IsZero() {
		t.Errorf("%+v", j)
	}
	open()
	claimed := map[string]string{}
	for _, name := range []string{"c", "d", "a"} {
		s.outcome(name)
		for _, step := range s.is(name, job.Done).History {
			if step.Event == job.Claimed {
				claimed[name] = step.Time.Format("15:04:05.000000000")
			}
		}
	}
	if claimed["c"] >= claimed["d"] || claimed["d"] >= claimed["a"] {
		t.Errorf("claimed at %v", claimed)
	}
}

// A source that is gone can't be done again.
func TestRetryWithoutASource(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.drop("a.sh", "exit 3\n")
	s.outcome("a")
	j := s.is("a", job.Failed)
	if err := os.RemoveAll(filepath.Join(s.cfg.Paths.State, "jobs", string(j.ID), "source")); err != nil {
		t.Fatal(err)
	}
	if _, errs, code := s.osbuilder("retry", "a"); code != exitFailed || !strings.Contains(errs, "hint: Drop it again.") {
		t.Errorf("exit code %d, %q", code, errs)
	}
	if left, err := filepath.Glob(filepath.Join(s.cfg.Paths.State, "jobs", "*")); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// living reports whether a process of that number does anything yet.
func living(t *testing.T, pid string) bool {
	t.Helper()
	stat, err := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(pid), "stat"))
	if err != nil {
		return false
	}
	_, after, _ := strings.Cut(string(stat), ") ")
	return !strings.HasPrefix(after, "Z")
}

// endless is a script that never ends by itself, with a process in its
// background, and where it writes the numbers of both.
func endless(t *testing.T) (script, pids string) {
	pids = filepath.Join(t.TempDir(), "pids")
	return "sleep 600 &\necho \"$$ $!\" >'" + pids + ".part'\nmv '" + pids + ".part' '" + pids + "'\necho up\nwait\n", pids
}

// wantCancelled waits for the end of a job that was cancelled, and of its
// processes.
func (s *sidecar) wantCancelled(name, pids string) {
	s.t.Helper()
	status, log, folder := s.outcome(name)
	if r := result(s.t, folder); status != "cancelled" || r.Reason != "not wanted" || r.Attempts != 1 || log != "up\n" {
		s.t.Errorf("status %s, result %+v, log %q", status, r, log)
	}
	if j := s.is(name, job.Cancelled); j.Attempt != 1 || j.CancelAsked.IsZero() {
		s.t.Errorf("%+v", j)
	}
	numbers, err := os.ReadFile(pids)
	if err != nil {
		s.t.Fatal(err)
	}
	for pid := range strings.FieldsSeq(string(numbers)) {
		s.until("end of process "+pid, func() bool { return !living(s.t, pid) })
	}
	s.until("VM that has forgotten the job", func() bool {
		left, err := os.ReadDir(filepath.Join(s.run.Data(), "spool", "jobs"))
		return err == nil && len(left) == 0
	})
}

func (s *sidecar) runEndless(name string) (pids string) {
	s.t.Helper()
	script, pids := endless(s.t)
	s.drop(name+".sh", script)
	s.until("running job "+name, func() bool {
		_, err := os.Stat(pids)
		return err == nil
	})
	s.is(name, job.Running)
	return pids
}

func TestCancelOfWhatRuns(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	pids := s.runEndless("endless")
	if out := s.must("cancel", "endless", "--reason", "not wanted"); !strings.Contains(out, "is being cancelled") {
		t.Errorf("cancel: %q", out)
	}
	s.wantCancelled("endless", pids)
	// The slot is free again.
	s.drop("next.sh", "true\n")
	if status, _, _ := s.outcome("next"); status != "succeeded" {
		t.Errorf("the next one: %s", status)
	}
}

// The link is down, the sidecar is stopped and started, the runner is
// restarted: the wish stays, and takes effect when the link is back.
func TestCancelOutlivesEverything(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	pids := s.runEndless("endless")
	s.vm.Refuse()
	s.vm.Cut()
	s.must("cancel", "endless", "--reason", "not wanted")
	if out := s.must("jobs"); !strings.Contains(out, "is being cancelled") {
		t.Errorf("jobs: %q", out)
	}
	stop()
	s.run.Stop()
	s.run.Start()
	stop = s.start()
	defer stop()
	if j := s.is("endless", job.Running); j.CancelAsked.IsZero() {
		t.Error("the wish is gone")
	}
	s.vm.Listen()
	s.wantCancelled("endless", pids)
}

// The VM is reset under a job that is to be cancelled: it does not run again.
func TestCancelThenReset(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.runEndless("endless")
	s.vm.Refuse()
	s.vm.Cut()
	s.must("cancel", "endless")
	s.run.Reboot()
	s.vm.Listen()
	status, _, folder := s.outcome("endless")
	if r := result(t, folder); status != "cancelled" || r.Attempts != 1 {
		t.Errorf("status %s, result %+v", status, r)
	}
}

// Its request can't be written yet: when it is, the answer decides.
func TestCancelOfWhatIsSent(t *testing.T) {
	s := newSidecar(t)
	s.vm.Set(func(f *vmtest.Faults) { f.FailRename = true })
	stop := s.start()
	defer stop()
	script, _ := endless(t)
	s.drop("endless.sh", script)
	s.is("endless", job.Sending)
	if out := s.must("cancel", "endless", "--reason", "not wanted"); !strings.Contains(out, "is cancelled") {
		t.Errorf("cancel: %q", out)
	}
	s.vm.Set(func(f *vmtest.Faults) { f.FailRename = false })
	status, _, folder := s.outcome("endless")
	if r := result(t, folder); status != "cancelled" || r.Reason != "not wanted" {
		t.Errorf("status %s, result %+v", status, r)
	}
}

// While its outcome is fetched a job has ended: it can't be cancelled, and is
// fetched again without being built again.
func TestCancelAndRetryOfWhatIsFetched(t *testing.T) {
	s := newSidecar(t)
	s.vm.Set(func(f *vmtest.Faults) { f.ShortReads = "image.iso" })
	stop := s.start()
	defer stop()
	count := filepath.Join(t.TempDir(), "count")
	s.drop("image.sh", "echo ran >>'"+count+"'\nhead -c 100000 /dev/zero >\"$OUT/image.iso\"\n")
	s.until("a fetch that does not work", func() bool {
		out, _, code := s.osbuilder("show", "image")
		return code == 0 && strings.Contains(out, "to be ")
	})
	if _, errs, code := s.osbuilder("cancel", "image"); code != exitFailed || !strings.Contains(errs, "already ended: it succeeded, and its outcome is on the way") {
		t.Errorf("cancel: exit code %d, %q", code, errs)
	}
	s.vm.Set(func(f *vmtest.Faults) { f.ShortReads = "" })
	if out := s.must("retry", "image"); !strings.Contains(out, "without being built again") {
		t.Errorf("retry: %q", out)
	}
	if status, _, _ := s.outcome("image"); status != "succeeded" {
		t.Errorf("status %s", status)
	}
	if runs, err := os.ReadFile(count); err != nil || string(runs) != "ran\n" {
		t.Errorf("it ran %q, %v", runs, err)
	}
}

// onFirst calls f before the first write.
type onFirst struct {
	bytes.Buffer
	f func()
}

func (w *onFirst) Write(b []byte) (int, error) {
	if w.f != nil {
		w.f()
		w.f = nil
	}
	return w.Buffer.Write(b)
}

// All jobs are written a page at a time: one that came on record when the first
// page was written is on a later one.
func TestAllJobsPageByPage(t *testing.T) {
	records, err := store.Open(t.Context(), filepath.Join(t.TempDir(), database))
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	n := 0
	record := func(count int) {
		jobs := make([]job.Job, count)
		for i := range jobs {
			created := at.Add(time.Duration(n) * time.Second)
			jobs[i] = job.Job{ID: job.NewID(created, uint64(n)), Name: fmt.Sprint("job-", n), State: job.Done, Created: created, Updated: created}
			n++
		}
		if _, err := records.CreateAll(t.Context(), jobs); err != nil {
			t.Error(err)
		}
	}
	record(500)
	socket := filepath.Join(t.TempDir(), "control.sock")
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	server := control.Server{Path: socket, Backend: &backend{records: owned{SQLite: records}}, Log: zaptest.NewLogger(t)}
	go func() { done <- server.Run(ctx) }()
	defer func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	client := control.Client{Path: socket}
	for client.AllJobs(t.Context(), func([]control.Job) error { return nil }) != nil && t.Context().Err() == nil {
		runtime.Gosched() // it does not listen yet
	}
	for _, asJSON := range []bool{false, true} {
		out := &onFirst{f: func() { record(1) }}
		if err := listJobs(t.Context(), client, out, true, asJSON); err != nil {
			t.Fatal(err)
		}
		got := strings.Count(out.String(), "\n") - 1 // without the header
		if asJSON {
			var jobs []control.Job
			if err := json.Unmarshal(out.Bytes(), &jobs); err != nil {
				t.Fatalf("%v: %.300s", err, out)
			}
			got = len(jobs)
			var whole bytes.Buffer
			if err := writeJSON(&whole, jobs); err != nil || whole.String() != out.String() {
				t.Errorf("%v: it has not the form of one list: %.300s", err, out)
			}
		}
		if got != n {
			t.Errorf("JSON: %t: %d jobs, want %d", asJSON, got, n)
		}
	}
}
