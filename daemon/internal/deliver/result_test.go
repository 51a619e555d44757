package deliver

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func TestLastLines(t *testing.T) {
	var many strings.Builder
	for i := range 30 {
		fmt.Fprintf(&many, "line %d\n", i)
	}
	tests := []struct {
		name, log string
		want      []string
	}{
		{"empty", "", []string{}},
		{"no newline at the end", "one\ntwo", []string{"one", "two"}},
		{"more than wanted", many.String(), []string{"line 27", "line 28", "line 29"}},
		{"blank lines stay", "a\n\nb\n", []string{"a", "", "b"}},
		{"colours", "\x1b[1;31merror:\x1b[0m x\n", []string{"error: x"}},
		{"title and link", "\x1b]0;title\x07a\x1b]8;;http://x\x1b\\b\n", []string{"ab"}},
		{"progress", "10%\r50%\r100%\r\n", []string{"100%"}},
		{"control characters", "a\x00b\x08c\x7fd\u0085e\u202ef\tg\n", []string{"abcdef\tg"}},
		{"not UTF-8", "gr\xfc\xdfe\n", []string{"gr\ufffd\ufffde"}},
		{"cut escape", "a\x1b[\nb\x1b\n\x1bü\n", []string{"a", "b", "ü"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "build.log")
			if err := os.WriteFile(path, []byte(tt.log), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := LastLines(path, 3)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("lines (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLastLinesReadsNoMoreThanTheTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "build.log")
	if err := os.WriteFile(path, []byte(strings.Repeat("ü", tailBytes)+"\nlast\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := LastLines(path, 20); err != nil || len(got) != 1 || got[0] != "last" {
		t.Errorf("%d lines, %v", len(got), err)
	}
	if got, err := LastLines(filepath.Join(t.TempDir(), "absent"), 20); err != nil || len(got) != 0 {
		t.Errorf("of an absent log: %q, %v", got, err)
	}
}

func FuzzPrintable(f *testing.F) {
	for _, seed := range []string{"", "\x1b", "\x1b[31mx", "\x1b]0;t\x07", "a\rb", "\xff\xfe", "\x1bü"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		got := printable(line)
		if !utf8.ValidString(got) || strings.ContainsAny(got, "\x00\x07\x08\n\r\x1b\x7f") {
			t.Errorf("%q became %q", line, got)
		}
		if len(got) > 3*len(line) {
			t.Errorf("%d bytes became %d", len(line), len(got))
		}
	})
}

// What a job's program reports goes into result.json, and explains a failure.
func TestResultWithAReport(t *testing.T) {
	report := pipe.Report(`{"kind":"nixos-image","nix":"2.26.3","nixpkgs":{"revision":"0123","hash":"sha256-x"},"closure_bytes":7,` +
		`"error":{"class":"evaluation","summary":"undefined variable 'x'","at":"host.nix:3:5","advice":"Define it."}}`)
	for name, tc := range map[string]struct {
		finished           pipe.Finished
		reason, at, advice string
	}{
		"failed":    {pipe.Finished{Status: pipe.StatusFailed, Report: report}, "undefined variable 'x' (at host.nix:3:5)", "host.nix:3:5", "Define it."},
		"timeout":   {pipe.Finished{Status: pipe.StatusTimeout, Reason: "it ran longer than 1h", Report: report}, "it ran longer than 1h", "host.nix:3:5", "Define it."},
		"succeeded": {pipe.Finished{Status: pipe.StatusSucceeded, Report: report}, "", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			inputs, target := &job.Inputs{SHA256: "ab", Size: 5}, &job.NixOS{Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05"}
			data, err := result(job.Job{ID: "j", Result: &tc.finished, Inputs: inputs, NixOS: target, Image: "nixos-1", Runner: "0.2"}, nil, filepath.Join(t.TempDir(), "absent"))
			if err != nil {
				t.Fatal(err)
			}
			var got Result
			if err := json.Unmarshal(data, &got); err != nil {
				t.Fatal(err)
			}
			if got.Reason != tc.reason || got.At != tc.at || got.Advice != tc.advice {
				t.Errorf("reason %q, at %q, advice %q", got.Reason, got.At, got.Advice)
			}
			if diff := cmp.Diff(Versions{Sidecar: pipe.Release, Runner: "0.2", Nix: "2.26.3"}, got.Versions); diff != "" {
				t.Errorf("versions (-want +got):\n%s", diff)
			}
			if string(got.Report) != string(report) || *got.Inputs != *inputs || *got.NixOS != *target || got.Image != "nixos-1" {
				t.Errorf("result.json:\n%s", data)
			}
		})
	}
}
