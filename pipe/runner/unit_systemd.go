package runner

import (
	"bytes"
	"context"
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

// SystemdUnits runs each job as a transient unit of systemd, which gives it a
// control group, limits and a view of the file system of its own.
type SystemdUnits struct {
	Hook string // the program whose "result" command is the stop hook; absolute
}

// slice holds the jobs' units.
const slice = "jobs.slice"

// hookWithin is what the stop hook may take, on a machine that does much else
// under emulation. systemd has one figure for that and for the grace, which
// the runner, therefore, sees to itself; without a runner it is this long. At
// power-off both pass, and have to before the VM is cut off, after 100 s.
const hookWithin = 40 * time.Second

// commandTimeout bounds one call of systemd's tools: minutes on a machine
// that swaps under emulation, never for ever.
const commandTimeout = 2 * time.Minute

// Start implements [Units].
func (u SystemdUnits) Start(ctx context.Context, spec Spec) error {
	_, err := systemd(ctx, "systemd-run", u.arguments(spec)...)
	return err
}

// arguments is the command line of systemd-run. With type exec it returns
// once bash was executed, so that what systemd can't set up is an error here.
func (u SystemdUnits) arguments(spec Spec) []string {
	properties := []string{
		"Slice=" + slice,
		"WorkingDirectory=" + spec.Work,
		"StandardInput=null",
		"StandardOutput=append:" + spec.Log,
		"StandardError=append:" + spec.Log,
		// With "+" it is root, and most of what bars the job is not applied to
		// it. TemporaryFileSystem and BindPaths are, though: they must leave
		// the spool in its place.
		fmt.Sprintf("ExecStopPost=+%s result --file %s", u.Hook, spec.Result),
		"KillMode=control-group",
		fmt.Sprintf("TimeoutStopSec=%dms", max(spec.Grace, hookWithin).Milliseconds()),
		"MemoryAccounting=yes",
		"TasksAccounting=yes",
		"OOMPolicy=kill",
		// As in a shell: systemd would have it ignored.
		"IgnoreSIGPIPE=no",

		"ProtectSystem=strict",
		"ReadWritePaths=" + spec.Dir,
		// Nothing passes from one job to the next by these.
		"TemporaryFileSystem=/dev/shm:mode=1777",
		"BindPaths=" + spec.Temp + ":/tmp",
		"BindPaths=" + spec.Temp + ":/var/tmp",
		"ProtectHome=yes",
		"InaccessiblePaths=" + strings.Join(hidden(spec.Hidden), " "),
		"ProtectProc=invisible",
		"ProtectKernelTunables=yes",
		"ProtectKernelModules=yes",
		"ProtectKernelLogs=yes",
		"ProtectControlGroups=yes",
		"ProtectClock=yes",
		"ProtectHostname=yes",
		"PrivateDevices=yes",
		"NoNewPrivileges=yes",
		"RestrictSUIDSGID=yes",
		"RestrictRealtime=yes",
		"LockPersonality=yes",
		"CapabilityBoundingSet=",
		"RemoveIPC=yes",
	}
	if spec.User != "" {
		properties = append(properties, "User="+spec.User)
	}
	if spec.Memory > 0 {
		// No swap beside it: a job that pages is slower than one that is told.
		properties = append(properties, fmt.Sprintf("MemoryMax=%d", spec.Memory), "MemorySwapMax=0")
	}
	if spec.Timeout > 0 {
		properties = append(properties, fmt.Sprintf("RuntimeMaxSec=%dms", spec.Timeout.Milliseconds()))
	}
	args := []string{
		"--quiet", "--no-ask-password",
		"--unit=" + service(spec), "--service-type=exec",
		"--description=osbuilder " + spec.Unit,
	}
	for _, p := range properties {
		args = append(args, "--property="+p)
	}
	for _, e := range spec.Env {
		args = append(args, "--setenv="+e)
	}
	return append(args, "--", shell(), spec.Script)
}

// hidden makes each path one that may be missing.
func hidden(paths []string) []string {
	all := []string{
		"-/sys/firmware", // fw_cfg: keys
		"-/run/osbuilder/ssh_host_ed25519_key",
		"-/run/osbuilder/authorized_keys",
	}
	for _, p := range paths {
		all = append(all, "-"+p)
	}
	return all
}

// shell is where this system has bash: NixOS has none in /bin.
func shell() string {
	for _, path := range []string{"/bin/bash", "/run/current-system/sw/bin/bash"} {
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return "bash" // systemd looks for it, and names it if there is none
}

func service(spec Spec) string { return spec.Unit + ".service" }

// Alive implements [Units]. The control group answers without a process of
// its own; where there is none, systemd is asked, because a unit that is
// being started has none yet.
func (u SystemdUnits) Alive(ctx context.Context, spec Spec) (bool, error) {
	events, err := os.ReadFile(filepath.Join(cgroups, slice, service(spec), "cgroup.events"))
	if err == nil && bytes.Contains(events, []byte("populated 1")) {
		return true, nil
	}
	// ENODEV: the group was removed between opening and reading.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENODEV) {
		return false, fmt.Errorf("look for processes of %s: %w", spec.Unit, err)
	}
	out, err := systemd(ctx, "systemctl", "show", "--property=ActiveState", "--value", service(spec))
	if err != nil {
		return false, err
	}
	switch state := strings.TrimSpace(out); state {
	case "inactive", "failed":
		return false, nil
	default:
		return true, nil
	}
}

// Stop implements [Units]. All that follows is systemd's: SIGKILL, too, if no
// runner comes before it, and the stop hook.
func (u SystemdUnits) Stop(ctx context.Context, spec Spec) error {
	_, err := systemd(ctx, "systemctl", "stop", "--no-block", service(spec))
	if err == nil {
		return nil
	}
	// One that is gone already is no error, whatever systemctl says of it.
	alive, aliveErr := u.Alive(ctx, spec)
	if aliveErr == nil && !alive {
		return nil
	}
	return errors.Join(err, aliveErr)
}

// Enforce implements [Units].
func (u SystemdUnits) Enforce(ctx context.Context, spec Spec) error {
	out, err := systemd(ctx, "systemctl", "show", "--property=SubState,StateChangeTimestampMonotonic", service(spec))
	if err != nil {
		return err
	}
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return fmt.Errorf("read the time: %w", err)
	}
	if !overdue(out, time.Duration(now.Nano()), spec.Grace) {
		return nil
	}
	return u.Kill(ctx, spec)
}

