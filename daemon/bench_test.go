package main

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// BenchmarkNoOpJobs: from the inbox to output/, by the whole sidecar, SSH and
// the real runner, with the defaults of both. A job is two processes of Bash;
// systemd is not in it.
func BenchmarkNoOpJobs(b *testing.B) {
	dir := b.TempDir()
	server := vmtest.New(b)
	vmtest.NewRunner(b, server, func(c *runner.Config) { c.Log = io.Discard })
	cfg, err := config.Load()
	if err != nil {
		b.Fatal(err)
	}
	at := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	cfg.Paths = config.Paths{Jobs: at("jobs"), Output: at("output"), State: at("state"), Health: at("health"), Control: at("control")}
	for _, path := range []string{cfg.Paths.Jobs, cfg.Paths.Output, cfg.Paths.State, at("new")} {
		if err := os.Mkdir(path, 0o755); err != nil {
			b.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(b.Context())
	done := make(chan error, 1)
	go func() {
		link := vm.Config{Name: "vm", Addr: server.Addr(), User: "builder", Signer: server.Signer(), HostKeys: server.HostKeys(), Dir: server.Dir()}
		done <- serve(ctx, cfg, []vm.Config{link}, zap.NewNop())
	}()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}()
	for i := 0; b.Loop(); i++ {
		name := "job" + strconv.Itoa(i) + ".sh"
		err := os.WriteFile(at("new", name), []byte("true\n"), 0o644)
		if err = errors.Join(err, os.Rename(at("new", name), at("jobs", name))); err != nil {
			b.Fatal(err)
		}
		// A few are under way at any time, as when somebody drops many.
		if i >= waiting {
			waitFor(b, at("output", "job"+strconv.Itoa(i-waiting), "latest"))
		}
	}
	perMinute(b, b.N-waiting) // the others have begun, and don't count
	for i := max(0, b.N-waiting); i < b.N; i++ {
		waitFor(b, at("output", "job"+strconv.Itoa(i), "latest"))
	}
}

// waiting is how many jobs are under way at any time.
const waiting = 24

func waitFor(b *testing.B, path string) {
	b.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		if _, err := os.Lstat(path); err == nil {
			return
		} else if !errors.Is(err, fs.ErrNotExist) {
			b.Fatal(err)
		}
		if b.Context().Err() != nil {
			b.Fatal(b.Context().Err())
		}
	}
}

func perMinute(b *testing.B, jobs int) {
	b.ReportMetric(max(0, float64(jobs))/b.Elapsed().Minutes(), "jobs/min")
}

// BenchmarkNaiveLoop is what the same costs without a promise: inotify, and
// Bash that runs what lies in pipe_in. The writer waits until each has run,
// since the loop would lose the next.
func BenchmarkNaiveLoop(b *testing.B) {
	dir := b.TempDir()
	in := filepath.Join(dir, "pipe_in")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		b.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MOVED_TO); err != nil {
		b.Fatal(err)
	}
	buf := make([]byte, 4096)
	for b.Loop() {
		err := os.WriteFile(in+".new", []byte("true\n"), 0o644)
		if err = errors.Join(err, os.Rename(in+".new", in)); err != nil {
			b.Fatal(err)
		}
		if _, err := unix.Read(fd, buf); err != nil {
			b.Fatal(err)
		}
		if err := exec.CommandContext(b.Context(), "bash", in).Run(); err != nil {
			b.Fatal(err)
		}
	}
	perMinute(b, b.N)
}
