package config

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzCompose: whatever the user's compose.yaml and .env say, builders come of
// it that can be one, or an error that says which file it is about.
func FuzzCompose(f *testing.F) {
	const good = "services:\n  vm:\n    image: ${IMAGE:-x}\n    labels:\n      osbuilder.builder: \"true\"\n"
	for _, seed := range [][2]string{
		{good, "IMAGE=y\n"},
		{good + "    profiles: [a]\n", "COMPOSE_PROFILES=a\n"},
		{good + "  \"..\":\n    labels: [osbuilder.builder=true]\n", "X='\n"},
		{"services: {a: &a {labels: *a}}\n", ""},
		{"services: []\n", "A=${A}\n"},
		{"include: [b.yaml]\n", "\x00=\n"},
		{"services:\n  vm:\n    extends: vm\n", ""},
		{"\t", "="},
		{"services:\n  a:\n    environment: {A: [1]}\n    labels: {osbuilder.builder: yes}\n", ""},
	} {
		f.Add([]byte(seed[0]), []byte(seed[1]))
	}
	f.Fuzz(func(t *testing.T, compose, env []byte) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{"compose.yaml": compose, ".env": env} {
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		builders, _, err := findBuilders(t.Context(), dir, Compose{}, nil)
		if err != nil {
			if !errors.Is(err, ErrProject) {
				t.Errorf("%q: %v", compose, err)
			}
			return
		}
		for _, b := range builders {
			if !serviceName.MatchString(b.Name) || !filepath.IsLocal(b.Name) {
				t.Errorf("%q: builder %q", compose, b.Name)
			}
		}
	})
}
