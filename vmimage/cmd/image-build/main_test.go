package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/imagebuild"
)

func run(t *testing.T, env map[string]string, args ...string) (int, string, string) {
	t.Helper()
	t.Chdir(t.TempDir())
	var stdout, stderr bytes.Buffer
	code := command(t.Context(), args, func(name string) string { return env[name] }, &stdout, &stderr)
	return code, stdout.String(), stderr.String()
}

func TestWrongUsage(t *testing.T) {
	drop := t.TempDir()
	env := map[string]string{"OUT": t.TempDir()}
	for _, test := range []struct {
		args []string
		env  map[string]string
		says string
	}{
		{nil, env, "usage:"},
		{[]string{drop, drop}, env, "usage:"},
		{[]string{"-nonsense", drop}, env, "not defined"},
		{[]string{drop}, nil, "$OUT"},
		{[]string{"/no/such/drop"}, env, "no such file"},
		{[]string{"-entry", "../x.nix", drop}, env, "not a file in SOURCE"},
		{[]string{"-name", "a/b", drop}, env, "no file name"},
		{[]string{"-nixpkgs", "junk", drop}, env, "neither a channel"},
	} {
		if code, _, stderr := run(t, test.env, test.args...); code != 2 || !strings.Contains(stderr, test.says) {
			t.Errorf("%q: exit %d, %q, want 2 and %q", test.args, code, stderr, test.says)
		}
	}
	if code, _, stderr := run(t, env, "-h"); code != 0 || !strings.Contains(stderr, "-nixpkgs") {
		t.Errorf("help: exit %d, %q", code, stderr)
	}
}

func TestAFailureIsSaidAndReported(t *testing.T) {
	report := filepath.Join(t.TempDir(), "report")
	env := map[string]string{"OUT": t.TempDir(), "REPORT": report}
	code, stdout, stderr := run(t, env, "-format", "floppy", t.TempDir())
	if code != 1 || stderr != "" || !strings.Contains(stdout, `FAILED (unsupported): unknown format "floppy"`) {
		t.Errorf("exit %d, %q, %q", code, stdout, stderr)
	}
	text, err := os.ReadFile(report)
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Kind  string
		Error explain.Explanation
	}
	if err := json.Unmarshal(text, &got); err != nil || got.Kind != "nixos-image" || got.Error.Class != explain.Unsupported {
		t.Errorf("%v: %s", err, text)
	}
}

func TestALongReportIsShortened(t *testing.T) {
	file := filepath.Join(t.TempDir(), "report")
	lines := make([]string, 50)
	for i := range lines {
		lines[i] = strings.Repeat("x", 8000)
	}
	lines[49] = "the last"
	report := imagebuild.Report{Error: &explain.Explanation{Class: explain.Build, Lines: lines}}
	if err := write(file, report); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(file)
	if err != nil || len(text) > 64<<10 || !bytes.Contains(text, []byte("the last")) {
		t.Errorf("%d bytes, %v", len(text), err)
	}
	if len(report.Error.Lines) != 50 {
		t.Error("the report itself was changed")
	}
}

func TestSystems(t *testing.T) {
	file := filepath.Join(t.TempDir(), "systems")
	if got, err := readSystems(file); err != nil || len(got) != 1 || got[0] != native() {
		t.Errorf("without a file: %q, %v", got, err)
	}
	if err := os.WriteFile(file, []byte(native()+"\nriscv64-linux\n\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if got, err := readSystems(file); err != nil || strings.Join(got, " ") != native()+" riscv64-linux" {
		t.Errorf("got %q, %v", got, err)
	}
}
