package deliver

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/internal/testenv"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const id = job.ID("20260102-030405-abcdef")

// vm is a Source with faults to switch on.
type vm struct {
	files map[string][]byte
	fail  error // after half of what is asked for
	short bool  // half of what is asked for, and no error
	asked []int64
}

func (v *vm) Copy(_ context.Context, path string, offset int64, w io.Writer) (int64, error) {
	v.asked = append(v.asked, offset)
	data, ok := v.files[path]
	if !ok {
		return 0, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}
	data = data[min(int(offset), len(data)):]
	if v.fail != nil || v.short {
		data = data[:len(data)/2]
	}
	var n int64
	for len(data) > 0 {
		k, err := w.Write(data[:min(len(data), 1000)])
		n += int64(k)
		if err != nil {
			return n, fmt.Errorf("copy %s: %w", path, err)
		}
		data = data[k:]
	}
	return n, v.fail
}

type fixture struct {
	*Publisher
	vm  *vm
	job job.Job
}

func image(n int) []byte { return bytes.Repeat([]byte("osbuilder\n"), n/10) }

func newFixture(t *testing.T) *fixture {
	t.Helper()
	f := &fixture{
		Publisher: &Publisher{Output: t.TempDir(), State: t.TempDir(), Now: func() time.Time { return time.Date(2026, 1, 3, 0, 0, 0, 0, time.UTC) }},
		vm:        &vm{files: make(map[string][]byte)},
	}
	zero := 0
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f.job = job.Job{
		ID: id, Name: "hello", Drop: "hello.sh", Recipe: job.RecipeScript, Entry: "hello.sh",
		State: job.Collecting, Attempt: 1, Created: at, Started: at.Add(time.Second), Image: "debian-13-abc",
		Result:  &pipe.Finished{Status: pipe.StatusSucceeded, ExitCode: &zero, Duration: 1500, Memory: 1 << 20, Scope: "unit"},
		History: []job.Step{{Time: at, Event: job.Created, State: job.Queued}, {Time: at.Add(time.Minute), Event: job.Finished, State: job.Collecting}},
	}
	f.artifact("hello.iso", image(100_000))
	f.artifact("doc/read me.txt", []byte("read me\n"))
	source := filepath.Join(f.State, "jobs", string(id), "source")
	write(t, filepath.Join(source, "hello.sh"), "echo hello\n")
	write(t, filepath.Join(source, "lib", "deep", "part"), "part\n")
	write(t, filepath.Join(f.State, "jobs", string(id), "build.log"), "one\ntwo\n")
	return f
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func (f *fixture) artifact(name string, data []byte) {
	path := "/data/artifacts/" + name
	f.vm.files[path] = data
	f.job.Artifacts = append(f.job.Artifacts, pipe.Artifact{Name: name, Path: path, Size: int64(len(data)), SHA256: digest(data)})
}

func (f *fixture) publish(t *testing.T) {
	t.Helper()
	folder, err := f.Publish(t.Context(), f.job, f.vm)
	if err != nil {
		t.Fatal(err)
	}
	if want := f.job.Name + "/" + string(f.job.ID); folder != want {
		t.Fatalf("folder %q, want %q", folder, want)
	}
}

// tree returns every path in output/ with what it is.
func (f *fixture) tree(t *testing.T) map[string]string {
	t.Helper()
	got := make(map[string]string)
	err := filepath.WalkDir(f.Output, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(f.Output, path)
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch {
		case name == ".":
		case d.IsDir():
			got[name] = fmt.Sprintf("dir %o", info.Mode().Perm())
		case d.Type()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			got[name] = "link " + target
		default:
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			got[name] = fmt.Sprintf("file %o %s", info.Mode().Perm(), digest(data)[:8])
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// whole is what tree must return once the fixture's job is published.
func (f *fixture) whole(t *testing.T) map[string]string {
	t.Helper()
	file := func(data []byte) string { return "file 644 " + digest(data)[:8] }
	in := func(name string) string { return filepath.Join("hello", string(id), name) }
	want := map[string]string{
		".partial": "dir 755", "hello": "dir 755", "hello/latest": "link " + string(id), in(""): "dir 755",
		in("build.log"): file([]byte("one\ntwo\n")),
		in("source"):    "dir 755", in("source/hello.sh"): file([]byte("echo hello\n")),
		in("source/lib"): "dir 755", in("source/lib/deep"): "dir 755", in("source/lib/deep/part"): file([]byte("part\n")),
		in("doc"): "dir 755", in("doc/read me.txt"): file([]byte("read me\n")), in("hello.iso"): file(image(100_000)),
	}
	for _, name := range []string{resultName, sumsName} {
		data, err := os.ReadFile(filepath.Join(f.Output, in(name)))
		if err != nil {
			t.Fatal(err)
		}
		want[in(name)] = file(data)
	}
	return want
}

func TestPublish(t *testing.T) {
	old := unix.Umask(0o077)
	defer unix.Umask(old)
	f := newFixture(t)
	f.publish(t)
	if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
	dir := filepath.Join(f.Output, "hello", "latest")
	cmd := exec.CommandContext(t.Context(), "sha256sum", "--strict", "-c", "SHA256SUMS")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("sha256sum -c: %v\n%s", err, out)
	}
	data, err := os.ReadFile(filepath.Join(dir, "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got Result
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	zero := 0
	want := Result{
		Version: 1, Job: id, Name: "hello", Drop: "hello.sh", Status: pipe.StatusSucceeded, ExitCode: &zero,
		LastLines: []string{"one", "two"}, Attempts: 1, Created: f.job.Created, Started: f.job.Started,
		Finished: f.job.History[1].Time, Duration: 1500, Image: "debian-13-abc", Memory: 1 << 20, MemoryScope: "unit",
		Artifacts: []Artifact{
			{Name: "hello.iso", Size: 100_000, SHA256: digest(image(100_000))},
			{Name: "doc/read me.txt", Size: 8, SHA256: digest([]byte("read me\n"))},
		},
		Versions: Versions{Sidecar: pipe.Release},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("result.json (-want +got):\n%s", diff)
	}
}

func TestPublishAgainChangesNothing(t *testing.T) {
	f := newFixture(t)
	f.publish(t)
	before := f.tree(t)
	f.vm.files, f.vm.asked = nil, nil
	f.publish(t)
	if diff := cmp.Diff(before, f.tree(t)); diff != "" || len(f.vm.asked) > 0 {
		t.Errorf("asked %v, output (-before +after):\n%s", f.vm.asked, diff)
	}
}

func TestPublishOfAFailedJobAsksNoVM(t *testing.T) {
	f := newFixture(t)
	three := 3
	f.job.Result = &pipe.Finished{Status: pipe.StatusFailed, ExitCode: &three, Reason: "exit code 3"}
	folder, err := f.Publish(t.Context(), f.job, nil)
	if err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(f.Output, folder))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if diff := cmp.Diff([]string{"build.log", "result.json", "source"}, names); diff != "" {
		t.Errorf("folder (-want +got):\n%s", diff)
	}
}

func TestPublishWithoutLogAndSource(t *testing.T) {
	f := newFixture(t)
	f.State = t.TempDir()
	f.job.Result = &pipe.Finished{Status: pipe.StatusInterrupted}
	folder, err := f.Publish(t.Context(), f.job, nil)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(f.Output, folder, "result.json"))
	if err != nil || !strings.Contains(string(data), `"last_lines": []`) {
		t.Errorf("result.json is %s, %v", data, err)
	}
}

// Wherever it is stopped, nothing half is visible, and done again it is right.
func TestPublishStoppedAfterAnyStep(t *testing.T) {
	var steps []string
	f := newFixture(t)
	f.step = func(name string) { steps = append(steps, name) }
	f.publish(t)
	if len(steps) < 14 {
		t.Fatalf("only %d steps: %q", len(steps), steps)
	}
	for stop, name := range steps {
		t.Run(fmt.Sprintf("%d %s", stop, name), func(t *testing.T) {
			f := newFixture(t)
			at := 0
			f.step = func(string) {
				if at == stop {
					runtime.Goexit() // as a kill does, it leaves everything as it is
				}
				at++
			}
			done := make(chan struct{})
			go func() {
				defer close(done)
				_, err := f.Publish(t.Context(), f.job, f.vm)
				t.Errorf("went on after the stop: %v", err)
			}()
			<-done
			final := filepath.Join(f.Output, "hello", string(id))
			if _, err := os.Stat(final); err == nil {
				f.wholeFolder(t, final)
			}
			f.step = nil
			f.publish(t)
			if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
		})
	}
}

// wholeFolder checks that a visible folder holds every artifact as announced.
func (f *fixture) wholeFolder(t *testing.T, dir string) {
	t.Helper()
	for _, a := range f.job.Artifacts {
		data, err := os.ReadFile(filepath.Join(dir, a.Name))
		if err != nil || digest(data) != a.SHA256 {
			t.Errorf("visible, but %s is not whole: %v", a.Name, err)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, resultName)); err != nil {
		t.Errorf("visible without its result: %v", err)
	}
}

func (f *fixture) wantNothingVisible(t *testing.T) {
	t.Helper()
	entries, err := os.ReadDir(f.Output)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != partial {
			t.Errorf("%s is visible", e.Name())
		}
	}
}

func TestALinkThatBreaksIsResumed(t *testing.T) {
	f := newFixture(t)
	broken := errors.New("link lost")
	f.vm.fail = broken
	for range 3 {
		if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, broken) || errors.Is(err, ErrDigest) {
			t.Fatalf("error %v", err)
		}
		f.wantNothingVisible(t)
	}
	f.vm.fail = nil
	f.publish(t)
	if diff := cmp.Diff([]int64{0, 50_000, 75_000, 87_500, 0}, f.vm.asked); diff != "" {
		t.Errorf("offsets (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

func TestWhatIsNotAsAnnouncedIsNeverVisible(t *testing.T) {
	wrong := append(image(99_990), "osbuildeR\n"...)
	tests := []struct {
		name string
		harm func(*vm)
	}{
		{"wrong bytes", func(v *vm) { v.files["/data/artifacts/hello.iso"] = wrong }},
		{"too long", func(v *vm) { v.files["/data/artifacts/hello.iso"] = image(100_010) }},
		{"too short", func(v *vm) { v.files["/data/artifacts/hello.iso"] = image(99_990) }},
		{"short without an error", func(v *vm) { v.short = true }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			f := newFixture(t)
			good := f.vm.files["/data/artifacts/hello.iso"]
			tt.harm(f.vm)
			for range 2 {
				_, err := f.Publish(t.Context(), f.job, f.vm)
				if !errors.Is(err, ErrDigest) || !strings.Contains(err.Error(), "hello.iso") {
					t.Fatalf("error %v", err)
				}
				f.wantNothingVisible(t)
				if _, err := os.Stat(filepath.Join(f.Output, partial, string(id), "hello.iso")); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the damaged part was kept: %v", err)
				}
			}
			f.vm.short, f.vm.files["/data/artifacts/hello.iso"] = false, good
			f.publish(t)
			if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
		})
	}
}

// A crash can leave a part whose end is not what was fetched, and another
// attempt other files.
func TestWhatAnEarlierTryLeftIsNotTrusted(t *testing.T) {
	tests := map[string]string{
		"torn":    strings.Repeat("\x00", 5000),
		"whole":   strings.Repeat("x", 100_000),
		"too big": strings.Repeat("x", 100_001),
	}
	for name, left := range tests {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			dir := filepath.Join(f.Output, partial, string(id))
			write(t, filepath.Join(dir, "hello.iso"), left)
			write(t, filepath.Join(dir, "of-attempt-1.iso"), "x")
			write(t, filepath.Join(dir, "old", "deep", "x"), "x")
			write(t, filepath.Join(dir, "doc", "x"), "x")
			if err := os.MkdirAll(filepath.Join(dir, "doc", "read me.txt"), 0o700); err != nil {
				t.Fatal(err)
			}
			for _, path := range []string{dir, filepath.Dir(dir)} {
				if err := os.Chmod(path, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			f.publish(t)
			if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
				t.Errorf("output (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAPartThatIsALinkLeadsNowhere(t *testing.T) {
	f := newFixture(t)
	victim := filepath.Join(t.TempDir(), "victim")
	write(t, victim, "untouched")
	dir := filepath.Join(f.Output, partial, string(id))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"hello.iso", "doc", "build.log", "result.json"} {
		if err := os.Symlink(victim, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	f.publish(t)
	if data, _ := os.ReadFile(victim); string(data) != "untouched" {
		t.Errorf("the file that the link leads to holds %d bytes", len(data))
	}
	f.wholeFolder(t, filepath.Join(f.Output, "hello", string(id)))
}

func TestNamesNeverLeadOut(t *testing.T) {
	for _, name := range []string{"", ".", "..", "../x", "a/../../x", "/etc/x", "a//b", "a/./b", "a/", "a\x00b"} {
		t.Run(fmt.Sprintf("artifact %q", name), func(t *testing.T) {
			f := newFixture(t)
			f.artifact(name, []byte("x"))
			if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, ErrName) {
				t.Errorf("error %v", err)
			}
			f.wantNothingVisible(t)
		})
	}
	for _, name := range []string{"", ".", "..", "../x", "a/b", "/x", ".partial"} {
		t.Run(fmt.Sprintf("job %q", name), func(t *testing.T) {
			f := newFixture(t)
			f.job.Name = name
			if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, ErrName) {
				t.Errorf("error %v", err)
			}
		})
	}
	f := newFixture(t)
	f.job.ID = "../x"
	if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, ErrName) {
		t.Errorf("error %v", err)
	}
}

func TestArtifactsNamedLikeOurFiles(t *testing.T) {
	f := newFixture(t)
	f.job.Artifacts = nil
	for _, name := range []string{"build.log", "artifacts/build.log", "Result.JSON", "source/x", "line\nbreak", `back\slash`} {
		f.artifact(name, []byte(name))
	}
	f.job.Artifacts = append(f.job.Artifacts, f.job.Artifacts[0]) // announced twice
	f.publish(t)
	dir := filepath.Join(f.Output, "hello", string(id))
	for in, want := range map[string]string{
		"build.log": "one\ntwo\n", "artifacts-1/build.log": "build.log", "artifacts/build.log": "artifacts/build.log",
		"artifacts-1/Result.JSON": "Result.JSON", "artifacts-1/source/x": "source/x", "source/hello.sh": "echo hello\n",
	} {
		if data, err := os.ReadFile(filepath.Join(dir, in)); err != nil || string(data) != want {
			t.Errorf("%s holds %q, want %q (%v)", in, data, want, err)
		}
	}
	cmd := exec.CommandContext(t.Context(), "sha256sum", "--strict", "-c", "SHA256SUMS")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("sha256sum -c: %v\n%s", err, out)
	}

	f = newFixture(t)
	f.artifact("hello.iso", []byte("another"))
	if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, ErrName) {
		t.Errorf("two artifacts of one name: error %v", err)
	}
}

// Names that are one to some file systems: each artifact has a place that is
// nobody else's anywhere, in the same way each time, and it is told which.
func TestNamesThatDifferInCase(t *testing.T) {
	f := newFixture(t)
	f.job.Artifacts = nil
	names := map[string]string{ // where each goes
		"Image.iso": "Image.iso", "image.iso": "artifacts/image.iso", "IMAGE.ISO": "artifacts-1/IMAGE.ISO", "image.iso.": "image.iso.",
		"doc/a": "doc/a", "doc/A": "artifacts/doc/A", "Doc/b": "artifacts-1/Doc/b", "doc/c": "doc/c", "DOC": "artifacts-2/DOC",
		"caf\u00e9": "caf\u00e9", "cafe\u0301": "artifacts/cafe\u0301", "stra\u00dfe": "stra\u00dfe", "STRASSE": "artifacts/STRASSE",
		"build.log": "artifacts/build.log", "Build.Log": "artifacts-1/Build.Log",
	}
	names["image.iso."] = "artifacts-2/image.iso."
	order := []string{
		"Image.iso", "image.iso", "IMAGE.ISO", "image.iso.", "doc/a", "doc/A", "Doc/b", "doc/c", "DOC", "caf\u00e9", "cafe\u0301", "stra\u00dfe", "STRASSE",
		"build.log", "Build.Log",
	}
	for _, name := range order {
		f.artifact(name, []byte(name))
	}
	f.publish(t)
	folder := filepath.Join("hello", string(id))
	seen := map[string]string{}
	var r Result
	data, err := os.ReadFile(filepath.Join(f.Output, folder, resultName))
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err != nil || len(r.Artifacts) != len(order) {
		t.Fatalf("%v: %s", err, data)
	}
	renamed := 0
	for i, a := range r.Artifacts {
		name := order[i]
		if a.Name != names[name] || (a.Name != name) != (a.MadeAs == name) {
			t.Errorf("%q is told as %+v, want %q", name, a, names[name])
		}
		if a.MadeAs != "" {
			renamed++
		}
		if data, err := os.ReadFile(filepath.Join(f.Output, folder, a.Name)); err != nil || string(data) != name {
			t.Errorf("%s holds %q, want %q: %v", a.Name, data, name, err)
		}
		if other, taken := seen[strings.ToLower(a.Name)]; taken {
			t.Errorf("%q and %q are one", a.Name, other)
		}
		seen[strings.ToLower(a.Name)] = a.Name
	}
	if got := Renamed(f.job); len(got) != renamed {
		t.Errorf("%d are said to be renamed, want %d", len(got), renamed)
	}
}

func TestNoRoomIsSaidBeforeAnythingIsFetched(t *testing.T) {
	f := newFixture(t)
	f.job.Artifacts[0].Size = math.MaxInt64 / 2
	_, err := f.Publish(t.Context(), f.job, f.vm)
	var full *disk.NoRoom
	if !errors.As(err, &full) || full.Need <= full.Free || full.Path != f.Output {
		t.Fatalf("error %v", err)
	}
	if len(f.vm.asked) > 0 || len(hint.Of(err)) != 1 {
		t.Errorf("asked at %v, hints %q", f.vm.asked, hint.Of(err))
	}
}

// The disk fills while a file is fetched: what there is stays, and when there
// is room it goes on.
func TestADiskThatFillsMeanwhile(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=300k"); err != nil {
		testenv.Lacks(t, "no tmpfs can be mounted here: %v", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	f := newFixture(t)
	f.Output = dir
	f.step = func(name string) {
		if name == "partial taken up" && len(f.vm.asked) == 0 {
			write(t, filepath.Join(dir, "of-somebody"), strings.Repeat("x", 240_000))
		}
	}
	_, err := f.Publish(t.Context(), f.job, f.vm)
	var full *disk.NoRoom
	if !errors.As(err, &full) || full.Need <= full.Free || full.Need >= 100_000 {
		t.Fatalf("error %v", err)
	}
	t.Log(err)
	if err := os.Remove(filepath.Join(dir, "of-somebody")); err != nil {
		t.Fatal(err)
	}
	f.publish(t)
	if len(f.vm.asked) < 2 || f.vm.asked[1] == 0 {
		t.Errorf("was not resumed: asked at %v", f.vm.asked)
	}
	if diff := cmp.Diff(f.whole(t), f.tree(t)); diff != "" {
		t.Errorf("output (-want +got):\n%s", diff)
	}
}

// The same without privileges: the writer's own error counts, even where the
// source hides it.
func TestAFullDiskIsToldFromALostLink(t *testing.T) {
	f := newFixture(t)
	full, err := effect.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	w := &checked{file: full, sum: sha256.New(), want: 10}
	if _, err := f.vm.Copy(t.Context(), "/data/artifacts/doc/read me.txt", 0, w); err == nil || !disk.Full(w.err) {
		t.Errorf("errors %v and %v", err, w.err)
	}
	if err := f.explain(fmt.Errorf("write: %w", w.err)); len(hint.Of(err)) != 1 || !strings.Contains(err.Error(), f.Output) {
		t.Errorf("explained as %v, hints %q", err, hint.Of(err))
	}
}

// What keeps an output folder from being written is said with what to do, and
// when that is done the job is published.
func TestAnOutputFolderThatCantBeWritten(t *testing.T) {
	for name, tt := range map[string]struct {
		lock   func(t *testing.T, dir string) (unlock func() error)
		err    error
		advice string
	}{
		"another's": {
			func(t *testing.T, dir string) func() error {
				if err := os.Chmod(dir, 0o555); err != nil {
					t.Fatal(err)
				}
				return func() error { return os.Chmod(dir, 0o777) }
			}, fs.ErrPermission, "The output folder must belong to PUID:PGID, which `docker compose up init` sees to.",
		},
		"read-only": {
			func(t *testing.T, dir string) func() error {
				remount := func(flags uintptr) error {
					return unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
				}
				if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
					testenv.Lacks(t, "nothing can be mounted here: %v", err)
				}
				t.Cleanup(func() {
					if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
						t.Error(err)
					}
				})
				if err := remount(unix.MS_RDONLY); err != nil {
					t.Fatal(err)
				}
				return func() error { return remount(0) }
			}, unix.EROFS, "The output folder is mounted read-only: mount it, or the disk that it lies on, so that it can be written. The job is published by itself then.",
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			if err := os.Chmod(filepath.Dir(f.Output), 0o755); err != nil {
				t.Fatal(err)
			}
			unlock := tt.lock(t, f.Output)
			err := withoutRights(t, func() error {
				_, err := f.Publish(t.Context(), f.job, f.vm)
				return err
			})
			if hints := hint.Of(err); !errors.Is(err, tt.err) || len(hints) != 1 || hints[0] != tt.advice {
				t.Errorf("error %v, hints %q, want %v", err, hints, tt.err)
			}
			if err := unlock(); err != nil {
				t.Fatal(err)
			}
			f.publish(t)
		})
	}
}

