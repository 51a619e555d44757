package inbox

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/recipe"
)

// plant makes a folder. A text that begins with "-> " is a link, one with "#!"
// an executable file, an empty one a folder.
func (f *fixture) plant(name string, files map[string]string) string {
	f.t.Helper()
	for file, text := range files {
		path := filepath.Join(f.cfg.Dir, name, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			f.t.Fatal(err)
		}
		var err error
		switch target, link := strings.CutPrefix(text, "-> "); {
		case link:
			err = os.Symlink(target, path)
		case text == "":
			err = os.Mkdir(path, 0o755)
		case strings.HasPrefix(text, "#!"):
			err = os.WriteFile(path, []byte(text), 0o755)
		default:
			err = os.WriteFile(path, []byte(text), 0o644)
		}
		if err != nil {
			f.t.Fatal(err)
		}
	}
	return filepath.Join(f.cfg.Dir, name)
}

// machine is a folder that can be built.
var machine = map[string]string{
	"configuration.nix": "{ imports = [ ./deep/disk.nix ]; }\n", "deep/disk.nix": "{ }\n", "tool": "#!/bin/sh\n",
	"empty": "", "link.nix": "-> deep/disk.nix", "deep/up": "-> ../tool", "nowhere": "-> missing", ".hidden": "h\n",
}

// wantTree checks the copy of a folder: names, content, links, executables.
func (f *fixture) wantTree(id job.ID, name string, want map[string]string) {
	f.t.Helper()
	got := map[string]string{}
	root := filepath.Join(f.cfg.State, "jobs", string(id), sourceDir, name)
	for _, file := range allBelow(f.t, root) {
		path := filepath.Join(root, file)
		info, err := os.Lstat(path)
		if err != nil {
			f.t.Fatal(err)
		}
		switch mode := info.Mode(); {
		case mode&os.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				f.t.Fatal(err)
			}
			got[file] = "-> " + target
		case mode.IsDir():
			if left, err := os.ReadDir(path); err == nil && len(left) == 0 {
				got[file] = ""
			}
		default:
			text, err := os.ReadFile(path)
			if err != nil {
				f.t.Fatal(err)
			}
			got[file] = string(text)
			if run := mode&0o100 != 0; run != strings.HasPrefix(string(text), "#!") {
				f.t.Errorf("%s can be run: %v", file, run)
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		f.t.Errorf("copy (-want +got):\n%s", diff)
	}
}

func allBelow(t *testing.T, root string) []string {
	t.Helper()
	var names []string
	if err := filepath.Walk(root, func(path string, _ os.FileInfo, err error) error {
		if err == nil && path != root {
			names = append(names, path[len(root)+1:])
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func TestTakeFolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.plant("my.machine", machine)
		defer f.start()()
		pass(5*settle - time.Second)
		f.wantInFolder("my.machine")
		pass(2*time.Second + rescan)
		f.wantInFolder()
		id := <-f.taken
		j := f.records.jobs[id]
		if j.Name != "my.machine" || j.Entry != "my.machine/configuration.nix" || j.Recipe != job.RecipeNixOS || j.Inputs == nil {
			t.Errorf("job %+v", j)
		}
		f.wantTree(id, "my.machine", machine)
		if _, err := os.Stat(filepath.Join(f.cfg.Dir, takenDir, string(id), "my.machine", "deep", "disk.nix")); err != nil {
			t.Errorf("the drop was not kept: %v", err)
		}
		var inputs bytes.Buffer
		if err := recipe.Inputs(j, filepath.Join(f.cfg.State, "jobs", string(id), sourceDir), &inputs); err != nil {
			t.Fatal(err)
		}
		if int64(inputs.Len()) != j.Inputs.Size {
			t.Errorf("%d bytes of inputs, the record says %d", inputs.Len(), j.Inputs.Size)
		}
		if first, err := tar.NewReader(&inputs).Next(); err != nil || first.Name != ".hidden" {
			t.Errorf("archive begins with %+v, %v", first, err)
		}
	})
}

func TestRefusedFolders(t *testing.T) {
	with := func(files map[string]string) map[string]string {
		all := map[string]string{"configuration.nix": "{ }\n"}
		for name, text := range files {
			all[name] = text
		}
		return all
	}
	deep := strings.Repeat("d/", maxTreeDepth) + "f"
	for name, tc := range map[string]struct {
		files map[string]string
		also  func(path string) error
		says  string
	}{
		"absolute link":        {with(map[string]string{"a": "-> /etc/shadow"}), nil, "the link a in it leads out of the folder, or may, to /etc/shadow"},
		"result of nix-build":  {with(map[string]string{"result": "-> /nix/store/x-y"}), nil, "left over from a build: remove it"},
		"climbing link":        {with(map[string]string{"s/a": "-> ../../x"}), nil, "the link s/a in it leads out"},
		"climbing behind name": {with(map[string]string{"d": "-> .", "a": "-> d/../../x"}), nil, "leads out of the folder, or may, to d/../../x"},
		"odd name":             {with(map[string]string{"a\xff": "x"}), nil, "not valid UTF-8"},
		"pipe":                 {with(nil), func(path string) error { return unix.Mkfifo(path+"/p", 0o644) }, "p in it is neither a file nor a folder, but a named pipe"},
		"too deep":             {with(map[string]string{deep: "x"}), nil, "more than 64 deep"},
		"too large": {with(nil), func(path string) error {
			return errors.Join(os.WriteFile(path+"/big", nil, 0o644), os.Truncate(path+"/big", maxTreeBytes+1))
		}, "it has more than 2.1 GB"},
		"configuration is a link out": {map[string]string{"configuration.nix": "-> /etc/nixos/configuration.nix"}, nil, "configuration.nix"},
		"flake":                       {map[string]string{"flake.nix": "{ }\n"}, nil, "builds no flakes"},
		"empty":                       {map[string]string{".": ""}, nil, "an empty folder"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				if name == "empty" {
					if err := os.Mkdir(filepath.Join(f.cfg.Dir, "machine"), 0o755); err != nil {
						t.Fatal(err)
					}
				} else {
					path := f.plant("machine", tc.files)
					if tc.also != nil {
						if err := tc.also(path); err != nil {
							t.Fatal(err)
						}
					}
				}
				defer f.start()()
				pass(5*settle + rescan)
				f.wantInFolder()
				message, err := os.ReadFile(filepath.Join(f.cfg.Dir, rejectedDir, "machine.txt"))
				if err != nil || !strings.Contains(string(message), tc.says) || len(strings.Split(string(message), "\n")) != 4 {
					t.Errorf("message %q, %v, want %q", message, err, tc.says)
				}
				if copies := list(t, filepath.Join(f.cfg.State, "jobs")); len(copies) > 0 || len(f.records.jobs) > 0 {
					t.Errorf("copies %q, jobs %v", copies, f.records.jobs)
				}
			})
		})
	}
}

