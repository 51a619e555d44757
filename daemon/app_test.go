package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/deliver"
	"osbuilder/daemon/internal/health"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// A sidecar, all of it, in this process, before a VM whose SSH server is a
// test's and whose runner is the real one.
type sidecar struct {
	t   *testing.T
	cfg config.Config
	vm  *vmtest.Server
	run *vmtest.Runner

	logs    *observer.ObservedLogs
	timings vm.Timings
	systems string // the file that lists what the VM builds for
}

// imageBuild stands for the program of that name in the VM: its command line,
// and what it reports. A configuration that says "broken" is.
const imageBuild = `#!/bin/bash
set -eu
echo "image-build $*"
for source; do :; done
entry=configuration.nix
[[ $1 == --entry ]] && entry=$2
find "$source" -printf '%P %y %m\n' | LC_ALL=C sort
if grep -q broken "$source/$entry"; then
  printf '%s' '{"kind":"nixos-image","nix":"2.26.3","error":{"class":"evaluation","summary":"undefined variable broken","at":"'"$entry"':1:1","advice":"Define it.","lines":[]}}' >"$REPORT"
  exit 1
fi
cat "$source/$entry" >"$OUT/nixos.iso"
printf '%s' '{"kind":"nixos-image","nix":"2.26.3","nixpkgs":{"revision":"0123"},"closure_bytes":7}' >"$REPORT"
`

func newSidecar(t *testing.T) *sidecar {
	dir := t.TempDir()
	s := &sidecar{
		t: t, vm: vmtest.New(t), timings: vm.Timings{RetryMin: 50 * time.Millisecond, RetryMax: 200 * time.Millisecond},
	}
	bin := filepath.Join(dir, "bin")
	if err := os.Mkdir(bin, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bin, "image-build"), []byte(imageBuild), 0o755); err != nil {
		t.Fatal(err)
	}
	s.run = vmtest.NewRunner(t, s.vm, func(c *runner.Config) {
		c.Path = bin + ":/usr/local/bin:/usr/bin:/bin"
		c.SystemsFile = filepath.Join(dir, "systems")
	})
	s.systems = filepath.Join(dir, "systems")
	s.cfg = config.Config{
		Settle: 50 * time.Millisecond, Rescan: 200 * time.Millisecond, JobTimeout: time.Minute,
		Paths: config.Paths{
			Jobs: filepath.Join(dir, "jobs"), Output: filepath.Join(dir, "output"), State: filepath.Join(dir, "state"),
			Health: filepath.Join(dir, "health.sock"), Control: filepath.Join(dir, "control.sock"),
		},
	}
	s.cfg.Format, s.cfg.System, s.cfg.Nixpkgs = "iso", "x86_64-linux", "nixos-26.05"
	for _, path := range []string{s.cfg.Paths.Jobs, s.cfg.Paths.Output, s.cfg.Paths.State} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// start starts it; the returned function stops it and waits.
func (s *sidecar) start() (stop func()) {
	core, logs := observer.New(zap.InfoLevel)
	s.logs = logs
	return s.startWith(zaptest.NewLogger(s.t, zaptest.WrapOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, core) }))))
}

func (s *sidecar) startWith(log *zap.Logger) (stop func()) {
	ctx, cancel := context.WithCancel(s.t.Context())
	done := make(chan error, 1)
	go func() { done <- serve(ctx, s.cfg, s.links(), log) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("the sidecar ended with: %v", err)
		}
	}
}

