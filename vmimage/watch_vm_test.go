package vmimage

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// QEMU's monitor and df stand here as programs that read what the test writes.
func TestWatchVM(t *testing.T) {
	dir := t.TempDir()
	for name, script := range map[string]string{
		"socat": `read -r command; echo "$command" >>"$DIR/asked"; echo "QEMU 10.0 monitor"; [ "$command" != "info status" ] || cat "$DIR/status"`,
		"df":    `echo Avail; cat "$DIR/free"`,
		// One round for each line that the test writes.
		"sleep": `echo waits; read -r _ <"$DIR/rounds"`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "rounds"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "qemu/watch-vm.sh", "/run/monitor.sock", "/storage")
	told := filepath.Join(dir, "told")
	cmd.Env = append(cmd.Environ(), "DIR="+dir, "STATUS_DIR="+told, "PATH="+dir+":"+os.Getenv("PATH")) //nolint:forbidigo // the programs that it needs besides
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	// waits returns what it said before it waits for the next round.
	waits := func() (said string) {
		t.Helper()
		for lines.Scan() {
			if lines.Text() == "waits" {
				return said
			}
			said += lines.Text() + "\n"
		}
		t.Fatalf("it ended: %v", lines.Err())
		return said
	}
	const running, stopped = "VM status: running\n", "VM status: paused (io-error)\n"
	const still = "qemu: warning: the VM stands still: its disk could not grow, the host has 3 MiB free for it. It goes on by itself when there are 512 MiB\n"
	const paused = "paused the host has 3 MiB free for it, and it goes on when there are 512 MiB\n" // what the sidecar is told
	steps := []struct{ status, free, says, state string }{
		{running, "3999999", "", ""},
		{"VM status: paused\n", "3999999", "", ""}, // by somebody's hand
		{"", "3999999", "", ""},                    // another has the monitor
		{stopped, "3999999", still, paused},
		{stopped, "3999999", "", paused}, // said once
		{"", "3999999", "", paused},      // another has the monitor: nothing is known
		{stopped, "3999999", "", paused},
		{stopped, "1073741824", "qemu: the host has 1024 MiB free again: the VM goes on\n", "running\n"},
		{running, "1073741824", "", "running\n"},
		{stopped, "3999999", still, paused},   // and again
		{running, "3999999", "", "running\n"}, // somebody let it go on
		{stopped, "3999999", still, paused},
	}
	waits()
	for i, step := range steps {
		put("status", step.status)
		put("free", step.free+"\n")
		put("rounds", "\n") // blocks until it is read
		if got := waits(); got != step.says {
			t.Errorf("step %d: said %q, want %q", i, got, step.says)
		}
		state, err := os.ReadFile(filepath.Join(told, "state"))
		if string(state) != step.state || err != nil && step.state != "" {
			t.Errorf("step %d: the sidecar is told %q, want %q (%v)", i, state, step.state, err)
		}
	}
	// The console's file stays short, and whoever appends to it goes on behind its end.
	path := filepath.Join(told, "console")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	for _, lines := range []int{20_000, 100_000} {
		if _, err := file.WriteString(strings.Repeat("a line\n", lines)); err != nil {
			t.Fatal(err)
		}
		put("rounds", "\n")
		waits()
		if _, err := file.WriteString("the last\n"); err != nil {
			t.Fatal(err)
		}
		text, err := os.ReadFile(path)
		if err != nil || !strings.HasSuffix(string(text), "a line\nthe last\n") || len(text) > 256<<10 || len(text) < 64<<10 {
			t.Errorf("%d bytes of console, %v", len(text), err)
		}
	}
	asked, err := os.ReadFile(filepath.Join(dir, "asked"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(asked), "cont\n"); n != 1 {
		t.Errorf("let go on %d times", n)
	}
	cancel()
	_ = cmd.Wait() // it was killed
}
