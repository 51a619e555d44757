package buildlog

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

const id = job.ID("20260101-120000-abcdef")

// opened is a Writer and what it has handed out.
type opened struct {
	*Writer
	state string
	lines []string
}

func open(t *testing.T, state string, mark job.Mark) *opened {
	t.Helper()
	o := &opened{state: state}
	w, err := Open(state, id, mark, func(line []byte) { o.lines = append(o.lines, string(line)) })
	if err != nil {
		t.Fatal(err)
	}
	o.Writer = w
	t.Cleanup(func() { _ = w.file.Close() })
	return o
}

func (o *opened) append(t *testing.T, attempt int, offset int64, data string) {
	t.Helper()
	if err := o.Append(attempt, pipe.Log{Offset: offset, Data: []byte(data)}); err != nil {
		t.Fatal(err)
	}
}

func (o *opened) sync(t *testing.T) job.Mark {
	t.Helper()
	m, err := o.Sync()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (o *opened) want(t *testing.T, file string, lines ...string) {
	t.Helper()
	got, err := os.ReadFile(Path(o.state, id))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(file, string(got)); diff != "" {
		t.Errorf("build.log (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(lines, o.lines); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}

func TestAppend(t *testing.T) {
	type piece struct {
		attempt int
		offset  int64
		data    string
	}
	tests := []struct {
		name   string
		pieces []piece
		file   string
		lines  []string
		mark   job.Mark
	}{
		{"in order", []piece{{1, 0, "one\ntw"}, {1, 6, "o\nthree"}}, "one\ntwo\nthree", []string{"one", "two"}, job.Mark{File: 13, Attempt: 1, Stream: 13}},
		{"repeated", []piece{{1, 0, "one\n"}, {1, 0, "one\n"}, {1, 0, "on"}}, "one\n", []string{"one"}, job.Mark{File: 4, Attempt: 1, Stream: 4}},
		{"overlapping", []piece{{1, 0, "one\n"}, {1, 2, "e\ntwo\n"}}, "one\ntwo\n", []string{"one", "two"}, job.Mark{File: 8, Attempt: 1, Stream: 8}},
		{
			"gap after a whole line",
			[]piece{{1, 0, "one\n"}, {1, 104, "two\n"}, {1, 4, "late"}},
			"one\n[osbuilder: 100 bytes of output were lost with the VM]\ntwo\n",
			[]string{"one", "[osbuilder: 100 bytes of output were lost with the VM]", "two"},
			job.Mark{File: 63, Attempt: 1, Stream: 108},
		},
		{
			"gap within a line",
			[]piece{{1, 0, "on"}, {1, 3, "\n"}},
			"on\n[osbuilder: 1 bytes of output were lost with the VM]\n\n",
			[]string{"on", "[osbuilder: 1 bytes of output were lost with the VM]", ""},
			job.Mark{File: 57, Attempt: 1, Stream: 4},
		},
		{
			"next attempt counts from nought",
			[]piece{{1, 0, "one\ntw"}, {2, 0, "one\n"}, {1, 6, "o\n"}, {2, 0, "one\n"}, {2, 4, "two\n"}},
			"one\ntw\n[osbuilder: attempt 2 begins, attempt 1 did not end]\none\ntwo\n",
			[]string{"one", "tw", "[osbuilder: attempt 2 begins, attempt 1 did not end]", "one", "two"},
			job.Mark{File: 68, Attempt: 2, Stream: 8},
		},
		{"no data", []piece{{1, 0, ""}}, "", nil, job.Mark{Attempt: 1}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := open(t, t.TempDir(), job.Mark{})
			for _, p := range tt.pieces {
				o.append(t, p.attempt, p.offset, p.data)
			}
			o.want(t, tt.file, tt.lines...)
			if diff := cmp.Diff(tt.mark, o.sync(t)); diff != "" {
				t.Errorf("mark (-want +got):\n%s", diff)
			}
		})
	}
}

func TestFinishHandsOutTheLastLine(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	o.append(t, 1, 0, "one\ntwo")
	for range 2 {
		if err := o.Finish(7); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o.want(t, "one\ntwo", "one", "two")
}

func TestFinishSaysWhatIsMissingAtTheEnd(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	o.append(t, 1, 0, "one")
	if err := o.Finish(10); err != nil {
		t.Fatal(err)
	}
	o.want(t, "one\n[osbuilder: 7 bytes of output were lost with the VM]\n",
		"one", "[osbuilder: 7 bytes of output were lost with the VM]")
}

// What was appended after the checkpoint comes again, and so it must be cut.
func TestOpenCutsToTheMark(t *testing.T) {
	state := t.TempDir()
	o := open(t, state, job.Mark{})
	o.append(t, 1, 0, "one\ntw")
	o.append(t, 1, 10, "x\n") // after a gap, so file and stream differ
	o.append(t, 1, 12, "half")
	mark := o.sync(t)
	o.append(t, 1, 16, " a line\nmore\n")

	again := open(t, state, mark)
	again.want(t, "one\ntw\n[osbuilder: 4 bytes of output were lost with the VM]\nx\nhalf")
	again.append(t, 1, 12, "half a line\nmore\n")
	again.want(t, "one\ntw\n[osbuilder: 4 bytes of output were lost with the VM]\nx\nhalf a line\nmore\n", "half a line", "more")
}

func TestOpenOfAFileShorterThanItsMark(t *testing.T) {
	state := t.TempDir()
	o := open(t, state, job.Mark{})
	o.append(t, 1, 0, "one\ntwo\n")
	mark := o.sync(t)
	if err := os.Truncate(Path(state, id), 5); err != nil {
		t.Fatal(err)
	}
	again := open(t, state, mark)
	again.append(t, 1, 8, "three\n")
	again.want(t, "one\nt\n[osbuilder: 3 bytes of this file were lost]\nthree\n",
		"t", "[osbuilder: 3 bytes of this file were lost]", "three")
}

func TestALineWithoutEndIsHandedOutInPieces(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	long := strings.Repeat("x", maxLine)
	for i := range 3 {
		o.append(t, 1, int64(i*maxLine), long)
	}
	if len(o.partial) > maxLine {
		t.Fatalf("%d bytes are held", len(o.partial))
	}
	o.append(t, 1, 3*maxLine, "\n")
	if got := strings.Join(o.lines, ""); got != strings.Repeat(long, 3) {
		t.Fatalf("%d bytes were handed out, want %d", len(got), 3*maxLine)
	}
	// On a line of its own all the same, though nothing of the open line is held.
	o.append(t, 1, 3*maxLine+1, long+"y")
	o.partial = o.partial[:0]
	o.append(t, 1, 5*maxLine, "z")
	if got := o.lines[len(o.lines)-1]; !strings.HasPrefix(got, "[osbuilder: ") {
		t.Errorf("last line is %q", got)
	}
	if data, err := os.ReadFile(Path(o.state, id)); err != nil || !bytes.Contains(data, []byte("y\n[osbuilder: ")) {
		t.Errorf("the note is not on a line of its own in the file (%v)", err)
	}
}

func TestAWriteThatFailsCanBeRepeated(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	o.append(t, 1, 0, "one\n")
	file := o.file
	readOnly, err := effect.Open(Path(o.state, id))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	o.file = readOnly
	if err := o.Append(1, pipe.Log{Offset: 4, Data: []byte("two\n")}); err == nil {
		t.Fatal("append to a file that can't be written succeeded")
	}
	o.file = file
	o.append(t, 1, 4, "two\n")
	o.want(t, "one\ntwo\n", "one", "two")
}

// Stops at any place, with any cut into events, lose nothing and double
// nothing.
func TestRestartsKeepEveryByteOnce(t *testing.T) {
	for seed := range uint64(50) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 0))
			var want bytes.Buffer
			for i := range 200 {
				fmt.Fprintf(&want, "line %d %s\n", i, strings.Repeat("x", rnd.IntN(30)))
			}
			stream := want.Bytes()

			state, mark, at := t.TempDir(), job.Mark{}, 0
			o := open(t, state, mark)
			for at < len(stream) {
				end := min(at+1+rnd.IntN(100), len(stream))
				from := max(0, at-rnd.IntN(50))
				o.append(t, 1, int64(from), string(stream[from:end]))
				at = end
				switch rnd.IntN(10) {
				case 0:
					mark = o.sync(t)
				case 1: // killed: events come again from the checkpoint
					_ = o.file.Close()
					o = open(t, state, mark)
					at = int(mark.Stream)
				}
			}
			got, err := os.ReadFile(Path(state, id))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, stream) {
				t.Errorf("build.log differs from the output: %d bytes, want %d", len(got), len(stream))
			}
		})
	}
}

