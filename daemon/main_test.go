package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/hint"
)

// The test's own binary is the program, or one that never stops, when it is
// called so.
const (
	asProgram = "be-osbuilder"
	asHanging = "be-hanging"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == asProgram {
		os.Exit(start(os.Args[2:], os.Stdout, os.Stderr))
	}
	if len(os.Args) > 1 && os.Args[1] == asHanging {
		hang()
	}
	if len(os.Args) > 1 && os.Args[1] == asMortal {
		os.Exit(beMortal())
	}
	os.Exit(m.Run())
}

func program(t *testing.T, env []string, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{asProgram}, args...)...)
	cmd.Env = append([]string{"PATH=/none"}, env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		if exit := new(exec.ExitError); !errors.As(err, &exit) {
			t.Fatal(err)
		}
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

func TestCommandLine(t *testing.T) {
	for _, tt := range []struct {
		name   string
		env    []string
		args   []string
		code   int
		stdout string
		stderr []string
	}{
		{"version", nil, []string{"version"}, 0, "osbuilder 0.1.0\n", nil},
		{"unknown command", nil, []string{"fly"}, exitUsage, "", []string{`unknown command "fly"`, "hint: osbuilder --help"}},
		{"unknown flag", nil, []string{"run", "--fly"}, exitUsage, "", []string{"unknown flag: --fly"}},
		{"an argument too many", nil, []string{"run", "fly"}, exitUsage, "", []string{`"fly"`}},
		{"settings", []string{"SETTLE=x", "LOG_LEVEL=y"}, []string{"run"}, exitUsage, "", []string{"SETTLE=x", "LOG_LEVEL=y", "hint: Correct them in .env"}},
		{"settings of init", []string{"PUID=x"}, []string{"init"}, exitUsage, "", []string{"PUID=x"}},
		{"no project", nil, []string{"init", "--project", "/none"}, exitUsage, "", []string{"/none", "hint: Mount"}},
		{"no daemon", nil, []string{"healthcheck", "--health", "/none"}, exitFailed, "", []string{"ask the daemon", "hint: The daemon does not run"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			stdout, stderr, code := program(t, tt.env, tt.args...)
			if code != tt.code || stdout != tt.stdout {
				t.Errorf("exit code %d, stdout %q, stderr %q", code, stdout, stderr)
			}
			for _, want := range tt.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("%q is not in %q", want, stderr)
				}
			}
			if lines := strings.Count(stderr, "\n"); lines > 6 {
				t.Errorf("too many words: %s", stderr)
			}
		})
	}
}

// With LOG_FORMAT=json the sidecar's last words are an object, too, whatever
// ends it; the commands for people go on in words.
func TestLastWordsAsJSON(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for name, tt := range map[string]struct {
		env  []string
		args []string
		code int
		want []string // of the error and the hint; empty: it is in words
	}{
		"settings":          {[]string{"SETTLE=x", "LOG_LEVEL=y"}, []string{"run"}, exitUsage, []string{"SETTLE=x", "LOG_LEVEL=y", "Correct them in .env"}},
		"no project":        {nil, []string{"run", "--project", none}, exitUsage, []string{none, "Mount"}},
		"no keys":           {nil, []string{"run", "--project", "..", "--keys", none}, exitFailed, []string{"read the sidecar's key: open " + none, "docker compose up init"}},
		"a command":         {nil, []string{"jobs", "--control", none}, exitFailed, nil},
		"settings of init":  {[]string{"PUID=x"}, []string{"init"}, exitUsage, nil},
		"preflight":         {[]string{"SETTLE=x"}, []string{"preflight"}, exitUsage, nil},
		"a form that isn't": {[]string{"LOG_FORMAT=JSON"}, []string{"run"}, exitUsage, nil},
	} {
		t.Run(name, func(t *testing.T) {
			stdout, stderr, code := program(t, append([]string{"LOG_FORMAT=json"}, tt.env...), tt.args...)
			if code != tt.code || stdout != "" {
				t.Errorf("exit code %d, want %d; stdout %q", code, tt.code, stdout)
			}
			if tt.want == nil {
				if !strings.HasPrefix(stderr, "osbuilder: ") {
					t.Errorf("it says %q", stderr)
				}
				return
			}
			line := checkKeys(t, documentedKeys(t), []byte(stderr))
			if line["level"] != "error" || line["message"] != "the sidecar can't go on" || line["time"] == nil {
				t.Errorf("it says %s", stderr)
			}
			for _, want := range tt.want {
				if !strings.Contains(fmt.Sprint(line["error"], line["hint"]), want) {
					t.Errorf("%q is not in %s", want, stderr)
				}
			}
		})
	}
}