// withoutRights calls f as a user who can't write where he is not let, which
// root isn't: in a thread of its own, that ends with it.
func withoutRights(t *testing.T, f func() error) error {
	t.Helper()
	if os.Getuid() != 0 {
		return f()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if _, err := unix.SetfsuidRetUid(65534); err != nil {
			t.Errorf("become another user: %v", err)
		}
		done <- f()
	}()
	return <-done
}

func TestLatest(t *testing.T) {
	f := newFixture(t)
	latest := func() string {
		target, err := os.Readlink(filepath.Join(f.Output, "hello", "latest"))
		if err != nil {
			t.Fatal(err)
		}
		return target
	}
	f.publish(t)
	f.job.ID = "20260102-030406-aaaaaa"
	f.publish(t)
	if got := latest(); got != "20260102-030406-aaaaaa" {
		t.Errorf("latest is %s after a younger job", got)
	}
	f.job.ID = "20260102-030400-zzzzzz"
	f.publish(t)
	if got := latest(); got != "20260102-030406-aaaaaa" {
		t.Errorf("latest is %s after an older job that took longer", got)
	}
	// The user removed what it points at.
	if err := os.RemoveAll(filepath.Join(f.Output, "hello", "20260102-030406-aaaaaa")); err != nil {
		t.Fatal(err)
	}
	f.job.ID = "20260102-030401-zzzzzz"
	f.publish(t)
	if got := latest(); got != "20260102-030401-zzzzzz" {
		t.Errorf("latest is %s, which is not there", got)
	}
}

