package buildlog

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// alphabet names each byte of an attempt's output by its place.
const alphabet = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"

// FuzzAppend: events in any order, repeated, overlapping, with holes, and a
// restart after each: a byte is in the log once, in its order, and a hole is
// said.
func FuzzAppend(f *testing.F) {
	f.Add([]byte{1, 0, 4, 1, 2, 4, 1, 10, 3, 2, 0, 5}, false)
	f.Add([]byte{1, 5, 1, 1, 0, 9, 3, 61, 8, 2, 0, 0}, true)
	f.Fuzz(func(t *testing.T, moves []byte, restart bool) {
		state := t.TempDir()
		mark := job.Mark{}
		w, err := Open(state, "j", mark, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = w.Close() }()
		for ; len(moves) >= 3; moves = moves[3:] {
			attempt, from := 1+int(moves[0])%3, int(moves[1])%len(alphabet)
			to := min(len(alphabet), from+int(moves[2])%16)
			if err := w.Append(attempt, pipe.Log{Offset: int64(from), Data: []byte(alphabet[from:to])}); err != nil {
				t.Fatal(err)
			}
			if moves[0] > 200 {
				if err := w.Finish(int64(to)); err != nil {
					t.Fatal(err)
				}
			}
			if mark, err = w.Sync(); err != nil {
				t.Fatal(err)
			}
			if !restart {
				continue
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			if w, err = Open(state, "j", mark, nil); err != nil {
				t.Fatal(err)
			}
		}
		text, err := os.ReadFile(Path(state, "j"))
		if err != nil || int64(len(text)) != mark.File {
			t.Fatalf("%d bytes, the mark says %d, %v", len(text), mark.File, err)
		}
		next, hole := 0, false
		for line := range strings.Lines(string(text)) {
			switch {
			case strings.Contains(line, "attempt"):
				next, hole = 0, false
				continue
			case strings.HasPrefix(line, "[osbuilder: "):
				hole = true
				continue
			}
			for _, b := range bytes.TrimSuffix([]byte(line), []byte("\n")) {
				at := strings.IndexByte(alphabet, b)
				if at < next || at > next && !hole {
					t.Fatalf("byte %d where %d belongs:\n%s", at, next, text)
				}
				next, hole = at+1, false
			}
		}
	})
}