// overdue reads the properties of a unit: whether it was sent SIGTERM so long
// ago that what is left is to be killed. What is left of one whose stop hook
// runs, or that was sent SIGKILL, is not.
func overdue(shown string, now, grace time.Duration) bool {
	values := make(map[string]string)
	for line := range strings.Lines(shown) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = value
	}
	since, err := strconv.ParseInt(values["StateChangeTimestampMonotonic"], 10, 64)
	return err == nil && values["SubState"] == "stop-sigterm" && now-time.Duration(since)*time.Microsecond >= grace
}

// Kill implements [Units].
func (u SystemdUnits) Kill(ctx context.Context, spec Spec) error {
	_, err := systemd(ctx, "systemctl", "kill", "--kill-whom=all", "--signal=SIGKILL", service(spec))
	return err
}

// Remembered implements [Units]: a unit that failed stays loaded until
// [SystemdUnits.Forget], and to have a stop hook that fails is to fail.
func (u SystemdUnits) Remembered(ctx context.Context, spec Spec) (Result, bool, error) {
	out, err := systemd(ctx, "systemctl", "show", "--property="+rememberedProperties, service(spec))
	if err != nil {
		return Result{}, false, err
	}
	r, ok, err := parseRemembered(out)
	if err != nil {
		return Result{}, false, fmt.Errorf("ask what became of %s: %w", spec.Unit, err)
	}
	if !ok {
		return Result{}, false, nil
	}
	if r.ExitCode != "exited" || r.ExitStatus != "0" {
		// Its exit status is not 0 for any word but "running".
		state, _ := systemd(ctx, "systemctl", "is-system-running")
		r.Stopping = strings.TrimSpace(state) == "stopping"
	}
	return r, true, nil
}

const rememberedProperties = "ActiveState,Result,ExecMainCode,ExecMainStatus,ExecMainExitTimestampMonotonic,MemoryPeak"

// parseRemembered reads the properties of a failed unit. ok is false for any
// other unit, and for one whose main process never ran.
func parseRemembered(text string) (r Result, ok bool, err error) {
	values := make(map[string]string)
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		values[name] = value
	}
	if values["ActiveState"] != "failed" {
		return Result{}, false, nil
	}
	r = Result{ServiceResult: values["Result"], ExitStatus: values["ExecMainStatus"]}
	// The numbers of waitid(2); for a signal the status is its number.
	switch values["ExecMainCode"] {
	case "1":
		r.ExitCode = "exited"
	case "2", "3":
		r.ExitCode = map[string]string{"2": "killed", "3": "dumped"}[values["ExecMainCode"]]
		n, err := strconv.Atoi(r.ExitStatus)
		if err != nil {
			return Result{}, false, fmt.Errorf("read ExecMainStatus: %w", err)
		}
		r.ExitStatus = strings.TrimPrefix(unix.SignalName(unix.Signal(n)), "SIG")
	default:
		return Result{}, false, nil
	}
	exited, err := strconv.ParseInt(values["ExecMainExitTimestampMonotonic"], 10, 64)
	if err != nil {
		return Result{}, false, fmt.Errorf("read ExecMainExitTimestampMonotonic: %w", err)
	}
	r.Uptime = exited * int64(time.Microsecond)                      // a VM is never suspended, so this clock is that of uptime
	r.MemoryPeak, _ = strconv.ParseInt(values["MemoryPeak"], 10, 64) // "[not set]" in some versions
	return r, true, nil
}

// Forget implements [Units].
func (u SystemdUnits) Forget(ctx context.Context, spec Spec) error {
	_, err := systemd(ctx, "systemctl", "reset-failed", service(spec))
	return err
}

// systemd runs one of systemd's tools and returns what it printed. What it
// began is not undone, so a runner that stops lets it come to its end.
func systemd(ctx context.Context, name string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	effect.Before("run", name)
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
