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
	"unicode/utf8"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// FuzzScript: a script that is taken can be sent, and arrives but for its
// first line as it was dropped.
func FuzzScript(f *testing.F) {
	for _, seed := range []string{"true\n", "#!/bin/bash -eu\ntrue\n", "#!/usr/bin/python3\n", "\xff\xfet\x00", "\xef\xbb\xbftrue", "a\r\nb\r\n", "", "#pipe {}\n", "#!/bin/sh\n#pipe {\"version\":1}\n", "a\n\x00"} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		if err := checkScript(text); err != nil {
			if !errors.Is(err, ErrUnfit) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		body := scriptBody(text)
		data, err := pipe.Marshal(pipe.Header{Kind: pipe.KindJob, Owner: "o", Job: "j", Attempt: 1}, body)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		req, err := pipe.Parse(data)
		if err != nil || req.Header == nil || !bytes.Equal(req.Body, body) {
			t.Fatalf("%q: %+v, %v", text, req, err)
		}
		_, sent, _ := bytes.Cut(body, []byte("\n"))
		if _, dropped, _ := bytes.Cut(text, []byte("\n")); !bytes.Equal(sent, dropped) {
			t.Errorf("%q became %q", text, body)
		}
	})
}

// FuzzConfiguration: whatever a configuration's file is called and holds, and
// whatever it is to be made of, the request's Bash is Bash, and its words
// reach the program as they are.
func FuzzConfiguration(f *testing.F) {
	f.Add("my host.nix", []byte("{ }\n"), "iso", "nixos-26.05")
	f.Add("it's.nix", []byte("{ imports = [ ./a.nix ../'b.nix ]; }\n"), "$(id)", "`id`")
	f.Add("\n.nix", []byte("import (./\"x)"), "'", "-")
	f.Fuzz(func(t *testing.T, name string, text []byte, format, nixpkgs string) {
		source := t.TempDir()
		if !utf8.ValidString(name) || strings.ContainsAny(name, "/\x00") || strings.ContainsRune(format+nixpkgs, 0) || checkName(source, name, text) != nil {
			return
		}
		if err := Check(job.RecipeNixOS, filepath.Join(source, name)); err != nil {
			return
		}
		j := job.Job{ID: "j", Name: job.OutputName(name), Drop: name, Recipe: job.RecipeNixOS}
		if err := Prepare(&j, source, job.NixOS{Format: format, System: "x86_64-linux", Nixpkgs: nixpkgs}); err != nil {
			t.Fatal(err)
		}
		body, err := Body(j, source)
		if err != nil {
			t.Fatal(err)
		}
		// Every other command is a function that does nothing.
		bash := exec.CommandContext(t.Context(), "bash", "-c", `
			mkdir() { :; }; tar() { :; }; command() { :; }; exec() { "$@"; }
			image-build() { printf '%s\0' "$@"; }
			INPUTS=x REPORT=/dev/null
			eval "$(cat)"`)
		bash.Stdin = bytes.NewReader(body)
		bash.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C"}
		said, err := bash.Output()
		if err != nil {
			t.Fatalf("%v\n%s", err, body)
		}
		want := strings.Join([]string{
			"--entry", nixosEntry(j), "--format", format, "--system", "x86_64-linux", "--nixpkgs", nixpkgs, "--name", j.Name, "source",
		}, "\x00") + "\x00"
		if string(said) != want {
			t.Errorf("image-build is called with %q, want %q\n%s", said, want, body)
		}
		var inputs bytes.Buffer
		if err := Inputs(j, source, &inputs); err != nil {
			t.Fatal(err)
		}
		archive := tar.NewReader(&inputs)
		h, err := archive.Next()
		if err != nil || h.Name != nixosEntry(j) || !filepath.IsLocal(h.Name) {
			t.Fatalf("%+v, %v", h, err)
		}
		if got, err := io.ReadAll(archive); err != nil || !bytes.Equal(got, text) {
			t.Errorf("%q became %q, %v", text, got, err)
		}
	})
}

// checkName makes the drop, if its name can be one. The inbox takes none that is not UTF-8.
func checkName(dir, name string, text []byte) error {
	if name == "" || name == "." || name == ".." {
		return os.ErrInvalid
	}
	return os.WriteFile(filepath.Join(dir, name), text, 0o600)
}
