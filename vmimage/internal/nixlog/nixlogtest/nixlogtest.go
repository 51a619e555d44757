// Package nixlogtest reads the recordings of what real versions of Nix said,
// for the tests. testdata/record.sh of nixlog makes them.
package nixlogtest

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// A Recording is one Nix command's standard error and how it ended.
type Recording struct {
	Version string // of Nix, like 2.26
	Way     string // direct or daemon
	Name    string
	Exit    int
	Lines   [][]byte
}

// ID names a recording in a test.
func (r Recording) ID() string { return r.Version + "-" + r.Way + "/" + r.Name }

// Versions are those that must be there, both ways.
var Versions = []string{"2.8", "2.26", "2.34"}

var heading = regexp.MustCompile(`(?m)^-- ([\w-]+) (\d+) --\n`)

// Read gets all recordings of nixlog's testdata folder. Missing ones fail the test.
func Read(t testing.TB, testdata string) []Recording {
	t.Helper()
	var all []Recording
	for _, version := range Versions {
		for _, way := range []string{"direct", "daemon"} {
			text, err := os.ReadFile(filepath.Join(testdata, "nix-"+version+"-"+way+".txt"))
			if err != nil {
				t.Fatal(err)
			}
			at := heading.FindAllSubmatchIndex(text, -1)
			if len(at) == 0 {
				t.Fatalf("no recording of %s, %s", version, way)
			}
			for i, m := range at {
				end := len(text)
				if i+1 < len(at) {
					end = at[i+1][0]
				}
				exit, _ := strconv.Atoi(string(text[m[4]:m[5]])) // digits, by the heading
				body := bytes.TrimSuffix(text[m[1]:end], []byte("\n"))
				all = append(all, Recording{
					Version: version, Way: way,
					Name: strings.Clone(string(text[m[2]:m[3]])), Exit: exit,
					Lines: bytes.Split(body, []byte("\n")),
				})
			}
		}
	}
	return all
}