// The clock was ahead, and was put right: a job from then doesn't keep the
// link from those that come after it.
func TestLatestAfterTheClockWasAhead(t *testing.T) {
	f := newFixture(t)
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f.Now = func() time.Time { return now }
	for _, step := range []struct {
		publish job.ID
		clock   time.Time
		want    job.ID
	}{
		{"20310101-000000-aaaaaa", now.AddDate(5, 0, 0), "20310101-000000-aaaaaa"},
		{"20260102-030405-bbbbbb", now, "20260102-030405-bbbbbb"},
		{"20260102-030400-cccccc", now, "20260102-030405-bbbbbb"}, // older, and took longer
		{"20310101-000001-dddddd", now, "20310101-000001-dddddd"}, // begun before the clock was put right
		{"20260102-030406-eeeeee", now.Add(time.Minute), "20260102-030406-eeeeee"},
	} {
		now, f.job.ID = step.clock, step.publish
		f.publish(t)
		if got, err := os.Readlink(filepath.Join(f.Output, "hello", "latest")); err != nil || got != string(step.want) {
			t.Errorf("latest is %s after %s, want %s (%v)", got, step.publish, step.want, err)
		}
	}
}

func TestLatestThatCantBeMadeDoesNotHideTheFolder(t *testing.T) {
	f := newFixture(t)
	write(t, filepath.Join(f.Output, "hello", "latest", "of-the-user"), "x")
	for range 2 {
		folder, err := f.Publish(t.Context(), f.job, f.vm)
		if !errors.Is(err, ErrLatest) || folder == "" {
			t.Fatalf("folder %q, error %v", folder, err)
		}
	}
	f.wholeFolder(t, filepath.Join(f.Output, "hello", string(id)))
}

