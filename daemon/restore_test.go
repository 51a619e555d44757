package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.uber.org/zap/zaptest"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
)

var copyNamed = regexp.MustCompile(`The newest sound copy is (\S+), of`)

// The records are damaged, and a copy is put in place as the message says.
// Jobs went on since it was made: none runs twice as the same attempt, none is
// lost, and the drops that came after it are named.
func TestRestoredFromACopy(t *testing.T) {
	s := newSidecar(t)
	ran := filepath.Join(t.TempDir(), "ran")
	counted := func(script string) string { return "echo \"$JOB_NAME $JOB_ATTEMPT\" >>'" + ran + "'\n" + script }
	wait, open := make(map[string]string), make(map[string]func())
	for _, name := range []string{"long", "moves", "starts"} {
		wait[name], open[name] = gate(t)
	}

	stop := s.start()
	s.drop("early.sh", counted("true\n"))
	s.outcome("early")
	for _, name := range []string{"long", "moves"} { // as many as there are slots
		s.drop(name+".sh", counted(wait[name]+"echo end of "+name+"\n"))
		s.is(name, job.Running)
	}
	s.drop("waits.sh", counted("true\n"))
	s.is("waits", job.Queued)
	s.drop("starts.sh", counted(wait["starts"]))
	s.is("starts", job.Queued)
	stop()
	path := filepath.Join(s.cfg.Paths.State, database)
	copied := copyStore(t, path)

	stop = s.start()
	s.drop("after.sh", counted("true\n"))
	s.is("after", job.Queued)
	s.must("priority", "after", "50")
	open["moves"]()
	for _, name := range []string{"moves", "after", "waits"} {
		s.outcome(name)
	}
	s.is("starts", job.Running)
	s.drop("late.sh", counted("true\n"))
	late := s.is("late", job.Queued)
	for _, name := range []string{"moves", "waits"} { // as if they had ended long ago, after the copy
		dir := filepath.Join(s.cfg.Paths.State, "jobs", string(s.is(name, job.Done).ID))
		if err := errors.Join(os.Remove(filepath.Join(dir, "build.log")), os.Rename(filepath.Join(dir, "source"), filepath.Join(dir, "ended"))); err != nil {
			t.Fatal(err)
		}
	}
	stop()

	if err := os.Truncate(path, 8192); err != nil {
		t.Fatal(err)
	}
	err := serve(t.Context(), s.cfg, nil, zaptest.NewLogger(t))
	if err == nil {
		t.Fatal("it runs on damaged records")
	}
	text := strings.Join(hint.Of(err), "\n")
	if named := copyNamed.FindStringSubmatch(text); named == nil || named[1] != copied || !strings.Contains(text, "sidecar restore &&") {
		t.Fatalf("the message: %v\n%s", err, text)
	}
	if out := s.must("restore", "--state", s.cfg.Paths.State); !strings.Contains(out, "put in its place: "+copied) {
		t.Errorf("restore: %q", out)
	}

	stop = s.start()
	defer func() { stop() }()
	s.is("starts", job.Running)
	lost := s.logs.FilterMessage("job is not on record any more: it has to be dropped again").All()
	if len(lost) != 1 || lost[0].ContextMap()["id"] != string(late.ID) {
		t.Fatalf("lost: %v", lost)
	}
	again := fmt.Sprintf("cp -r jobs/.taken/%s/late.sh jobs/", late.ID)
	if told, _ := lost[0].ContextMap()["hint"].(string); !strings.Contains(told, again) {
		t.Errorf("the hint is %q", told)
	}
	data, err := os.ReadFile(filepath.Join(s.cfg.Paths.Jobs, ".taken", string(late.ID), "late.sh"))
	if err != nil {
		t.Fatal(err)
	}
	s.drop("late.sh", string(data))
	open["long"]()
	open["starts"]()
	for _, name := range []string{"early", "long", "moves", "waits", "starts", "after", "late"} {
		if status, _, folder := s.outcome(name); status != "succeeded" || result(t, folder).Attempts != 1 {
			t.Errorf("%s: %s, %+v", name, status, result(t, folder))
		}
		if all, err := filepath.Glob(filepath.Join(s.cfg.Paths.Output, name, "2*")); err != nil || len(all) != 1 {
			t.Errorf("%s has the outcomes %v, %v", name, all, err)
		}
	}
	if _, log, _ := s.outcome("long"); log != "up\nend of long\n" {
		t.Errorf("build.log: %q", log)
	}
	for _, name := range []string{"long", "moves", "waits", "starts"} {
		j := s.is(name, job.Done)
		if !strings.Contains(fmt.Sprint(j.History), "from the copy of ") {
			t.Errorf("%s: its story does not tell of the copy: %v", name, j.History)
		}
	}
	executions, err := os.ReadFile(ran)
	if err != nil {
		t.Fatal(err)
	}
	runs := make(map[string]int)
	for line := range strings.Lines(string(executions)) {
		runs[strings.TrimSpace(line)]++
	}
	for _, name := range []string{"early", "long", "moves", "waits", "starts", "after", "late"} {
		if n := runs[name+".sh 1"]; n != 1 {
			t.Errorf("%s ran %d times", name, n)
		}
	}
	if len(runs) != 7 {
		t.Errorf("executions: %v", runs)
	}
	stop()
	stop = s.start()
	s.until("records", func() bool { _, _, code := s.osbuilder("jobs"); return code == 0 })
	if n := s.logs.FilterMessage("job is not on record any more: it has to be dropped again").Len(); n > 0 {
		t.Error("said again")
	}
}

func copyStore(t *testing.T, path string) string {
	t.Helper()
	records, err := store.Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	name, err := records.Copy(context.WithoutCancel(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	if err := records.Close(); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestRestoreCommand(t *testing.T) {
	s := &sidecar{t: t}
	state := t.TempDir()
	if _, errs, code := s.osbuilder("restore", "a", "--empty"); code != exitUsage {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if _, errs, code := s.osbuilder("restore", "--state", state); code != exitFailed || !strings.Contains(errs, "hint: Begin anew") {
		t.Errorf("exit code %d: %s", code, errs)
	}
	if out := s.must("restore", "--state", state, "--empty"); !strings.Contains(out, "empty now") {
		t.Errorf("%q", out)
	}
	if _, errs, code := s.osbuilder("restore", "--state", state); code != exitFailed || !strings.Contains(errs, "sound") {
		t.Errorf("exit code %d: %s", code, errs)
	}
}

// Whether a job was given to a VM is known without its record, also when its log was removed long after its end.
func TestBegun(t *testing.T) {
	for name, want := range map[string]bool{"source": false, "build.log": true, "ended": true, ".outdated": true} {
		state := t.TempDir()
		if err := os.MkdirAll(filepath.Join(state, "jobs", "20260102-030405-aaaaaa", name), 0o700); err != nil {
			t.Fatal(err)
		}
		if got := begun(state, "20260102-030405-aaaaaa"); got != want {
			t.Errorf("with %s: %t", name, got)
		}
	}
}
