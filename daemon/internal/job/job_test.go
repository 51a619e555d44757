package job

import (
	"math"
	"regexp"
	"strings"
	"testing"
	"time"

	"osbuilder/pipe"
)

func TestNewID(t *testing.T) {
	now := time.Date(2026, 11, 23, 14, 5, 1, 0, time.FixedZone("CET", 3600))
	for _, tt := range []struct {
		random uint64
		want   ID
	}{
		{0, "20261123-130501-000000"},
		{32, "20261123-130501-010000"},
	} {
		got := NewID(now, tt.random)
		if got != tt.want {
			t.Errorf("NewID(%d) = %s, want %s", tt.random, got, tt.want)
		}
		if !pipe.ValidID(string(got)) {
			t.Errorf("%s can't be sent through the pipe", got)
		}
	}
	if a, b := NewID(now, math.MaxUint64), NewID(now.Add(time.Second), 0); a >= b {
		t.Errorf("%s sorts after %s, which is younger", a, b)
	}
}

func TestOutputName(t *testing.T) {
	for drop, want := range map[string]string{
		"hello-iso.sh":           "hello-iso",
		"my image.v2.sh":         "my-image.v2",
		"../../etc/passwd.sh":    "etc-passwd",
		".sh":                    "sh",
		"...":                    "job",
		"ü.sh":                   "job",
		"a\nb.sh":                "a-b",
		"-rf.sh":                 "rf",
		strings.Repeat("x", 300): strings.Repeat("x", 64),
		"":                       "job",
		"latest.sh":              "latest",
	} {
		if got := OutputName(drop); got != want {
			t.Errorf("OutputName(%q) = %q, want %q", drop, got, want)
		}
	}
}

var safeName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$`)

func FuzzOutputName(f *testing.F) {
	for _, s := range []string{"hello.sh", "..", "a/b", "\x00", "名前.sh", strings.Repeat("é", 100), "--x"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, drop string) {
		if got := OutputName(drop); !safeName.MatchString(got) || strings.Contains(got, "/") {
			t.Errorf("OutputName(%q) = %q", drop, got)
		}
	})
}

// The higher priority first, then the older; IDs of one second tell nothing.
func TestBefore(t *testing.T) {
	now := time.Date(2026, 11, 23, 14, 5, 1, 0, time.UTC)
	jobs := []Job{
		{ID: "z", Priority: 3, Created: now.Add(time.Hour)},
		{ID: "c", Created: now},
		{ID: "b", Created: now.Add(time.Millisecond)},
		{ID: "d", Created: now.Add(time.Millisecond)},
		{ID: "a", Priority: -1, Created: now.Add(-time.Hour)},
	}
	for i, a := range jobs {
		for k, b := range jobs {
			if got := a.Before(b); got != (i < k) {
				t.Errorf("%s before %s: %t", a.ID, b.ID, got)
			}
		}
	}
	if Youngest(jobs[0], jobs[1]) != -1 || Youngest(jobs[1], jobs[0]) != 1 || Youngest(jobs[1], jobs[1]) != 0 {
		t.Error("the youngest is not the one made last")
	}
}

func TestMade(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.FixedZone("", 3600))
	if at, ok := NewID(now, 7).Made(); !ok || !at.Equal(now.Truncate(time.Second)) {
		t.Errorf("made %v, %t, want %v", at, ok, now)
	}
	for _, id := range []ID{"", "20260102-030405", "20261302-030405-aaaaaa", "a-name-of-somebody-s"} {
		if at, ok := id.Made(); ok {
			t.Errorf("%q was made %v", id, at)
		}
	}
}
