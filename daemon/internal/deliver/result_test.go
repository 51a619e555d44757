package deliver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
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
