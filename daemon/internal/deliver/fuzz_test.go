package deliver

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// FuzzLayout: whatever a VM calls its artifacts, each has a place of its own
// in the folder, none takes another's or one of ours, or they are refused.
func FuzzLayout(f *testing.F) {
	for _, seed := range []string{
		"nixos.iso\nsub/a file", "build.log\nresult.json\nsource/x\nSHA256SUMS", "../x", "/x", "a\na/b", "build.log\nartifacts", "a\na", "Build.Log\nartifacts/Build.Log", ".", "a//b", "a/../b", "A\na\nA.", "A/x\na/y\na.", "\u00e9\ne\u0301",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, names string) {
		j := job.Job{Result: &pipe.Finished{Status: pipe.StatusSucceeded}}
		for name := range strings.SplitSeq(names, "\n") {
			j.Artifacts = append(j.Artifacts, pipe.Artifact{Name: name})
		}
		files, err := layout(j)
		if err != nil {
			if !errors.Is(err, ErrName) {
				t.Errorf("%q: %v", names, err)
			}
			return
		}
		places := map[string]bool{folded(sumsName): true, folded(logName): true, folded(resultName): true, folded(sourceName): true}
		for _, file := range files {
			if places[folded(file.name)] || !filepath.IsLocal(file.name) || filepath.Clean(file.name) != file.name {
				t.Errorf("%q: %q", names, file.name)
			}
			places[folded(file.name)] = true
		}
		for _, file := range files {
			for dir := filepath.Dir(file.name); dir != "."; dir = filepath.Dir(dir) {
				if places[folded(dir)] {
					t.Errorf("%q: %q is a file and the folder of %q", names, dir, file.name)
				}
			}
		}
	})
}
