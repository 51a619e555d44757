// Package nix runs Nix's own commands as children that end with their parent,
// and reads what they say.
package nix

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"osbuilder/vmimage/internal/nixlog"
)

// grace is shorter than what systemd grants a job.
const grace = 8 * time.Second

// A Runner runs commands in one environment.
type Runner struct {
	Env []string // beyond the program's own
	Dir string   // empty is the program's own
	// Sink gets what the commands say, in plain lines.
	Sink func(line string)
	// Grace is how long a command has to end by itself after SIGTERM; 0 is a
	// few seconds.
	Grace time.Duration
}

// silent says what those commands do that may say nothing for minutes.
var silent = map[string]string{"nix-instantiate": "evaluating", "nix-prefetch-url": "downloading"}

// An ExitError says how a command ended that did not succeed.
type ExitError struct {
	Command string
	Code    int            // -1 if a signal ended it
	Signal  syscall.Signal // 0 if none did
	Stopped bool           // since the context was done
}

func (e *ExitError) Error() string {
	switch {
	case e.Stopped:
		return e.Command + " was stopped"
	case e.Signal != 0:
		return fmt.Sprintf("%s was ended by signal %d (%s)", e.Command, e.Signal, e.Signal)
	default:
		return fmt.Sprintf("%s ended with exit code %d", e.Command, e.Code)
	}
}

// Run runs a command that speaks internal-json on standard error, and returns
// its standard output and all it said. The error is an [*ExitError], or says
// why the command could not be started.
func (r Runner) Run(ctx context.Context, name string, args ...string) ([]byte, *nixlog.Log, error) {
	log := nixlog.New(r.Sink, time.Now)
	if doing, ok := silent[name]; ok {
		log.Doing = doing
	}
	out, err := r.run(ctx, log, name, append(args, "--log-format", "internal-json"))
	return out, log, err
}

// Query runs a command that only answers; its standard error is in the error.
func (r Runner) Query(ctx context.Context, name string, args ...string) (string, error) {
	var said []string
	log := nixlog.New(func(line string) { said = append(said, line) }, time.Now)
	out, err := r.run(ctx, log, name, args)
	if err != nil {
		return "", fmt.Errorf("%w: %s", err, strings.Join(said, " "))
	}
	return strings.TrimSpace(string(out)), nil
}

func (r Runner) run(ctx context.Context, log *nixlog.Log, name string, args []string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = r.Dir
	cmd.Env = append(cmd.Environ(), r.Env...)
	// A group of its own, so that what it started ends with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	if cmd.WaitDelay = r.Grace; cmd.WaitDelay == 0 {
		cmd.WaitDelay = grace
	}

	var stdout bytes.Buffer
	read, write := io.Pipe()
	cmd.Stdout, cmd.Stderr = &stdout, write
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	drained := make(chan error, 1)
	go func() {
		err := log.Read(read)
		// Never let the command wait for a reader that is gone.
		_, _ = io.Copy(io.Discard, read)
		drained <- err
	}()
	err := cmd.Wait()
	_ = write.Close()
	readErr := <-drained
	if ctx.Err() != nil {
		// Its children, too, if any outlived it.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		return stdout.Bytes(), &ExitError{Command: name, Code: -1, Stopped: true}
	}
	if err == nil {
		return stdout.Bytes(), readErr
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return stdout.Bytes(), fmt.Errorf("run %s: %w", name, err)
	}
	e := &ExitError{Command: name, Code: exit.ExitCode()}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		e.Signal = status.Signal()
	}
	return stdout.Bytes(), e
}
