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

// Start implements [Units]. It returns when the supervisor holds its lock.
func (ProcessUnits) Start(ctx context.Context, spec Spec) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
	defer cancel()
	// A new session, and a parent that is gone: the unit is not the runner's
	// child, so the runner neither takes it along nor has to wait for it.
	cmd := exec.CommandContext(ctx, "setsid", "--fork", "bash", "-c", supervisor, spec.Unit,
		processLock(spec), spec.Script, spec.Log, spec.Result, strconv.FormatInt(int64(spec.Timeout/time.Second), 10), spec.Work)
	cmd.Env = spec.Env
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
// didn't close it. It holds their process group's number.
func processLock(spec Spec) string {
	return filepath.Join(filepath.Dir(spec.Result), "process")
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
	return false, nil
}

// Kill implements [Units]. It reaches the job's process group; one that left
// it and kept the lock stays alive.
func (ProcessUnits) Kill(_ context.Context, spec Spec) error {
	data, err := readBounded(processLock(spec), maxResult)
	if err != nil {
		return fmt.Errorf("kill %s: %w", spec.Unit, err)
	}
	for field := range strings.FieldsSeq(string(data)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid <= 1 {
			return fmt.Errorf("kill %s: process group %q", spec.Unit, field)
		}
		effect.Before("kill", field)
		if err := unix.Kill(-pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill %s: %w", spec.Unit, err)
		}
	}
	return nil
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
			if err := u.Kill(ctx, spec); err != nil {
				return err
			}
			if !pause(ctx, 10*time.Millisecond) {
				return fmt.Errorf("kill all jobs: %s is left: %w", e.Name(), context.Cause(ctx))
			}
		}
	}
	return nil
}
