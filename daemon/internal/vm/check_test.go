package vm

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/pipe"
)

// event is the line of an event with that number.
func event(t testing.TB, seq uint64) string {
	t.Helper()
	line, err := pipe.MarshalEvent(pipe.Event{
		Seq: seq, Time: time.Unix(0, 0).UTC(), Type: pipe.TypeLog, Job: "a-job", Attempt: 1, Log: &pipe.Log{Data: fmt.Append(nil, seq)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return string(line)
}

func TestChecker(t *testing.T) {
	one, two, three, four := event(t, 1), event(t, 2), event(t, 3), event(t, 4)
	unknown := `{"seq":2,"time":"2026-01-01T00:00:00Z","type":"telepathy"}` + "\n"
	torn := three[:20] + "\n"
	for name, tt := range map[string]struct {
		text  string
		known uint64 // the number before
		from  int64
		want  []uint64 // events
		at    int64    // where damage is; -1: none
		rest  bool     // found only when nothing more comes
	}{
		"in order":                        {one + two + three, 0, 0, []uint64{1, 2, 3}, -1, false},
		"a part of a line waits":          {one + two[:9], 0, 0, []uint64{1}, -1, false},
		"in the middle":                   {three + four, 2, 100, []uint64{3, 4}, -1, false},
		"in the middle, number not known": {three + four, 0, 100, []uint64{3, 4}, -1, false},
		"an unknown type counts":          {one + unknown + three, 0, 0, []uint64{1, 3}, -1, false},
		"torn, and the numbers go on":     {one + two + torn + three, 0, 0, []uint64{1, 2, 3}, -1, false},
		"torn twice, and the numbers go on": {
			one + two + torn + torn + three, 0, 0, []uint64{1, 2, 3}, -1, false,
		},
		"a line is gone":                   {one + three, 0, 0, []uint64{1}, int64(len(one)), false},
		"the first lines are gone":         {two + three, 0, 0, nil, 0, false},
		"a line comes twice":               {one + two + two, 0, 0, []uint64{1, 2}, int64(len(one + two)), false},
		"a line is overwritten":            {one + strings.Repeat("x", len(two)-1) + "\n" + three, 0, 0, []uint64{1}, int64(len(one)), false},
		"overwritten, and no number known": {torn + four, 0, 100, nil, 100, false},
		"zeros":                            {one + two + strings.Repeat("\x00", 9) + three, 0, 0, []uint64{1, 2}, int64(len(one + two)), false},
		"zeros within a line":              {one + two[:9] + strings.Repeat("\x00", 9) + two[18:], 0, 0, []uint64{1}, int64(len(one)), false},
		"zeros behind a torn line":         {one + torn + "\x00", 0, 0, []uint64{1}, int64(len(one)), false},
		"too long":                         {one + strings.Repeat("x", pipe.MaxLine+1), 0, 0, []uint64{1}, int64(len(one)), false},
		"the last line is overwritten":     {one + two + torn, 0, 0, []uint64{1, 2}, int64(len(one + two)), true},
		"an empty line at the end":         {one + "\n", 0, 0, []uint64{1}, int64(len(one)), true},
	} {
		for _, size := range []int{1, 7, 4096, 1 << 30} {
			c := newChecker(pipe.Position{Generation: "1-00000000", Offset: tt.from}, tt.known)
			var got []uint64
			var found *damage
			for piece := range slicesOf([]byte(tt.text), size) {
				entries, d := c.push(piece)
				for _, e := range entries {
					got = append(got, e.Event.Seq)
				}
				if found = d; found != nil {
					break
				}
			}
			if tt.rest {
				if found != nil {
					t.Errorf("%s, %d bytes at once: found too early: %v", name, size, found.err)
				}
				found = c.rest()
			}
			at := int64(-1)
			if found != nil {
				at = found.offset
			}
			if diff := cmp.Diff(tt.want, got); diff != "" || at != tt.at {
				t.Errorf("%s, %d bytes at once: damage at %d, want %d; events (-want +got):\n%s", name, size, at, tt.at, diff)
			}
			if found != nil && c.sound() > tt.at {
				t.Errorf("%s, %d bytes at once: sound up to %d, damaged from %d", name, size, c.sound(), tt.at)
			}
		}
	}
}

func slicesOf(data []byte, size int) func(func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(data) > 0 {
			n := min(size, len(data))
			if !yield(data[:n]) {
				return
			}
			data = data[n:]
		}
	}
}

func TestCheckerSkips(t *testing.T) {
	c := newChecker(pipe.Position{Generation: "1-00000000"}, 0)
	if _, d := c.push([]byte(event(t, 1) + "\x00")); d == nil {
		t.Fatal("no damage")
	}
	c.skip(5000, true)
	entries, d := c.push([]byte("rest of a line\n" + event(t, 70) + event(t, 71)))
	if d != nil || len(entries) != 2 || entries[1].Next.Offset != c.sound() {
		t.Errorf("entries %v, damage %v", entries, d)
	}
}

// Whatever lies in pipe_out: what is handed on is numbered without a gap, and
// lies before the first damage.
func FuzzChecker(f *testing.F) {
	one, two, three := event(f, 1), event(f, 2), event(f, 3)
	for _, s := range []string{
		"", one + two + three, one + three, one + "\n" + two, one + "\x00\x00" + two, one + two[:20] + "\n" + two + three,
		one + strings.Repeat("\n", 9) + two, strings.Repeat("x", 5000),
		strings.Replace(one, `"type":"`, `"tYpe":"un`, 1) + two,
	} {
		f.Add([]byte(s), uint16(0))
		f.Add([]byte(s), uint16(11))
	}
	f.Fuzz(func(t *testing.T, data []byte, size uint16) {
		c := newChecker(pipe.Position{Generation: "1-00000000"}, 0)
		var seen []uint64
		c.unknown = func(_ []byte, _ int64, e pipe.Event, _ error) { seen = append(seen, e.Seq) }
		next := uint64(1)
		for piece := range slicesOf(data, max(1, int(size))) {
			entries, d := c.push(piece)
			for _, e := range entries {
				seen = append(seen, e.Event.Seq)
			}
			slices.Sort(seen) // those of an unknown type are passed over, and counted
			for _, seq := range seen {
				if seq != next {
					t.Fatalf("number %d, want %d", seq, next)
				}
				next++
			}
			seen = nil
			if d != nil {
				if d.offset > int64(len(data)) || c.sound() > d.offset {
					t.Fatalf("damage at %d, sound up to %d", d.offset, c.sound())
				}
				return
			}
		}
		if c.sound() > int64(len(data)) {
			t.Fatalf("sound up to %d of %d", c.sound(), len(data))
		}
	})
}
