package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/internal/testenv"
)

// smallDisk puts a file system of so many bytes at dir.
func smallDisk(t *testing.T, dir string, size int) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", size)); err != nil {
		testenv.Lacks(t, "no tmpfs can be mounted here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func grow(t *testing.T, dir string, size int) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_REMOUNT, fmt.Sprintf("size=%d", size)); err != nil {
		t.Fatal(err)
	}
}

// line returns the first line of the log whose message begins so, and all that
// it says.
func (s *sidecar) line(message string) string {
	for _, e := range s.logs.All() {
		if strings.HasPrefix(e.Message, message) {
			return e.Message + " " + fmt.Sprint(e.ContextMap())
		}
	}
	return ""
}

func (s *sidecar) wantLine(message string, parts ...string) {
	s.t.Helper()
	s.until("line "+message, func() bool { return s.line(message) != "" })
	for _, part := range parts {
		if line := s.line(message); !strings.Contains(line, part) {
			s.t.Errorf("%s\nlacks %q", line, part)
		}
	}
}

// output/ has no room for the image: it is said before anything is fetched,
// with figures, and when there is room the job is published.
func TestFullOutput(t *testing.T) {
	s := newSidecar(t)
	smallDisk(t, s.cfg.Paths.Output, 1<<20)
	defer s.start()()
	s.drop("big.sh", "head -c 3000000 /dev/zero >\"$OUT/big.iso\"\n")
	s.wantLine("job not published yet, trying again", "no room in "+s.cfg.Paths.Output+": 3.0 MB are needed, ", "MB are missing", "Make room on the disk of the output folder")
	if left, err := filepath.Glob(filepath.Join(s.cfg.Paths.Output, ".partial", "*", "*")); err != nil || len(left) > 0 {
		t.Errorf("something was fetched: %q, %v", left, err)
	}
	grow(t, s.cfg.Paths.Output, 8<<20)
	if status, _, _ := s.outcome("big"); status != "succeeded" {
		t.Errorf("status %s", status)
	}
}

// Before a disk is full, no job is begun, and the one that runs goes on. The
// disk under Docker's volumes is the one under the VM.
func TestDisksThatAreNearlyFull(t *testing.T) {
	for name, path := range map[string]func(config.Paths) string{
		"output":  func(p config.Paths) string { return p.Output },
		"volumes": func(p config.Paths) string { return p.State },
	} {
		t.Run(name, func(t *testing.T) {
			s := newSidecar(t)
			dir := path(s.cfg.Paths)
			smallDisk(t, dir, 20<<20)
			s.cfg.MinFree = 10 << 20
			gate := filepath.Join(t.TempDir(), "gate")
			defer s.start()()
			s.drop("first.sh", "until [ -e '"+gate+"' ]; do sleep 0.05; done\n")
			s.wantLine("job started")
			filler := filepath.Join(dir, "filler")
			if err := os.WriteFile(filler, make([]byte, 15<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			s.wantLine("no job is begun until there is room", "room in "+dir+": ", "MB are free, and jobs begin above 10.5 MB (MIN_FREE)", "Make room on the disk of")
			s.drop("second.sh", "echo second\n")
			s.untilWaits("second", "room in "+dir)
			if err := os.WriteFile(gate, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if status, _, _ := s.outcome("first"); status != "succeeded" {
				t.Errorf("the job that ran: %s", status)
			}
			if n := s.logs.FilterMessage("job started").Len(); n != 1 {
				t.Errorf("%d jobs were started", n)
			}
			if err := os.Remove(filler); err != nil {
				t.Fatal(err)
			}
			if status, _, _ := s.outcome("second"); status != "succeeded" {
				t.Errorf("the job that waited: %s", status)
			}
			s.wantLine("there is room again, jobs are begun")
		})
	}
}

// An image that would fit, but leave less than is to stay free.
func TestWhatStaysFree(t *testing.T) {
	s := newSidecar(t)
	smallDisk(t, s.cfg.Paths.Output, 6<<20)
	s.cfg.MinFree = 5 << 20
	defer s.start()()
	s.drop("big.sh", "head -c 3000000 /dev/zero >\"$OUT/big.iso\"\n")
	s.wantLine("job not published yet, trying again", "3.0 MB are needed, 6.", "and 5.2 MB of these are to stay free (MIN_FREE)")
	grow(t, s.cfg.Paths.Output, 20<<20)
	if status, _, _ := s.outcome("big"); status != "succeeded" {
		t.Errorf("status %s", status)
	}
}

// The state folder is full to the last byte in the middle of a build's output:
// the sidecar ends with what is missing and what to do, is started again, as
// Docker does, and goes on once there is room. Every line is there once.
func TestFullState(t *testing.T) {
	s := newSidecar(t)
	smallDisk(t, s.cfg.Paths.State, 2<<20)
	s.drop("loud.sh", "for i in {1..60000}; do echo \"line $i of a build that says much\"; done\n")
	var last error
	core, logs := observer.New(zap.InfoLevel)
	s.logs = logs
	for range 3 { // and again, as long as it is full
		last = serve(t.Context(), s.cfg, s.links(), zap.New(core))
		if !disk.Full(last) {
			t.Fatalf("ended with %v", last)
		}
	}
	var full *disk.NoRoom
	if hints := strings.Join(hint.Of(last), " "); !errors.As(last, &full) || full.Path != s.cfg.Paths.State ||
		!strings.Contains(last.Error(), "no room in "+s.cfg.Paths.State+": ") || !strings.Contains(hints, "docker system df") || !strings.Contains(hints, "goes on then") {
		t.Errorf("ended with %v, hints %q", last, hints)
	}
	grow(t, s.cfg.Paths.State, 40<<20)
	defer s.start()()
	status, log, _ := s.outcome("loud")
	lines := strings.Split(strings.TrimSuffix(log, "\n"), "\n")
	if status != "succeeded" || len(lines) != 60_000 {
		t.Fatalf("%s with %d lines", status, len(lines))
	}
	for i, line := range lines {
		if want := fmt.Sprintf("line %d of a build that says much", i+1); line != want {
			t.Fatalf("line %d is %q", i, line)
		}
	}
}
