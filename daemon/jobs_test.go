package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/daemon/internal/control"
	"osbuilder/daemon/internal/job"
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
