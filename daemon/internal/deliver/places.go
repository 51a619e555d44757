package deliver

import (
	"fmt"
	"path"
	"strings"

	"golang.org/x/text/cases"
	"golang.org/x/text/unicode/norm"

	"osbuilder/daemon/internal/job"
)

// maxPlaces bounds how many artifacts of one job may have names that are the
// same to some file system.
const maxPlaces = 100

// settle moves files whose place is another's below artifacts/, and where that
// won't do, below artifacts-1/, and so on. Names count as one that any file
// system takes for one: output/ may lie on a host where IMAGE.iso is image.iso.
func settle(files []file) error {
	p := places{}
	for _, name := range []string{sumsName, logName, resultName, sourceName} {
		p.take(name)
	}
	tops := freeTops(files)
	for i, f := range files {
		name := f.artifact.Name
		for n := 0; !p.free(name); n++ {
			if n == maxPlaces {
				return fmt.Errorf("%w: artifact %q, of which many differ in no more than the case of their letters", ErrName, f.artifact.Name)
			}
			name = tops(n) + "/" + f.artifact.Name
		}
		p.take(name)
		files[i].name = name
	}
	return nil
}

// freeTops returns names of folders that are no artifact's.
func freeTops(files []file) func(n int) string {
	used := make(map[string]bool)
	for _, f := range files {
		top, _, _ := strings.Cut(f.artifact.Name, "/")
		used[folded(top)] = true
	}
	var tops []string
	next := 0
	return func(n int) string {
		for len(tops) <= n {
			top := "artifacts"
			if next > 0 {
				top = fmt.Sprintf("artifacts-%d", next)
			}
			if next++; !used[folded(top)] {
				tops = append(tops, top)
			}
		}
		return tops[n]
	}
}

// places are the names in a job's folder, by what file systems take them for.
type places map[string]place

type place struct {
	name   string
	folder bool
}

// free reports whether a file can have that name: it is nobody's, and the
// folders above it are nobody's file, nor the same folder in other letters.
func (p places) free(name string) bool {
	if _, taken := p[folded(name)]; taken {
		return false
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if at, taken := p[folded(dir)]; taken && at != (place{dir, true}) {
			return false
		}
	}
	return true
}

func (p places) take(name string) {
	p[folded(name)] = place{name, false}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		p[folded(dir)] = place{dir, true}
	}
}

// folded is the same for two names that a file system may take for one: macOS
// looks neither at the case of letters nor at how accents are put together,
// Windows in addition not at dots and blanks at a name's end.
func folded(name string) string {
	parts := strings.Split(norm.NFD.String(cases.Fold().String(norm.NFD.String(name))), "/")
	for i, part := range parts {
		parts[i] = strings.TrimRight(part, ". ")
	}
	return strings.Join(parts, "/")
}

// Renamed returns the artifacts of a job that have another name in its folder
// than the job gave them.
func Renamed(j job.Job) []Artifact {
	files, err := layout(j)
	if err != nil {
		return nil
	}
	var renamed []Artifact
	for _, f := range files {
		if a := f.told(); a.MadeAs != "" {
			renamed = append(renamed, a)
		}
	}
	return renamed
}

// told is what is told of a file.
func (f file) told() Artifact {
	a := Artifact{Name: f.name, Size: f.artifact.Size, SHA256: f.artifact.SHA256}
	if f.name != f.artifact.Name {
		a.MadeAs = f.artifact.Name
	}
	return a
}
