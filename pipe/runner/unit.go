package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// Units starts jobs as processes that outlive the runner. A unit leaves a
// [Result] in [Spec.Result], by rename, before it is gone.
type Units interface {
	// Start returns once the job's process runs. After an error the unit may
	// still be there; Alive tells.
	Start(ctx context.Context, spec Spec) error
	// Alive reports whether any process of the unit is left.
	Alive(ctx context.Context, spec Spec) (bool, error)
	// Stop begins to end the unit, and doesn't wait for it: every process of
	// it is sent SIGTERM, and SIGKILL when [Spec.Grace] is over. That goes on
	// when the runner dies, and asking again does no harm.
	Stop(ctx context.Context, spec Spec) error
	// Enforce kills what is left of a unit that is being ended if the grace is
	// over. One that runs on, and a stop hook, it leaves alone.
	Enforce(ctx context.Context, spec Spec) error
	// Kill sends SIGKILL to every process of the unit.
	Kill(ctx context.Context, spec Spec) error
	// Remembered is how a unit ended that left no result: its disk was full,
	// or the machine so busy that the stop hook ran out of time. ok is false
	// where nobody knows.
	Remembered(ctx context.Context, spec Spec) (r Result, ok bool, err error)
	// Forget gives up what is kept for Remembered.
	Forget(ctx context.Context, spec Spec) error
}

// Spec is all that a unit needs to know. The paths are absolute.
type Spec struct {
	Unit    string        // its name, without a suffix
	User    string        // empty: the runner's
	Script  string        // what bash reads
	Dir     string        // the job's own folder; the only one it may write to
	Work    string        // where the script starts
	Temp    string        // is /tmp and /var/tmp
	Hidden  []string      // folders of the runner that the job must not reach
	Log     string        // exists; output is appended to it
	Ran     string        // the marker, for the stop hook
	Result  string        // where the stop hook leaves the result
	Timeout time.Duration // 0 is none; when it is over the unit is ended as by Stop
	Grace   time.Duration // between SIGTERM and SIGKILL
	Memory  int64         // what its processes may hold in all, in bytes
	Env     []string      // NAME=value
}

// A Result is what a unit's stop hook saw. The first three are systemd's
// variables of the same names, see systemd.exec(5).
type Result struct {
	ServiceResult string `json:"service_result"` // success, exit-code, signal, core-dump, timeout, oom-kill, …
	ExitCode      string `json:"exit_code"`      // exited, killed, dumped
	ExitStatus    string `json:"exit_status"`    // a number, or a signal's name without SIG
	MemoryPeak    int64  `json:"memory_peak"`    // bytes; 0 where unknown
	Uptime        int64  `json:"uptime_ns"`      // CLOCK_BOOTTIME: no clock that is set in between
	// Stopping: the VM was on its way down. Whatever the script made of that,
	// unless it succeeded, is not its own failure.
	Stopping bool `json:"stopping,omitempty"`
	// DiskFull: the data disk was, as the unit ended. What the script had to
	// say of that may not have found room either.
	DiskFull bool `json:"disk_full,omitempty"`
}

// fullBelow is how much room on the data disk, in bytes, is none.
const fullBelow = 1 << 20

// maxResult bounds result and marker, in bytes.
const maxResult = 4 << 10

// uptime is CLOCK_BOOTTIME in nanoseconds.
func uptime() (int64, error) {
	var t unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &t); err != nil {
		return 0, fmt.Errorf("read the time since boot: %w", err)
	}
	return t.Nano(), nil
}

// parseResult reads what a stop hook wrote.
func parseResult(data []byte) (Result, error) {
	var r Result
	if err := json.Unmarshal(data, &r); err != nil {
		return Result{}, fmt.Errorf("parse result: %w", err)
	}
	if r.ServiceResult == "" || r.MemoryPeak < 0 || r.Uptime < 0 {
		return Result{}, fmt.Errorf("parse result: %q, peak %d, uptime %d", r.ServiceResult, r.MemoryPeak, r.Uptime)
	}
	return r, nil
}

