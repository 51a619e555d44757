package main

import (
	"io"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/vmimage/internal/nixpkgs"
)

// FuzzOptions: whatever a request has it called with, the configuration lies
// in the source, and the image's name is a file's.
func FuzzOptions(f *testing.F) {
	for _, seed := range []string{
		"--entry host.nix --format iso --system x86_64-linux --nixpkgs nixos-26.05 --name host .", "--entry ../x .", "--name a/b .", "--nixpkgs x .", "-h", "--", "--format= --attribute=a .", "--out", "\x00",
	} {
		f.Add(strings.ReplaceAll(seed, " ", "\n"))
	}
	f.Fuzz(func(t *testing.T, args string) {
		dir := t.TempDir()
		t.Chdir(dir)
		o, _, err := options(strings.Split(args, "\n"), func(name string) string { return map[string]string{"OUT": dir}[name] }, io.Discard)
		if err != nil {
			return
		}
		if !filepath.IsLocal(o.Entry) || filepath.Base(o.Name) != o.Name && o.Name != "" || strings.HasPrefix(o.Name, ".") ||
			!filepath.IsAbs(o.Source) || !filepath.IsAbs(o.Out) || nixpkgs.Check(o.Nixpkgs) != nil || o.Format != "" && o.Attribute != "" {
			t.Errorf("%q: %+v", args, o)
		}
	})
}
