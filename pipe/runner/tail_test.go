package runner

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"osbuilder/pipe"
)

func TestSplitRune(t *testing.T) {
	for s, want := range map[string]int{
		"abc": 0, "aä": 0, "a\xc3": 1, "a€": 0, "a\xe2\x82": 2, "a\xf0\x9f\x98": 3, "a\xff": 0, "\xc3": 0, "a\x80": 0, "": 0,
	} {
		if got := splitRune([]byte(s)); got != want {
			t.Errorf("splitRune(%q) = %d, want %d", s, got, want)
		}
	}
}

func TestBinaryOutput(t *testing.T) {
	m := boot(t)
	m.submit("j", `for i in {0..255}; do printf "\\x$(printf %x $i)"; done`)
	f := m.finished("j")
	var want []byte
	for i := range 256 {
		want = append(want, byte(i))
	}
	if got := m.output("j"); !bytes.Equal([]byte(got), want) || f.LogLength != 256 {
		t.Errorf("output %q, length %d", got, f.LogLength)
	}
}

func TestLongLine(t *testing.T) {
	m := boot(t)
	m.submit("j", "yes € | tr -d '\\n' | head -c 3000000")
	f := m.finished("j")
	want := strings.Repeat("€", 1_000_000)
	if got := m.output("j"); got != want || f.LogLength != int64(len(want)) {
		t.Errorf("%d bytes of output, length %d", len(got), f.LogLength)
	}
	for _, e := range find(m.events(), ofType(pipe.TypeLog)) {
		if !utf8.Valid(e.Log.Data) || len(e.Log.Data) > pipe.MaxLog {
			t.Fatalf("piece of %d bytes at %d, ending with %q", len(e.Log.Data), e.Log.Offset, e.Log.Data[len(e.Log.Data)-4:])
		}
	}
}

func TestManyLines(t *testing.T) {
	m := boot(t)
	m.submit("j", "seq 300000")
	m.finished("j")
	got := m.output("j")
	if !strings.HasPrefix(got, "1\n2\n") || !strings.HasSuffix(got, "\n300000\n") || strings.Count(got, "\n") != 300000 {
		t.Errorf("%d lines", strings.Count(got, "\n"))
	}
	for _, e := range find(m.events(), ofType(pipe.TypeLog)) {
		if !bytes.HasSuffix(e.Log.Data, []byte("\n")) {
			t.Errorf("cut within a line at %d", e.Log.Offset+int64(len(e.Log.Data)))
		}
	}
}

// A prompt has no end of line, and is told all the same while the job runs.
func TestPrompt(t *testing.T) {
	m := boot(t)
	wait, open := m.gate("g")
	m.submit("j", "printf 'working: '\n"+wait+"echo done\n")
	m.until("the prompt", func() bool { return m.output("j") == "working: " })
	open()
	m.finished("j")
	if got := m.output("j"); got != "working: done\n" {
		t.Errorf("output %q", got)
	}
}