func (s *sidecar) links() []vm.Config {
	return []vm.Config{{
		Name: "vm", Addr: s.vm.Addr(), User: "builder", Signer: s.vm.Signer(), HostKeys: s.vm.HostKeys(), Dir: s.vm.Dir(),
		Timings: s.timings,
	}}
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

// untilWaits waits until a job says that it waits for something with all these
// words.
func (s *sidecar) untilWaits(job string, words ...string) {
	s.t.Helper()
	s.until(fmt.Sprintf("%s that waits for %q", job, words), func() bool {
		for _, line := range s.logs.FilterMessage("job waits").All() {
			said := line.ContextMap()
			why, _ := said["for"].(string)
			lacks := func(word string) bool { return !strings.Contains(why, word) }
			if said["job"] == job && !slices.ContainsFunc(words, lacks) {
				return true
			}
		}
		return false
	})
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
	_, err := identify(nil, t.TempDir(), "")
	if err == nil || len(hint.Of(err)) == 0 {
		t.Errorf("error %v, hints %q: want both", err, hint.Of(err))
	}
}

// result reads what is on record of a job's outcome.
func result(t *testing.T, folder string) deliver.Result {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(folder, "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r deliver.Result
	if err := json.Unmarshal(data, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestConfigurationFile(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.drop("my host.nix", "{ }\n")
	status, log, folder := s.outcome("my-host")
	want := "image-build --entry my-host.nix --format iso --system x86_64-linux --nixpkgs nixos-26.05 --name my-host source\n" +
		" d 755\nmy-host.nix f 644\n"
	if diff := cmp.Diff(want, log); status != "succeeded" || diff != "" {
		t.Errorf("status %s, build.log (-want +got):\n%s", status, diff)
	}
	if image, err := os.ReadFile(filepath.Join(folder, "nixos.iso")); err != nil || string(image) != "{ }\n" {
		t.Errorf("image %q, %v", image, err)
	}
	r := result(t, folder)
	if string(r.Report) == "" || r.Versions.Nix != "2.26.3" || r.Versions.Runner != "vmtest" || r.Inputs == nil ||
		r.NixOS == nil || r.NixOS.Nixpkgs != "nixos-26.05" || r.Image != "vmtest-1" {
		t.Errorf("result %+v", r)
	}
	if left, err := filepath.Glob(filepath.Join(s.vm.Dir(), "*inputs-*")); err != nil || len(left) > 0 {
		t.Errorf("uploads left: %v, %v", left, err)
	}
}

func TestConfigurationFolder(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.folder("machine", map[string]string{
		"configuration.nix": "{ imports = [ ./disk.nix ]; }\n", "disk.nix": "{ }\n", "bin/tool": "#!/bin/sh\n", "link": "-> disk.nix",
	})
	status, log, folder := s.outcome("machine")
	want := "image-build --entry configuration.nix --format iso --system x86_64-linux --nixpkgs nixos-26.05 --name machine source\n" +
		" d 755\nbin d 755\nbin/tool f 755\nconfiguration.nix f 644\ndisk.nix f 644\nlink l 777\n"
	if diff := cmp.Diff(want, log); status != "succeeded" || diff != "" {
		t.Errorf("status %s, build.log (-want +got):\n%s", status, diff)
	}
	if text, err := os.ReadFile(filepath.Join(folder, "source", "machine", "disk.nix")); err != nil || string(text) != "{ }\n" {
		t.Errorf("source %q, %v", text, err)
	}
}

// folder drops a folder: at once, as a move does. "-> x" is a link to x, and
// what begins with #! can be run.
func (s *sidecar) folder(name string, files map[string]string) {
	s.t.Helper()
	temp := filepath.Join(s.cfg.Paths.Jobs, "."+name)
	for file, text := range files {
		path := filepath.Join(temp, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			s.t.Fatal(err)
		}
		var err error
		if target, ok := strings.CutPrefix(text, "-> "); ok {
			err = os.Symlink(target, path)
		} else if strings.HasPrefix(text, "#!") {
			err = os.WriteFile(path, []byte(text), 0o755)
		} else {
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if err := os.Rename(temp, filepath.Join(s.cfg.Paths.Jobs, name)); err != nil {
		s.t.Fatal(err)
	}
}

func TestBrokenConfiguration(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	s.drop("host.nix", "{ imports = [ ./other.nix ]; broken }\n")
	status, log, folder := s.outcome("host")
	r := result(t, folder)
	if status != "failed" || r.Reason != "undefined variable broken (at host.nix:1:1)" || r.At != "host.nix:1:1" || r.Advice != "Define it." {
		t.Errorf("status %s, result %+v", status, r)
	}
	if want := "note: host.nix mentions ./other.nix, and was dropped alone."; !strings.Contains(log, want) {
		t.Errorf("build.log lacks %q:\n%s", want, log)
	}
}

// The link breaks in the middle of an upload: it goes on where it stopped.
func TestUploadSurvivesCuts(t *testing.T) {
	s := newSidecar(t)
	s.vm.Set(func(f *vmtest.Faults) { f.CutWrites = 300_000 })
	stop := s.start()
	defer stop()
	s.folder("machine", map[string]string{"configuration.nix": "{ }\n", "big": strings.Repeat("x", 1_000_000)})
	if status, log, _ := s.outcome("machine"); status != "succeeded" {
		t.Errorf("status %s, log %s", status, log)
	}
	if n := s.vm.Logins(); n < 4 {
		t.Errorf("%d logins: the link was not cut", n)
	}
}

// What was uploaded is lost with the VM's disk, or damaged on it, before the
// request comes: it is uploaded again.
func TestUploadIsLostAndDamaged(t *testing.T) {
	s := newSidecar(t)
	s.vm.Set(func(f *vmtest.Faults) { f.FailRename = true })
	stop := s.start()
	defer stop()
	s.drop("host.nix", "{ }\n")
	var half string
	s.until("an upload that waits for its rename", func() bool {
		found, err := filepath.Glob(filepath.Join(s.vm.Dir(), ".inputs-*"))
		if err != nil || len(found) != 1 {
			return false
		}
		half = found[0]
		info, err := os.Stat(half)
		return err == nil && info.Size() > 0
	})
	damaged := make([]byte, 0)
	info, err := os.Stat(half)
	if err != nil {
		t.Fatal(err)
	}
	damaged = append(damaged, make([]byte, info.Size())...)
	if err := os.WriteFile(half, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	s.vm.Set(func(f *vmtest.Faults) { f.FailRename = false })
	if status, log, _ := s.outcome("host"); status != "succeeded" {
		t.Errorf("status %s, log %s", status, log)
	}
}

// The VM is reset under the job, which needs its inputs again.
func TestConfigurationAfterAReset(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	once := filepath.Join(t.TempDir(), "once")
	slow := strings.Replace(imageBuild, "set -eu\n", "set -eu\nif mkdir '"+once+"' 2>/dev/null; then sleep 600; fi\n", 1)
	bin := filepath.Join(filepath.Dir(s.cfg.Paths.Jobs), "bin", "image-build")
	if err := os.WriteFile(bin, []byte(slow), 0o755); err != nil {
		t.Fatal(err)
	}
	s.drop("host.nix", "{ }\n")
	s.until("first try", func() bool {
		_, err := os.Stat(once)
		return err == nil
	})
	s.run.Reboot()
	s.vm.Cut()
	if status, log, folder := s.outcome("host"); status != "succeeded" || result(t, folder).Attempts != 2 {
		t.Errorf("status %s, log %s", status, log)
	}
}

// A VM from before this recipe says what to do.
func TestVMWithoutImageBuild(t *testing.T) {
	s := newSidecar(t)
	if err := os.Remove(filepath.Join(filepath.Dir(s.cfg.Paths.Jobs), "bin", "image-build")); err != nil {
		t.Fatal(err)
	}
	stop := s.start()
	defer stop()
	s.drop("host.nix", "{ }\n")
	_, log, folder := s.outcome("host")
	if r := result(t, folder); !strings.Contains(r.Reason, "has no image-build") || !strings.Contains(r.Advice, "--build") || !strings.Contains(log, "has no image-build") {
		t.Errorf("result %+v, log %q", r, log)
	}
}

// No VM builds for the system: the job says so and waits until one does.
func TestForeignSystem(t *testing.T) {
	s := newSidecar(t)
	s.cfg.System = "riscv64-linux"
	stop := s.start()
	defer stop()
	s.drop("host.nix", "{ }\n")
	s.drop("script.sh", "true\n")
	s.outcome("script") // it passes the one that waits
	s.untilWaits("host", "no builder for riscv64-linux: vm builds for x86_64-linux")
	if err := os.WriteFile(s.systems, []byte("riscv64-linux\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	s.run.Reboot()
	s.vm.Cut()
	if status, log, _ := s.outcome("host"); status != "succeeded" {
		t.Errorf("status %s, log %s", status, log)
	}
}
