package nix_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"osbuilder/vmimage/internal/nix"
)

// script makes a program.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestRunTellsOutputAndMessagesApart(t *testing.T) {
	program := script(t, `echo "out $*"; echo "$EXTRA" >&2; echo '@nix {"action":"msg","level":0,"msg":"error: \u001b[31mbad","raw_msg":"bad"}' >&2; exit 3`)
	var said []string
	r := nix.Runner{Env: []string{"EXTRA=from outside"}, Dir: t.TempDir(), Sink: func(line string) { said = append(said, line) }}
	out, log, err := r.Run(t.Context(), program, "--flag")
	var exit *nix.ExitError
	if !errors.As(err, &exit) || exit.Code != 3 || exit.Signal != 0 || exit.Stopped {
		t.Errorf("error %v", err)
	}
	if got, want := string(out), "out --flag --log-format internal-json\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	if !slices.Equal(said, []string{"from outside"}) {
		t.Errorf("said %q", said)
	}
	if e := log.Errors(); len(e) != 1 || e[0].Message != "error: bad" || e[0].Cause != "bad" {
		t.Errorf("errors %+v", e)
	}
}

func TestRunTellsASignal(t *testing.T) {
	_, _, err := nix.Runner{Sink: func(string) {}}.Run(t.Context(), script(t, "kill -9 $$"))
	var exit *nix.ExitError
	if !errors.As(err, &exit) || exit.Signal != syscall.SIGKILL || exit.Stopped {
		t.Errorf("error %v", err)
	}
}

func TestQueryHasTheMessageInItsError(t *testing.T) {
	r := nix.Runner{}
	if got, err := r.Query(t.Context(), script(t, "echo ' answer '; echo note >&2")); err != nil || got != "answer" {
		t.Errorf("%q, %v", got, err)
	}
	_, err := r.Query(t.Context(), script(t, "echo 'error: no such path' >&2; exit 1"))
	if err == nil || !strings.Contains(err.Error(), "no such path") {
		t.Errorf("error %v", err)
	}
	if _, err := r.Query(t.Context(), "/no/such/program"); err == nil || errors.As(err, new(*nix.ExitError)) {
		t.Errorf("error %v", err)
	}
}

// What a command started ends with it, even what is deaf to SIGTERM.
func TestAStoppedCommandEndsWithAllThatItStarted(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	program := script(t, `
		(trap '' TERM; echo $$ >child.new; mv child.new child; while :; do sleep 0.1; done) &
		echo ready >&2
		wait
	`)
	r := nix.Runner{Dir: dir, Grace: time.Second, Sink: func(line string) {
		if line == "ready" {
			cancel()
		}
	}}
	start := time.Now()
	_, _, err := r.Run(ctx, program)
	var exit *nix.ExitError
	if !errors.As(err, &exit) || !exit.Stopped {
		t.Fatalf("error %v", err)
	}
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("it took %s", d)
	}
	// The pipe is closed only when the last of them is gone, or was killed.
	if left := writers(t, dir); len(left) > 0 {
		t.Errorf("still running: %v", left)
	}
}

// writers are the processes, not yet zombies, whose folder is dir.
func writers(t *testing.T, dir string) []string {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		var found []string
		links, _ := filepath.Glob("/proc/[0-9]*/cwd")
		for _, link := range links {
			if at, err := os.Readlink(link); err == nil && at == dir {
				found = append(found, link)
			}
		}
		if len(found) == 0 || time.Now().After(deadline) {
			return found
		}
		<-time.After(10 * time.Millisecond)
	}
}
