package main

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/health"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
)

// A sidecar, all of it, in this process, before a VM whose SSH server is a
// test's and whose runner is the real one.
type sidecar struct {
	t   *testing.T
	cfg config.Config
	vm  *vmtest.Server
	run *vmtest.Runner
}

func newSidecar(t *testing.T) *sidecar {
	dir := t.TempDir()
	s := &sidecar{t: t, vm: vmtest.New(t)}
	s.run = vmtest.NewRunner(t, s.vm, nil)
	s.cfg = config.Config{
		Settle: 50 * time.Millisecond, Rescan: 200 * time.Millisecond, JobTimeout: time.Minute,
		Paths: config.Paths{
			Jobs: filepath.Join(dir, "jobs"), Output: filepath.Join(dir, "output"), State: filepath.Join(dir, "state"),
			Health: filepath.Join(dir, "health.sock"),
		},
	}
	for _, path := range []string{s.cfg.Paths.Jobs, s.cfg.Paths.Output, s.cfg.Paths.State} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// start starts it; the returned function stops it and waits.
func (s *sidecar) start() (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() {
		link := vm.Config{
			Name: "vm", Addr: s.vm.Addr(), User: "builder", Signer: s.vm.Signer(), HostKeys: s.vm.HostKeys(), Dir: s.vm.Dir(),
		}
		done <- serve(ctx, s.cfg, []vm.Config{link}, zaptest.NewLogger(s.t))
	}()
	return func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("the sidecar ended with: %v", err)
		}
	}
}

func (s *sidecar) drop(name, script string) {
	s.t.Helper()
	if err := os.WriteFile(filepath.Join(s.cfg.Paths.Jobs, name), []byte(script), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

// outcome waits for the result of the newest job of that name.
func (s *sidecar) outcome(name string) (status, log, folder string) {
	s.t.Helper()
	latest := filepath.Join(s.cfg.Paths.Output, name, "latest")
	s.until("an outcome of "+name, func() bool {
		_, err := os.Stat(filepath.Join(latest, "result.json"))
		return err == nil
	})
	folder, err := filepath.EvalSymlinks(latest)
	if err != nil {
		s.t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(folder, "result.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	var result struct{ Status string }
	if err := json.Unmarshal(data, &result); err != nil {
		s.t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(folder, "build.log"))
	if err != nil {
		s.t.Fatal(err)
	}
	return result.Status, string(text), folder
}

func (s *sidecar) until(what string, done func() bool) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			s.t.Fatalf("no %s", what)
		case <-tick.C:
		}
	}
}

func TestFromDropToOutput(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.drop("hello.sh", "echo building\necho image > \"$OUT/hello.iso\"\n")
	status, log, folder := s.outcome("hello")
	if status != "succeeded" || log != "building\n" {
		t.Errorf("status %s, log %q", status, log)
	}
	image, err := os.ReadFile(filepath.Join(folder, "hello.iso"))
	if err != nil || string(image) != "image\n" {
		t.Errorf("image %q, %v", image, err)
	}
	if err := health.Check(t.Context(), s.cfg.Paths.Health); err != nil {
		t.Errorf("health: %v", err)
	}
	// The VM may forget what was delivered, and does.
	s.until("an empty folder of artifacts", func() bool {
		left, err := os.ReadDir(filepath.Join(s.run.Data(), "artifacts"))
		return err == nil && len(left) == 0
	})
}

// The sidecar is away while the job ends, and the link breaks besides: the
// log has every line once.
func TestAwayWhileTheJobEnds(t *testing.T) {
	s := newSidecar(t)
	gate := filepath.Join(t.TempDir(), "gate")
	stop := s.start()
	s.drop("long.sh", "echo one\nuntil [ -e '"+gate+"' ]; do sleep 0.05; done\necho two\necho image > \"$OUT/long.iso\"\n")
	s.until("start of the job", func() bool {
		logs, err := filepath.Glob(filepath.Join(s.cfg.Paths.State, "jobs", "*", "build.log"))
		if err != nil || len(logs) != 1 {
			return false
		}
		log, err := os.ReadFile(logs[0])
		return err == nil && string(log) == "one\n"
	})
	s.vm.Cut()
	stop()
	if err := os.WriteFile(gate, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	stop = s.start()
	defer stop()
	status, log, _ := s.outcome("long")
	if status != "succeeded" || log != "one\ntwo\n" {
		t.Errorf("status %s, log %q", status, log)
	}
}

// The VM is reset under a job: it runs again, and its log says so.
func TestVMResetUnderAJob(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	once := filepath.Join(t.TempDir(), "once")
	s.drop("reset.sh", "echo \"try $JOB_ATTEMPT\"\nif mkdir '"+once+"' 2>/dev/null; then sleep 600; fi\n")
	s.until("first try", func() bool {
		_, err := os.Stat(once)
		return err == nil
	})
	s.run.Reboot()
	s.vm.Cut()
	status, log, _ := s.outcome("reset")
	want := "try 1\n[osbuilder: attempt 2 begins, attempt 1 did not end]\ntry 2\n"
	if diff := cmp.Diff(want, log); status != "succeeded" || diff != "" {
		t.Errorf("status %s, build.log (-want +got):\n%s", status, diff)
	}
}

func TestKeysMissing(t *testing.T) {
	_, err := identify(nil, t.TempDir())
	if err == nil || len(hint.Of(err)) == 0 {
		t.Errorf("error %v, hints %q: want both", err, hint.Of(err))
	}
}
