package recipe

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func TestClassify(t *testing.T) {
	tests := []struct {
		drop   string
		isDir  bool
		recipe job.Recipe
		reason string
	}{
		{drop: "hello.sh", recipe: job.RecipeScript},
		{drop: "a b\n\"ü\".sh", recipe: job.RecipeScript},
		{drop: "archive.tar.sh", recipe: job.RecipeScript},
		{drop: "hello.SH", reason: "not in .sh"},
		{drop: "host.nix", recipe: job.RecipeNixOS},
		{drop: "host.Nix", reason: "not in .nix"},
		{drop: "job.yaml", reason: "no .yaml files"},
		{drop: "machine.tar.gz", reason: "an archive"},
		{drop: "README", reason: "ends neither in .nix nor in .sh"},
		{drop: "hello.sh.txt", reason: "ends neither in .nix nor in .sh"},
		{drop: "machine", isDir: true, recipe: job.RecipeNixOS},
		{drop: "folder.sh", isDir: true, recipe: job.RecipeNixOS},
	}
	for _, tt := range tests {
		t.Run(tt.drop, func(t *testing.T) {
			recipe, err := Classify(tt.drop, tt.isDir)
			if recipe != tt.recipe {
				t.Errorf("recipe %q, want %q", recipe, tt.recipe)
			}
			wantRefusal(t, err, tt.reason)
		})
	}
}

func wantRefusal(t *testing.T, err error, reason string) {
	t.Helper()
	if reason == "" {
		if err != nil {
			t.Errorf("error %v", err)
		}
		return
	}
	if !errors.Is(err, ErrUnfit) || !strings.Contains(err.Error(), reason) {
		t.Errorf("error %v, want ErrUnfit that says %q", err, reason)
	}
	if len(hint.Of(err)) != 1 {
		t.Errorf("error %v says nothing of what to do", err)
	}
}

func write(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "job.sh")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestCheckScript(t *testing.T) {
	tests := []struct{ name, text, reason string }{
		{"plain", "echo hello", ""},
		{"shebang", "#!/usr/bin/env bash\necho hello\n", ""},
		{"sh", "#!/bin/sh -e\necho hello\n", ""},
		{"latin 1", "echo gr\xfc\xdfe\n", ""},
		{"one CRLF in a here-document", "cat <<E\na\r\nE\n", ""},
		{"empty", "", "it is empty"},
		{"blank", " \n\t\n", "it is empty"},
		{"NUL", "echo\necho \x00\n", "line 2: it has a NUL byte"},
		{"program", "\x7fELF\x02\x01\x01\x00\n", "NUL byte"},
		{"UTF-16", "\xff\xfee\x00c\x00", "UTF-16"},
		{"byte order mark", "\xef\xbb\xbf#!/bin/bash\n", "byte order mark"},
		{"CRLF", "#!/bin/bash\r\necho hello\r\n", "CRLF"},
		{"python", "#!/usr/bin/env python3\nprint()\n", "asks for python3"},
		{"nix-shell", "#!/usr/bin/env nix-shell\n#! nix-shell -i bash\n", "asks for nix-shell"},
		{"login shell", "#!/bin/bash -l\n", "can't be kept"},
		{"long option", "#!/bin/bash --posix\n", "can't be kept"},
		{"option without its name", "#!/bin/bash -o\n", "can't be kept"},
		{"too large", strings.Repeat("#", maxScript+1), "at most"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			wantRefusal(t, Check(job.RecipeScript, write(t, tt.text)), tt.reason)
		})
	}
	t.Run("absent", func(t *testing.T) {
		err := Check(job.RecipeScript, filepath.Join(t.TempDir(), "absent.sh"))
		if !errors.Is(err, fs.ErrNotExist) || errors.Is(err, ErrUnfit) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("link", func(t *testing.T) {
		link := filepath.Join(t.TempDir(), "link.sh")
		if err := os.Symlink(write(t, "echo"), link); err != nil {
			t.Fatal(err)
		}
		wantRefusal(t, Check(job.RecipeScript, link), "not a regular file")
	})
}

func TestBody(t *testing.T) {
	tests := []struct{ name, text, want string }{
		{"as it stands", "#!/usr/bin/env bash\necho hello", "#!/usr/bin/env bash\necho hello"},
		{"without a shebang", "echo gr\xfc\xdfe\n", "echo gr\xfc\xdfe\n"},
		{"options", "#!/bin/bash -eu\necho\n", "set -eu #!/bin/bash -eu\necho\n"},
		{"env -S", "#!/usr/bin/env -S bash -eu -o pipefail\necho\n", "set -eu -o pipefail #!/usr/bin/env -S bash -eu -o pipefail\necho\n"},
		{"joined", "#!/bin/bash -euo pipefail\n", "set -euo pipefail #!/bin/bash -euo pipefail\n"},
		{"first line is all", "#!/bin/sh -e", "set -e #!/bin/sh -e\n"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			path := write(t, tt.text)
			got, err := Body(job.Job{Recipe: job.RecipeScript, Entry: filepath.Base(path)}, filepath.Dir(path))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, string(got)); diff != "" {
				t.Errorf("body (-want +got):\n%s", diff)
			}
			// Bash itself must take what was made of the first line.
			if out, err := exec.CommandContext(t.Context(), "bash", "-c", string(got)).CombinedOutput(); err != nil {
				t.Errorf("bash: %v\n%s", err, out)
			}
		})
	}
}

func TestBodyStaysInTheJobsFolder(t *testing.T) {
	for _, entry := range []string{"../job.sh", "/etc/passwd", ""} {
		if _, err := Body(job.Job{Recipe: job.RecipeScript, Entry: entry}, t.TempDir()); err == nil {
			t.Errorf("entry %q was taken", entry)
		}
	}
	if _, err := Body(job.Job{Recipe: "flake", Entry: "x"}, t.TempDir()); err == nil {
		t.Error("an unknown recipe was taken")
	}
}

func TestTheLargestScriptFitsInARequest(t *testing.T) {
	body := []byte(strings.Repeat("#", maxScript))
	_, err := pipe.Marshal(pipe.Header{
		Kind: pipe.KindJob, Owner: "o", Job: "j", Attempt: 1, Name: strings.Repeat("n", 255),
	}, body)
	if err != nil {
		t.Error(err)
	}
}

func FuzzShebang(f *testing.F) {
	for _, seed := range []string{"", "#!", "#!/bin/bash -e", "#! /usr/bin/env -S A=b bash -o pipefail", "#!/usr/bin/env", "#!/bin/sh -o"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, line string) {
		_, options, ok := shebang(line)
		for _, o := range options {
			if !ok || strings.ContainsAny(o, ";&|$`'\"()<>#\\ \t\n") {
				t.Errorf("option %q of %q reaches the script", o, line)
			}
		}
	})
}