func TestSomethingElseInTheFoldersPlace(t *testing.T) {
	f := newFixture(t)
	write(t, filepath.Join(f.Output, "hello", string(id), "of-the-user"), "x")
	if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		t.Errorf("error %v", err)
	}
}

func TestPublishStopsWithItsContext(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(t.Context())
	f.step = func(name string) {
		if name == "fetched" {
			cancel()
		}
	}
	if _, err := f.Publish(ctx, f.job, f.vm); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

func TestClean(t *testing.T) {
	f := newFixture(t)
	if err := f.Clean(t.Context(), nil); err != nil {
		t.Fatalf("without a partial folder: %v", err)
	}
	for _, name := range []string{"20260101-000000-aaaaaa", string(id), "Of the user"} {
		write(t, filepath.Join(f.Output, partial, name, "x"), "x")
	}
	if err := f.Clean(t.Context(), func(i job.ID) bool { return i == id }); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(filepath.Join(f.Output, partial))
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) != 2 || entries[0].Name() != string(id) || entries[1].Name() != "Of the user" {
		t.Errorf("left: %v", entries)
	}
}

func TestSourceWithLinks(t *testing.T) {
	f := newFixture(t)
	source := filepath.Join(f.State, "jobs", string(id), "source")
	if err := os.Symlink("../hello.sh", filepath.Join(source, "lib", "link")); err != nil {
		t.Fatal(err)
	}
	f.publish(t)
	if target, err := os.Readlink(filepath.Join(f.Output, "hello", string(id), "source/lib/link")); err != nil || target != "../hello.sh" {
		t.Errorf("link to %q, %v", target, err)
	}
	for _, target := range []string{"/etc/passwd", "../../x", "../../../x"} {
		f := newFixture(t)
		if err := os.Symlink(target, filepath.Join(f.State, "jobs", string(id), "source", "lib", "link")); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Publish(t.Context(), f.job, f.vm); !errors.Is(err, ErrName) {
			t.Errorf("link to %s: error %v", target, err)
		}
		f.wantNothingVisible(t)
	}
}