// An event without data, beyond what was seen: the hole is said, no more.
func TestEmptyBeyondTheEnd(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	o.append(t, 1, 10, "")
	o.append(t, 1, 10, "x\n")
	if diff := cmp.Diff([]string{"[osbuilder: 10 bytes of output were lost with the VM]", "x"}, o.lines); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
}

func TestLacks(t *testing.T) {
	o := open(t, t.TempDir(), job.Mark{})
	o.append(t, 2, 0, "one\n")
	for _, tt := range []struct {
		attempt      int
		offset, want int64
	}{
		{1, 100, 0}, // over
		{2, 0, 0},
		{2, 4, 0},
		{2, 5, 1},
		{2, 100, 96},
		{3, 0, 0},
		{3, 100, 100},
	} {
		if got := o.Lacks(tt.attempt, tt.offset); got != tt.want {
			t.Errorf("attempt %d lacks %d bytes before %d, want %d", tt.attempt, got, tt.offset, tt.want)
		}
	}
}

// The mark was lost: what still counts of the file is found in the file.
func TestOpenWithoutMark(t *testing.T) {
	begins := "[osbuilder: attempt 2 begins, attempt 1 did not end]\n"
	for name, tt := range map[string]struct {
		file string
		mark job.Mark
		want string
	}{
		"comes again":                      {"one\ntw", job.Mark{Attempt: 1, Again: true}, ""},
		"second attempt comes again":       {"one\ntw\n" + begins + "one\n", job.Mark{Attempt: 2, Again: true}, "one\ntw\n" + begins},
		"it wrote that line itself":        {"one\n" + begins + "x\n" + begins + "y\n", job.Mark{Attempt: 2, Again: true}, "one\n" + begins},
		"within a long line":               {strings.Repeat("x", 9000) + begins + begins + "y", job.Mark{Attempt: 2, Again: true}, strings.Repeat("x", 9000) + begins + begins},
		"second attempt, and no such line": {"one\n", job.Mark{Attempt: 2, Again: true}, ""},
		"nothing more comes":               {"one\ntw", job.Mark{Attempt: 1, Whole: true}, "one\ntw"},
		"no file":                          {"", job.Mark{Attempt: 1, Again: true}, ""},
		"counted on after a copy came back": {
			"one\n[osbuilder: attempt 101 begins, attempt 1 did not end]\ntwo\n",
			job.Mark{Attempt: 101, Again: true},
			"one\n[osbuilder: attempt 101 begins, attempt 1 did not end]\n",
		},
	} {
		t.Run(name, func(t *testing.T) {
			state := t.TempDir()
			first := open(t, state, job.Mark{})
			if _, err := first.file.WriteAt([]byte(tt.file), 0); err != nil {
				t.Fatal(err)
			}
			o := open(t, state, tt.mark)
			o.want(t, tt.want)
			if m := o.sync(t); m != (job.Mark{File: int64(len(tt.want)), Attempt: tt.mark.Attempt}) {
				t.Errorf("mark %+v", m)
			}
			if !tt.mark.Whole {
				o.append(t, tt.mark.Attempt, 0, "again\n")
				o.want(t, tt.want+"again\n", "again")
			}
		})
	}
}
