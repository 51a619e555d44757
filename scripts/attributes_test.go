package scripts

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"osbuilder/internal/testenv"
)

// A clone with Git for Windows has the line ends that containers need, and
// what tests read comes as it is.
func TestLineEndsOfAClone(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		testenv.Lacks(t, "there is no git")
	}
	attributes, err := os.ReadFile(filepath.Join("..", ".gitattributes"))
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	files := map[string][]byte{
		".gitattributes":       attributes,
		"vmimage/qemu/hook.sh": []byte("#!/bin/sh\ntrue\n"),
		"a/testdata/unix.sh":   []byte("true\n"),
		"a/testdata/dos.sh":    []byte("true\r\n"),
		"testdata/mixed":       []byte("a\r\nb\n"),
	}
	for name, text := range files {
		path := filepath.Join(root, filepath.FromSlash(name))
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, text, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	git := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "git", append([]string{
			"-c", "core.autocrlf=true", "-c", "core.hooksPath=/dev/null", "-c", "user.name=n", "-c", "user.email=n@example.org",
		}, args...)...)
		cmd.Dir = root
		cmd.Env = append(cmd.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1", "GIT_CEILING_DIRECTORIES="+filepath.Dir(root))
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("git %s: %v: %s", args[0], err, out)
		}
	}
	git("init", "--quiet")
	git("add", ".")
	git("commit", "--quiet", "--message", "all")
	for name := range files {
		if err := os.Remove(filepath.Join(root, filepath.FromSlash(name))); err != nil {
			t.Fatal(err)
		}
	}
	git("checkout", "--quiet", "--force", "HEAD", "--", ".gitattributes")
	git("checkout", "--quiet", "--force", "HEAD", "--", ".")
	for name, want := range files {
		if got, err := os.ReadFile(filepath.Join(root, filepath.FromSlash(name))); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is checked out as %q, want %q, %v", name, got, want, err)
		}
	}
}