// What users do to a folder while it is being taken.
func TestChangesWhileAFolderIsTaken(t *testing.T) {
	for name, tc := range map[string]struct {
		at     string
		change func(path string) error
		want   string // deep/disk.nix in the job; "-": none was made
	}{
		"file changed after the copy": {"copied", func(p string) error { return os.WriteFile(p+"/deep/disk.nix", []byte("new"), 0o644) }, "new"},
		"file added after the copy":   {"copied", func(p string) error { return os.WriteFile(p+"/more", nil, 0o644) }, "{ }\n"},
		"removed before the copy":     {"folder made", os.RemoveAll, "-"},
		"a link in its place": {"folder made", func(p string) error {
			return errors.Join(os.Rename(p, filepath.Dir(p)+"/../aside"), os.Symlink("../aside", p))
		}, "-"},
		"a link in a folder's place": {"folder made", func(p string) error {
			return errors.Join(os.RemoveAll(p+"/deep"), os.Symlink("/etc", p+"/deep"))
		}, "-"},
		"a file in its place": {"folder made", func(p string) error {
			return errors.Join(os.RemoveAll(p), os.WriteFile(p, []byte("x"), 0o644))
		}, "-"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				path := f.plant("machine", machine)
				once := false
				f.step = func(step string) {
					if step == tc.at && !once {
						once = true
						if err := tc.change(path); err != nil {
							t.Error(err)
						}
					}
				}
				defer f.start()()
				pass(2 * time.Minute)
				f.wantInFolder()
				got := "-"
				for id := range f.records.jobs {
					text, err := os.ReadFile(filepath.Join(f.cfg.State, "jobs", string(id), sourceDir, "machine/deep/disk.nix"))
					if err != nil {
						t.Error(err)
					}
					got = string(text)
				}
				if got != tc.want || len(f.records.jobs) > 1 {
					t.Errorf("%d jobs, the last with %q, want %q", len(f.records.jobs), got, tc.want)
				}
			})
		})
	}
}

