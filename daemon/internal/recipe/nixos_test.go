package recipe

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// drop makes a drop of the files, or of one file where the name ends in .nix.
func drop(t *testing.T, name string, files map[string]string) (source string) {
	t.Helper()
	source = t.TempDir()
	if err := os.MkdirAll(filepath.Join(source, filepath.Dir(name)), 0o755); err != nil {
		t.Fatal(err)
	}
	if text, single := files["."]; single {
		if err := os.WriteFile(filepath.Join(source, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return source
	}
	if err := os.MkdirAll(filepath.Join(source, name), 0o755); err != nil {
		t.Fatal(err)
	}
	for file, text := range files {
		path := filepath.Join(source, name, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return source
}

func TestCheckNixOS(t *testing.T) {
	for name, tc := range map[string]struct {
		files  map[string]string
		reason string
	}{
		"file":                 {map[string]string{".": "{ }\n"}, ""},
		"CRLF":                 {map[string]string{".": "{ }\r\n# x\r\n"}, ""},
		"latin 1":              {map[string]string{".": "{ } # gr\xfc\xdfe\n"}, ""},
		"empty file":           {map[string]string{".": "\n"}, "it is empty"},
		"UTF-16":               {map[string]string{".": "\xff\xfe{\x00}\x00"}, "UTF-16 text, which Nix"},
		"byte order mark":      {map[string]string{".": "\xef\xbb\xbf{ }"}, "byte order mark"},
		"NUL":                  {map[string]string{".": "{\n\x00}"}, "line 2: it has a NUL byte"},
		"folder":               {map[string]string{configuration: "{ }", "b.nix": "{ }"}, ""},
		"flake too":            {map[string]string{configuration: "{ }", "flake.nix": "{ }"}, ""},
		"empty configuration":  {map[string]string{configuration: ""}, "it is empty"},
		"NUL in configuration": {map[string]string{configuration: "{\x00}"}, "configuration.nix, line 1: it has a NUL byte"},
		"nothing":              {map[string]string{}, "an empty folder"},
		"flake":                {map[string]string{"flake.nix": "{ }", "host.nix": "{ }"}, "builds no flakes"},
		"other case":           {map[string]string{"Configuration.nix": "{ }"}, "it has no configuration.nix"},
		"one other":            {map[string]string{"host.nix": "{ }"}, "it has no configuration.nix"},
		"several others":       {map[string]string{"a.nix": "{ }", "b.nix": "{ }"}, "it has no configuration.nix"},
		"one level too high":   {map[string]string{"host/configuration.nix": "{ }"}, "it has no configuration.nix itself"},
		"several machines":     {map[string]string{"a/configuration.nix": "{ }", "b/configuration.nix": "{ }"}, "folders with one"},
		"a folder of the name": {map[string]string{"configuration.nix/x": "{ }"}, "its configuration.nix is not a regular file"},
		"no Nix at all":        {map[string]string{"README": "x"}, "it has no configuration.nix"},
	} {
		t.Run(name, func(t *testing.T) {
			source := drop(t, "x.nix", tc.files)
			wantRefusal(t, Check(job.RecipeNixOS, filepath.Join(source, "x.nix")), tc.reason)
		})
	}
	if err := Check(job.RecipeNixOS, filepath.Join(t.TempDir(), "absent")); !errors.Is(err, os.ErrNotExist) || errors.Is(err, ErrUnfit) {
		t.Errorf("absent: %v", err)
	}
}

var defaults = job.NixOS{Format: "iso", System: "x86_64-linux", Nixpkgs: "nixos-26.05"}

// prepared is a job of a drop, and where its source lies.
func prepared(t *testing.T, name string, files map[string]string) (job.Job, string) {
	t.Helper()
	source := drop(t, name, files)
	j := job.Job{ID: "j", Name: job.OutputName(name), Drop: name, Recipe: job.RecipeNixOS}
	if err := Prepare(&j, source, defaults); err != nil {
		t.Fatal(err)
	}
	return j, source
}

func TestPrepareNixOS(t *testing.T) {
	j, source := prepared(t, "machine", map[string]string{configuration: "{ }", "sub/b.nix": "{ b = 1; }"})
	if j.Entry != "machine/configuration.nix" || *j.NixOS != defaults || j.System() != "x86_64-linux" {
		t.Errorf("job %+v", j)
	}
	var archive bytes.Buffer
	if err := Inputs(j, source, &archive); err != nil {
		t.Fatal(err)
	}
	if int64(archive.Len()) != j.Inputs.Size {
		t.Errorf("%d bytes, the record says %d", archive.Len(), j.Inputs.Size)
	}
	got := map[string]string{}
	for r := tar.NewReader(&archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = string(text)
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" || h.ModTime.Unix() != 0 {
			t.Errorf("%s is of %d:%d %q, %v", h.Name, h.Uid, h.Gid, h.Uname, h.ModTime)
		}
	}
	want := map[string]string{configuration: "{ }", "sub/": "", "sub/b.nix": "{ b = 1; }"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("archive (-want +got):\n%s", diff)
	}
}

func TestScriptsHaveNoInputs(t *testing.T) {
	j := job.Job{Drop: "a.sh", Recipe: job.RecipeScript}
	if err := Prepare(&j, t.TempDir(), defaults); err != nil || j.Entry != "a.sh" || j.Inputs != nil || j.NixOS != nil {
		t.Errorf("job %+v, %v", j, err)
	}
	if err := Inputs(j, t.TempDir(), io.Discard); err == nil {
		t.Error("a script has inputs")
	}
}

// The body, run by Bash where image-build prints its arguments.
func TestNixOSBody(t *testing.T) {
	for name, tc := range map[string]struct {
		drop   string
		files  map[string]string
		fails  bool
		absent bool // there is no image-build
		old    bool // the runner has no $INPUTS
		want   string
		code   int
	}{
		"file":         {drop: "host.nix", files: map[string]string{".": "{ }"}, want: "<--entry> <host.nix> <--format> <iso> <--system> <x86_64-linux> <--nixpkgs> <nixos-26.05> <--name> <host> <source>\nhost.nix\n"},
		"folder":       {drop: "machine", files: map[string]string{configuration: "{ }", "a.nix": "{ }"}, want: "<--entry> <configuration.nix> <--format> <iso> <--system> <x86_64-linux> <--nixpkgs> <nixos-26.05> <--name> <machine> <source>\na.nix\nconfiguration.nix\n"},
		"odd name":     {drop: "$(touch x) 'a'.nix", files: map[string]string{".": "{ }"}, want: "<--entry> <touch-x-a.nix> <--format> <iso> <--system> <x86_64-linux> <--nixpkgs> <nixos-26.05> <--name> <touch-x-a> <source>\ntouch-x-a.nix\n"},
		"it fails":     {drop: "host.nix", files: map[string]string{".": "{ }"}, fails: true, code: 7},
		"neighbour":    {drop: "host.nix", files: map[string]string{".": "{ imports = [./a.nix ../b.nix ]; } # ./c.nix"}, fails: true, code: 7, want: "note: host.nix mentions ./a.nix, ../b.nix, and was dropped alone."},
		"its quotes":   {drop: "ho'st.nix", files: map[string]string{".": "{ imports = [ ./a.nix ]; }"}, fails: true, code: 7, want: "note: ho'st.nix mentions ./a.nix, and"},
		"not needed":   {drop: "host.nix", files: map[string]string{".": "{ imports = [ ./a.nix ]; }"}, want: "host.nix\n"},
		"no program":   {drop: "host.nix", files: map[string]string{".": "{ }"}, absent: true, code: 1, want: "the builder VM has no image-build"},
		"old runner":   {drop: "host.nix", files: map[string]string{".": "{ }"}, old: true, code: 1, want: "runner is older than the sidecar"},
		"its own note": {drop: "machine", files: map[string]string{configuration: "{ imports = [ ./a.nix ]; }"}, fails: true, code: 7},
	} {
		t.Run(name, func(t *testing.T) {
			j, source := prepared(t, tc.drop, tc.files)
			body, err := Body(j, source)
			if err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if !tc.absent {
				program := "#!/bin/bash\nprintf '<%s> ' \"$@\" | sed 's/ $/\\n/'\nls source\n"
				if tc.fails {
					program = "#!/bin/bash\nexit 7\n"
				}
				if err := os.WriteFile(filepath.Join(dir, "image-build"), []byte(program), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			inputs, err := os.Create(filepath.Join(dir, "inputs"))
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(Inputs(j, source, inputs), inputs.Close()); err != nil {
				t.Fatal(err)
			}
			work, report := t.TempDir(), filepath.Join(dir, "report")
			cmd := exec.CommandContext(t.Context(), "bash", "-c", string(body))
			cmd.Dir = work
			cmd.Env = []string{"PATH=" + dir + ":/usr/bin:/bin", "INPUTS=" + inputs.Name(), "REPORT=" + report, "LC_ALL=C"}
			if tc.old {
				cmd.Env = cmd.Env[:1]
			}
			out, err := cmd.CombinedOutput()
			code := cmd.ProcessState.ExitCode()
			if code != tc.code || !strings.Contains(string(out), tc.want) || tc.want == "" && len(out) > 0 {
				t.Errorf("%v, code %d, want %d; output %q, want %q", err, code, tc.code, out, tc.want)
			}
			if left, err := os.ReadDir(work); err != nil || len(left) != 1 && !tc.old {
				t.Errorf("in the work folder: %v, %v", left, err)
			}
			data, err := os.ReadFile(report)
			if tc.absent {
				r, perr := pipe.ParseReport(data)
				if f, ok := job.ReportedFailure(r); !ok || perr != nil || f.Class != "unsupported" || f.Advice == "" {
					t.Errorf("report %s, %v", data, perr)
				}
			} else if err == nil {
				t.Errorf("report %s", data)
			}
		})
	}
}

func TestNixOSBodyRefuses(t *testing.T) {
	if _, err := Body(job.Job{Recipe: job.RecipeNixOS, Drop: "a.nix", Entry: "a.nix"}, t.TempDir()); err == nil {
		t.Error("a job without a target was taken")
	}
	if err := Inputs(job.Job{Recipe: job.RecipeNixOS, Drop: "../../etc", Entry: "../../etc"}, t.TempDir(), io.Discard); err == nil {
		t.Error("a drop outside of the source was packed")
	}
}
