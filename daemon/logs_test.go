package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/logging"
)

// Standard output is a pipe that nobody reads: the build goes on, build.log has
// every line, and what standard output lacks was counted. Its JSON has the keys
// that are documented.
func TestStalledLogStallsNoBuild(t *testing.T) {
	s := newSidecar(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log, output, err := logging.New(logging.Options{Format: logging.JSON, Level: "info"}, w)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	logged := make(chan error, 1)
	go func() { logged <- output.Run(ctx) }()

	stop := s.startWith(log)
	const lines = 700 // of 7,000 bytes: more than a pipe and the daemon's queue hold
	s.drop("loud.sh", "line=$(printf '%07000d' 0)\nfor ((i = 0; i < 700; i++)); do echo \"$line\"; done\necho image >\"$OUT/loud.iso\"\n")
	status, text, _ := s.outcome("loud")
	if want := strings.Repeat(strings.Repeat("0", 7000)+"\n", lines); status != "succeeded" || text != want {
		t.Errorf("status %s, build.log has %d bytes, want %d", status, len(text), len(want))
	}
	read := make(chan []byte, 1)
	go func() {
		all, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		read <- all
	}()
	stop()
	cancel()
	if err := <-logged; err != nil {
		t.Fatal(err)
	}
	w.Close()

	documented := documentedKeys(t)
	written, dropped := 0, 0
	for line := range bytes.Lines(<-read) {
		object := checkKeys(t, documented, line)
		if n, ok := object["dropped"].(float64); ok {
			dropped += int(n)
		}
		if object["line"] != nil {
			written++
		}
	}
	if dropped == 0 || written == 0 || written+dropped < lines {
		t.Errorf("%d lines written and %d dropped of %d", written, dropped, lines)
	}
}

// What a build prints reaches standard output as text, in every form of the log.
func TestControlCharactersOfABuild(t *testing.T) {
	for _, o := range []logging.Options{{Format: logging.Console, Level: "info", Color: true}, {Format: logging.JSON, Level: "info"}} {
		t.Run(o.Format, func(t *testing.T) {
			s := newSidecar(t)
			var out bytes.Buffer
			log, output, err := logging.New(o, &out)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			logged := make(chan error, 1)
			go func() { logged <- output.Run(ctx) }()
			seen, logs := observer.New(zap.InfoLevel)
			stop := s.startWith(log.WithOptions(zap.WrapCore(func(c zapcore.Core) zapcore.Core { return zapcore.NewTee(c, seen) })))
			const said = `\033[2J\033]0;title\007\033[31mred\033[0m\b\r\0\x7f\xc2\x9b\xe2\x80\xae\xff\033`
			s.drop("rude.sh", "printf '"+said+"\\n'\nprintf '"+said+"' >\"$OUT/x.iso\"\nexit 3\n")
			status, text, _ := s.outcome("rude")
			s.until("closing line", func() bool { return logs.FilterMessage("job is failed").Len() > 0 })
			stop()
			cancel()
			if err := <-logged; err != nil {
				t.Fatal(err)
			}
			if status != "failed" || !strings.HasPrefix(text, "\x1b[2J") {
				t.Errorf("status %s, build.log %q", status, text)
			}
			shown := out.String()
			for _, color := range []string{"36", "32", "35", "34", "96", "92", "95", "94", "31", "33", "0"} { // ours
				shown = strings.ReplaceAll(shown, "\x1b["+color+"m", "")
			}
			if !strings.Contains(shown, "red") || strings.ContainsAny(shown, "\x1b\b\r\x00\x7f\u009b\u202e") || !strings.Contains(shown, "job is failed") {
				t.Errorf("standard output has %q", shown)
			}
		})
	}
}

// The last line of a job that did not succeed says why, what to do, how it
// ended and how long it ran, as its result does.
func TestClosingLine(t *testing.T) {
	s := newSidecar(t)
	stop := s.start()
	defer stop()
	closing := func(message, name string) map[string]any {
		t.Helper()
		s.until(message, func() bool { return s.logs.FilterMessage(message).Len() > 0 })
		said := s.logs.FilterMessage(message).All()[0].ContextMap()
		_, _, folder := s.outcome(name)
		r := result(t, folder)
		want := map[string]any{"job": name, "id": string(r.Job), "reason": r.Reason, "duration": time.Duration(r.Duration) * time.Millisecond}
		if r.ExitCode != nil {
			want["exit_code"] = int64(*r.ExitCode)
		}
		for key := range want {
			if diff := cmp.Diff(want[key], said[key]); diff != "" {
				t.Errorf("%s: %s (-result +said): %s", message, key, diff)
			}
		}
		if output, _ := said["output"].(string); filepath.Base(output) != filepath.Base(folder) || said["after"] == nil || said["duration"] == time.Duration(0) {
			t.Errorf("%s: %v", message, said)
		}
		return said
	}
	s.drop("host.nix", "{ broken }\n")
	failed := closing("job is failed", "host")
	if failed["reason"] != "undefined variable broken (at host.nix:1:1)" || failed["advice"] != "Define it." || failed["exit_code"] != int64(1) {
		t.Errorf("of the one that failed it says %v", failed)
	}
	s.runEndless("endless")
	s.must("cancel", "endless", "--reason", "not wanted")
	if cancelled := closing("job is cancelled", "endless"); cancelled["reason"] != "not wanted" {
		t.Errorf("of the one that was cancelled it says %v", cancelled)
	}
}

// worldLines are what the program says of this host, in this order.
var worldLines = []string{"memory", "cores", "disk of output/", "disk of Docker's volumes", "disk of the VM", "KVM"}

// At its start the sidecar says what this host has, against what the committed
// Compose project gives the VM.
func TestHostIsSaidAtStart(t *testing.T) {
	dirs := folders(t)
	if _, stderr, code := program(t, mine, append([]string{"init"}, dirs...)...); code != 0 {
		t.Fatal(stderr)
	}
	// What comes after those lines ends it.
	state := t.TempDir()
	if err := os.Mkdir(filepath.Join(state, database), 0o755); err != nil {
		t.Fatal(err)
	}
	stdout, stderr, code := program(t, append([]string{"LOG_FORMAT=json", "RAM_SIZE=90000G"}, mine...), append([]string{"run"}, append(dirs, "--state", state)...)...)
	if code != exitFailed || !strings.Contains(stderr, database) {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	var said []string
	lines := map[string]map[string]any{}
	for line := range strings.Lines(stdout) {
		object := checkKeys(t, documentedKeys(t), []byte(line))
		if object["logger"] == "preflight" {
			message := fmt.Sprint(object["message"])
			said, lines[message] = append(said, message), object
		}
	}
	if diff := cmp.Diff(worldLines, said); diff != "" {
		t.Errorf("lines about this host (-want +got):\n%s", diff)
	}
	memory := lines["memory"]
	if set, _ := memory["set"].(string); memory["level"] != "warn" || memory["asked"] != "RAM_SIZE=90000G" || !strings.HasPrefix(set, "RAM_SIZE=") || memory["has"] == nil || memory["then"] == nil {
		t.Errorf("of more memory than there is: %v", memory)
	}
	if asked := lines["disk of the VM"]["asked"]; asked != "DISK_SIZE=128G" {
		t.Errorf("the disk asked for: %v", asked)
	}
}

// So does the command, in words.
func TestPreflight(t *testing.T) {
	stdout, stderr, code := program(t, []string{"RAM_SIZE=90000G"}, append([]string{"preflight"}, folders(t)...)...)
	if code != 0 || stderr != "" {
		t.Errorf("exit code %d: %s", code, stderr)
	}
	var said []string
	for line := range strings.Lines(stdout) {
		for _, what := range worldLines {
			if strings.HasPrefix(line, "    "+what+" ") {
				said = append(said, what)
			}
		}
	}
	if diff := cmp.Diff(worldLines, said); diff != "" {
		t.Errorf("lines about this host (-want +got):\n%s\n%s", diff, stdout)
	}
	for _, want := range []string{"asked for: RAM_SIZE=90000G", "asked for: DISK_SIZE=128G", "in .env"} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is not in:\n%s", want, stdout)
		}
	}
}

// A terminal is told from what a container has.
func TestNoTerminal(t *testing.T) {
	file, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if logging.IsTerminal(file) || logging.IsTerminal(io.Discard) {
		t.Error("a file is taken for a terminal")
	}
}