// Wherever it is killed, the next start makes one job of the folder.
func TestStoppedAfterAnyStepOfAFolder(t *testing.T) {
	var steps []string
	synctest.Test(t, func(t *testing.T) {
		f := newFixture(t)
		f.plant("machine", machine)
		f.step = func(name string) { steps = append(steps, name) }
		defer f.start()()
		pass(settle * 8)
	})
	if len(steps) < 12 || steps[len(steps)-1] != "sent" {
		t.Fatalf("steps: %q", steps)
	}
	for at, name := range steps {
		t.Run(fmt.Sprintf("%d %s", at, name), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := newFixture(t)
				f.plant("machine", machine)
				n := 0
				f.step = func(string) {
					if n == at {
						runtime.Goexit()
					}
					n++
				}
				stop := f.start()
				pass(settle * 8)
				stop()
				f.step = nil
				for range 2 {
					stop := f.start()
					pass(rescan + 6*settle)
					stop()
				}
				f.wantInFolder()
				if len(f.records.jobs) != 1 {
					t.Fatalf("%d jobs", len(f.records.jobs))
				}
				for id := range f.records.jobs {
					f.wantTree(id, "machine", machine)
					if diff := cmp.Diff([]string{string(id)}, list(t, filepath.Join(f.cfg.State, "jobs"))); diff != "" {
						t.Errorf("copies (-want +got):\n%s", diff)
					}
				}
			})
		})
	}
}

// The inputs depend on nothing but the drop.
func TestInputsAreTheSameEachTime(t *testing.T) {
	var digests []string
	for i := range 2 {
		synctest.Test(t, func(t *testing.T) {
			f := newFixture(t)
			path := f.plant("machine", machine)
			if i == 1 { // other times, other rights of others
				when := time.Unix(1_000_000_000, 0)
				if err := errors.Join(os.Chtimes(path+"/tool", when, when), os.Chmod(path+"/tool", 0o700), os.Chmod(path+"/deep", 0o700)); err != nil {
					t.Fatal(err)
				}
			}
			defer f.start()()
			pass(5*settle + rescan)
			j := f.records.jobs[<-f.taken]
			digests = append(digests, j.Inputs.SHA256)
			if err := recipe.Inputs(j, filepath.Join(f.cfg.State, "jobs", string(j.ID), sourceDir), io.Discard); err != nil {
				t.Error(err)
			}
		})
	}
	if len(digests) != 2 || digests[0] != digests[1] {
		t.Errorf("digests %q", digests)
	}
}

// Links that stay, made in one folder, can't be followed out of it. Each is
// written "name target".
func FuzzLinksStay(f *testing.F) {
	for _, seed := range [][3]string{
		{"a ../x", "d .", "d/e ../.."},
		{"d .", "a d/../../x", "b a/.."},
		{"s/t ../..", "s/u ../../s", "v s/u/t"},
		{"l a/b/../..", "m ./..//..", "n ."},
		{"x /etc", "y y", "z s/../y"},
	} {
		f.Add(seed[0], seed[1], seed[2])
	}
	f.Fuzz(func(t *testing.T, a, b, c string) {
		outer, err := filepath.EvalSymlinks(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		inner := filepath.Join(outer, "in", "ner")
		for _, dir := range []string{"s/t", "a/b"} {
			if err := os.MkdirAll(filepath.Join(inner, dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		var made []string
		for _, link := range []string{a, b, c} {
			name, to, ok := strings.Cut(link, " ")
			if !ok || !filepath.IsLocal(name) || strings.ContainsAny(link, "\x00") || filepath.Clean(name) != name || !stays(name, to) {
				continue
			}
			// Its folder has to be one, and not a link: so it is in a folder that was dropped.
			dir, err := filepath.EvalSymlinks(filepath.Dir(filepath.Join(inner, name)))
			if err != nil || dir != filepath.Dir(filepath.Join(inner, name)) || os.Symlink(to, filepath.Join(inner, name)) != nil {
				continue
			}
			made = append(made, name)
		}
		for _, name := range made {
			where, err := filepath.EvalSymlinks(filepath.Join(inner, name))
			if err == nil && where != inner && !strings.HasPrefix(where, inner+"/") {
				t.Errorf("%q leads to %s, out of %s; links %q, %q, %q", name, where, inner, a, b, c)
			}
		}
	})
}