// finished translates a result. The artifacts and the log's length are not
// its business.
func (r Result) finished(ran marker, timeout time.Duration) pipe.Finished {
	f := pipe.Finished{Status: pipe.StatusFailed}
	if ran.Uptime > 0 && r.Uptime > ran.Uptime {
		f.Duration = (r.Uptime - ran.Uptime) / int64(time.Millisecond)
	}
	if r.MemoryPeak > 0 {
		f.Memory, f.Scope = r.MemoryPeak, "unit"
	}
	code, codeErr := strconv.Atoi(r.ExitStatus)
	succeeded := r.ExitCode == "exited" && codeErr == nil && code == 0
	switch {
	case r.Stopping && !succeeded:
		f.Status, f.Reason = pipe.StatusInterrupted, "the VM was shut down while it ran"
	case r.ServiceResult == "oom-kill":
		f.Reason = outOfMemory(r.MemoryPeak, ran.Memory)
	case r.ServiceResult == "timeout" && timeout > 0 && r.Uptime-ran.Uptime >= int64(timeout):
		// The same word stands for leftovers that had to be killed after the
		// script was through, so the time decides.
		f.Status = pipe.StatusTimeout
		f.Reason = fmt.Sprintf("it ran longer than %s", timeout)
	case r.ExitCode == "exited" && codeErr == nil:
		f.ExitCode = &code
		if code == 0 {
			f.Status = pipe.StatusSucceeded
		}
	case (r.ExitCode == "killed" || r.ExitCode == "dumped") && r.ExitStatus != "":
		f.Signal = "SIG" + strings.TrimPrefix(r.ExitStatus, "SIG")
	default:
		f.Reason = fmt.Sprintf("it ended with %s (%s %s)", r.ServiceResult, r.ExitCode, r.ExitStatus)
	}
	return f
}

// outOfMemory says what was short, how much of it, and what to do.
func outOfMemory(peak, limit int64) string {
	const mib = 1 << 20
	// The kernel reclaims what it can before it kills, so the peak is the
	// limit, or close to it.
	if limit > 0 && peak >= limit-limit/16 {
		return fmt.Sprintf("out of memory: it was killed at its limit of %d MiB; give the VM more RAM_SIZE, of which each job gets a part, "+
			"or the job less to do at once", limit/mib)
	}
	held := ""
	if peak > 0 {
		held = fmt.Sprintf(" when it held %d MiB", peak/mib)
	}
	return "out of memory: it was killed" + held + ", because the VM had no more; give the VM more RAM_SIZE, " +
		"let fewer jobs run at once (SLOTS), or give the job less to do at once"
}

// WriteResult is the stop hook: it records at path what systemd says in the
// environment, which getenv reads, the unit's peak of memory, whether the VM is
// on its way down, and whether its data disk is full. What the job wrote is synced first.
func WriteResult(path string, getenv func(string) string, stopping func() bool) error {
	r := Result{
		ServiceResult: getenv("SERVICE_RESULT"),
		ExitCode:      getenv("EXIT_CODE"),
		ExitStatus:    getenv("EXIT_STATUS"),
	}
	if r.ServiceResult == "" {
		return errors.New("write result: SERVICE_RESULT is not set: this is a unit's ExecStopPost, not a command for people")
	}
	// A unit that is stopped counts as a success, so it is the script that tells.
	if r.ExitCode != "exited" || r.ExitStatus != "0" {
		r.Stopping = stopping()
	}
	// A peak that can't be read is worth less than the result.
	r.MemoryPeak, _ = memoryPeak("/proc/self/cgroup", cgroups)
	// Nor is it worth less for not knowing this.
	if free, err := freeBytes(filepath.Dir(path)); err == nil {
		r.DiskFull = free < fullBelow
	}
	var err error
	if r.Uptime, err = uptime(); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	// Who finds the result after a reset goes by it: so the output, $OUT and
	// what it leads to in the Nix store must not be younger on disk.
	if err := syncFileSystem(filepath.Dir(path)); err != nil {
		return fmt.Errorf("write result: %w", err)
	}
	return disk{}.write(path, append(data, '\n'))
}

// cgroups is where the kernel shows the unified hierarchy.
const cgroups = "/sys/fs/cgroup"

// memoryPeak reads the peak of the control group that the file self names.
// The stop hook runs in the group of its unit.
func memoryPeak(self, root string) (int64, error) {
	data, err := os.ReadFile(self)
	if err != nil {
		return 0, fmt.Errorf("read memory peak: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		group, ok := strings.CutPrefix(strings.TrimSpace(line), "0::")
		if !ok {
			continue
		}
		peak, err := os.ReadFile(filepath.Join(root, group, "memory.peak"))
		if err != nil {
			return 0, fmt.Errorf("read memory peak: %w", err)
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(peak)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read memory peak: %w", err)
		}
		return n, nil
	}
	return 0, fmt.Errorf("read memory peak: %w: no unified group in %s", fs.ErrNotExist, self)
}

// readBounded reads a small file; a larger one is an error.
func readBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, limit)
}

// readForeign is readBounded of what somebody else may have put there: no link
// is followed, and no pipe or device waited for.
func readForeign(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: it is no regular file", path)
	}
	return readAll(f, limit)
}

func readAll(f *os.File, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(data)) > limit {
		return nil, fmt.Errorf("read %s: larger than %d bytes", f.Name(), limit)
	}
	return data, nil
}
