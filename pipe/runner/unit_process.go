package runner

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe/effect"
)

// ProcessUnits runs each job as plain processes, for tests and machines
// without systemd: it outlives the runner and leaves the same result, but
// there is no other user, no limit and no wall around it. It wants bash and
// util-linux. A script that exits with 128 and a signal's number counts as
// killed by it, since that is what bash says of one that was.
type ProcessUnits struct{}

// supervisor is what systemd is for SystemdUnits.
//
//go:embed supervisor.sh
var supervisor string

// Start implements [Units]. The lock is taken here and handed on, so that
// there is no moment in which the unit is about to run and nobody holds it: a
// runner that is killed over this has a successor that looks.
func (ProcessUnits) Start(ctx context.Context, spec Spec) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
	defer cancel()
	// A new session, and a parent that is gone: the unit is not the runner's
	// child, so the runner neither takes it along nor has to wait for it.
	cmd := exec.CommandContext(ctx, "setsid", "--fork", "bash", "-c", supervisor, spec.Unit,
		processLock(spec), spec.Script, spec.Log, spec.Result,
		strconv.FormatInt(int64(spec.Timeout/time.Second), 10), strconv.FormatInt(spec.Grace.Milliseconds(), 10), spec.Work)
	cmd.Env = spec.Env
	lock, err := effect.OpenFile(processLock(spec), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("start unit %s: %w", spec.Unit, err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("start unit %s: lock: %w", spec.Unit, err)
	}
	cmd.ExtraFiles = []*os.File{lock.File}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	effect.Before("start", spec.Unit)
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("start unit %s: %w: %s", spec.Unit, err, strings.TrimSpace(stderr.String()))
	}
	if strings.TrimSpace(string(out)) != "ready" {
		return fmt.Errorf("start unit %s: %s", spec.Unit, strings.TrimSpace(stderr.String()))
	}
	return nil
}

// processLock is held by the supervisor and by every process of the job that
// didn't close it. It holds the numbers of the supervisor and of the script.
func processLock(spec Spec) string {
	return filepath.Join(filepath.Dir(spec.Result), "process")
}

// members are the processes of the job, whatever session or group they are in.
// Of others' processes the environment can't be read, and they are none.
func members(spec Spec) ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes of %s: %w", spec.Unit, err)
	}
	mark := []byte("\x00PROCESS_UNIT=" + processLock(spec) + "\x00")
	var all []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile(filepath.Join("/proc", e.Name(), "environ"))
		if err == nil && bytes.Contains(append([]byte{0}, env...), mark) {
			all = append(all, pid)
		}
	}
	return all, nil
}

// Alive implements [Units].
func (ProcessUnits) Alive(_ context.Context, spec Spec) (bool, error) {
	f, err := effect.OpenFile(processLock(spec), os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for processes of %s: %w", spec.Unit, err)
	}
	defer f.Close()
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("look for processes of %s: %w", spec.Unit, err)
	}
	left, err := members(spec)
	return len(left) > 0, err
}

// Stop implements [Units]. Without a supervisor there is nobody to see to the
// grace.
func (u ProcessUnits) Stop(ctx context.Context, spec Spec) error {
	alive, err := u.Alive(ctx, spec)
	if err != nil || !alive {
		return err // the number is by now somebody else's
	}
	supervisor, _, err := processNumbers(spec)
	if err != nil {
		return err
	}
	effect.Before("kill", strconv.Itoa(supervisor))
	err = unix.Kill(supervisor, unix.SIGUSR1)
	if errors.Is(err, unix.ESRCH) {
		return u.Kill(ctx, spec)
	}
	if err != nil {
		return fmt.Errorf("stop %s: %w", spec.Unit, err)
	}
	return nil
}

// Enforce implements [Units]: the supervisor sees to it.
func (ProcessUnits) Enforce(context.Context, Spec) error { return nil }

// Kill implements [Units]. The supervisor, like systemd, is none of them.
func (ProcessUnits) Kill(ctx context.Context, spec Spec) error {
	// One that is forked meanwhile is found the next time.
	for range 100 {
		pids, err := members(spec)
		if err != nil || len(pids) == 0 {
			return err
		}
		for _, pid := range pids {
			effect.Before("kill", strconv.Itoa(pid))
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill %s: %w", spec.Unit, err)
			}
		}
		if !pause(ctx, time.Millisecond) {
			return context.Cause(ctx)
		}
	}
	return nil // who waits for it to be gone says so
}

// processNumbers reads what the supervisor noted.
func processNumbers(spec Spec) (supervisor, script int, err error) {
	data, err := readBounded(processLock(spec), maxResult)
	if err != nil {
		return 0, 0, fmt.Errorf("look for processes of %s: %w", spec.Unit, err)
	}
	n, err := fmt.Sscan(string(data), &supervisor, &script)
	if err != nil || n != 2 || supervisor <= 1 || script <= 1 {
		return 0, 0, fmt.Errorf("look for processes of %s: %q are no two numbers", spec.Unit, data)
	}
	return supervisor, script, nil
}

// destroy kills the job and its supervisor, which then leaves no result.
func (u ProcessUnits) destroy(ctx context.Context, spec Spec) error {
	supervisor, _, err := processNumbers(spec)
	if err != nil {
		return err
	}
	effect.Before("kill", strconv.Itoa(supervisor))
	if err := unix.Kill(-supervisor, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill %s: %w", spec.Unit, err)
	}
	return u.Kill(ctx, spec)
}

// KillAll ends every job below a Config's Data and returns when it is gone,
// or ctx is done. It is for the end of a test, after the runner: a job would
// go on writing to a folder that is being removed.
func (u ProcessUnits) KillAll(ctx context.Context, data string) error {
	cfg := Config{Data: data}
	entries, err := os.ReadDir(filepath.Join(cfg.spool(), "jobs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("kill all jobs: %w", err)
	}
	for _, e := range entries {
		spec := Spec{Unit: e.Name(), Result: filepath.Join(cfg.spool(), "jobs", e.Name(), resultName)}
		for {
			alive, err := u.Alive(ctx, spec)
			if err != nil {
				return err
			}
			if !alive {
				break
			}
			if err := u.destroy(ctx, spec); err != nil {
				return err
			}
			if !pause(ctx, 10*time.Millisecond) {
				return fmt.Errorf("kill all jobs: %s is left: %w", e.Name(), context.Cause(ctx))
			}
		}
	}
	return nil
}

// Remembered implements [Units]: nobody knows.
func (ProcessUnits) Remembered(context.Context, Spec) (Result, bool, error) {
	return Result{}, false, nil
}

// Forget implements [Units].
func (ProcessUnits) Forget(context.Context, Spec) error { return nil }
