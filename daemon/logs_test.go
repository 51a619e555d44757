package main

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/config"
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

// At its start the sidecar says what this host has, against what the committed
// Compose project gives the VM.
func TestHostIsSaidAtStart(t *testing.T) {
	cfg := config.Config{JobTimeout: time.Hour, Paths: config.Paths{Output: t.TempDir(), State: t.TempDir(), Project: ".."}}
	builders, _, err := config.Builders(t.Context(), cfg.Paths.Project, config.Compose{Files: "compose.yaml", Separator: ":"})
	if err != nil {
		t.Fatal(err)
	}
	builders[0].Environment["RAM_SIZE"] = "900G"
	core, logs := observer.New(zap.InfoLevel)
	sayWorld(cfg, builders, zap.New(core))
	for _, what := range []string{"memory", "cores", "disk of output/", "disk of Docker's volumes", "disk of the VM", "KVM"} {
		if logs.FilterMessage(what).Len() != 1 {
			t.Errorf("%d lines about %s", logs.FilterMessage(what).Len(), what)
		}
	}
	got := logs.FilterMessage("memory").All()[0]
	if set, _ := got.ContextMap()["set"].(string); got.Level != zap.WarnLevel || got.ContextMap()["asked"] != "RAM_SIZE=900G" || !strings.HasPrefix(set, "RAM_SIZE=") {
		t.Errorf("of 900 GiB of memory: %v %v", got.Level, got.ContextMap())
	}
	if asked := logs.FilterMessage("disk of the VM").All()[0].ContextMap()["asked"]; asked != "DISK_SIZE=128G" {
		t.Errorf("the disk asked for: %v", asked)
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