func TestHelpHidesPaths(t *testing.T) {
	stdout, _, code := program(t, nil, "--help")
	if code != 0 || !strings.Contains(stdout, "healthcheck") || strings.Contains(stdout, "vm-keys") {
		t.Errorf("exit code %d: %s", code, stdout)
	}
}

// mine has this user own what the program writes.
var mine = []string{fmt.Sprintf("PUID=%d", os.Getuid()), fmt.Sprintf("PGID=%d", os.Getgid())}

// folders makes those that compose.yaml mounts, and returns the flags that tell
// the program of them.
func folders(t *testing.T) (flags []string) {
	t.Helper()
	dir := t.TempDir()
	flags = []string{"--project", "..", "--keys", filepath.Join(dir, "client-keys")}
	for _, name := range []string{"jobs", "output", "state", "client-keys", "vm-keys"} {
		path := filepath.Join(dir, name)
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
		flags = append(flags, "--"+name, path)
	}
	return flags
}

func TestInit(t *testing.T) {
	dirs := folders(t)
	dir := filepath.Dir(dirs[len(dirs)-1])
	args := append([]string{"init"}, dirs...)
	stdout, stderr, code := program(t, mine, args...)
	if code != 0 || !strings.Contains(stdout, "made the key") {
		t.Fatalf("exit code %d: %s%s", code, stdout, stderr)
	}
	for _, file := range []string{"client-keys/id_ed25519", "client-keys/known_hosts", "vm-keys/vm/ssh_host_ed25519_key", "vm-keys/vm/authorized_keys", "jobs/rejected"} {
		if _, err := os.Stat(filepath.Join(dir, file)); err != nil {
			t.Error(err)
		}
	}
	if stdout, stderr, code = program(t, mine, args...); code != 0 || stdout != "keys and folders are ready\n" {
		t.Errorf("again: exit code %d: %s%s", code, stdout, stderr)
	}
}

func TestExplain(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		code int
		want string
	}{
		{"nothing", nil, 0, ""},
		{"a stop that was asked for", fmt.Errorf("follow: %w", context.Canceled), 0, ""},
		{"a stop in two places", errors.Join(context.Canceled, fmt.Errorf("x: %w", context.Canceled)), 0, ""},
		{"a failure while stopping", errors.Join(context.Canceled, errors.New("disk full")), 1, "osbuilder: context canceled\ndisk full\n"},
		{"a failure", errors.New("disk full"), 1, "osbuilder: disk full\n"},
		{"a hint", fmt.Errorf("a: %w", hint.With(errors.New("b"), "Do c.")), 1, "osbuilder: a: b\nhint: Do c.\n"},
		{"what others wrote", errors.New("a\x1b[2J\nb\u009b"), 1, "osbuilder: a\nb\\u009b\n"},
		{"settings", fmt.Errorf("%w: x", config.ErrSettings), 2, "osbuilder: the settings have mistakes: x\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var b bytes.Buffer
			if code := explain(&b, tt.err); code != tt.code || b.String() != tt.want {
				t.Errorf("exit code %d, %q", code, b.String())
			}
		})
	}
}

// A program that does not stop in order is ended by the second signal.
func TestSignals(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0], asHanging)
	stdin, err := cmd.StdinPipe() // open, so that the child hangs
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	lines := bufio.NewScanner(stdout)
	for _, step := range []struct {
		says   string
		signal os.Signal
	}{{"up", syscall.SIGINT}, {"stopping", syscall.SIGTERM}} {
		if !lines.Scan() || lines.Text() != step.says {
			t.Fatalf("it says %q, want %q", lines.Text(), step.says)
		}
		if err := cmd.Process.Signal(step.signal); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != exitAtOnce {
		t.Errorf("it ended with %v", err)
	}
}

func hang() {
	ctx, cancel := untilSignal(context.Background()) //nolint:forbidigo // this is a program of its own
	defer cancel()
	fmt.Fprintln(os.Stdout, "up")
	<-ctx.Done()
	fmt.Fprintln(os.Stdout, "stopping")
	_, _ = io.Copy(io.Discard, os.Stdin)
}
