package config

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/caarlos0/env/v11"
	gocmp "github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
)

// What a variable is and what its default is stands in four places: in the
// code, in compose.yaml, in .env.example and in docs/configuration.md. All say
// the same, each of all.
func TestFourPlacesAgree(t *testing.T) {
	composed := composeVariables(t)
	code := map[string]string{}
	for service, fields := range map[string][]env.FieldParams{"sidecar": fields(t, &Config{}), "init": fields(t, &Init{})} {
		given := composeEnvironment(t, service)
		for _, f := range fields {
			code[f.Key] = f.DefaultValue
			if _, ok := given[f.Key]; !ok {
				t.Errorf("%s is in the code, but compose.yaml does not give it to the service %s", f.Key, service)
			}
			delete(given, f.Key)
		}
		for key := range given {
			t.Errorf("compose.yaml gives %s to the service %s, which does not know it", key, service)
		}
	}
	for key, value := range code {
		if got, ok := composed[key]; !ok || got != value {
			t.Errorf("%s: default %q in the code, %q in compose.yaml", key, value, got)
		}
	}
	if diff := gocmp.Diff(composed, exampleVariables(t)); diff != "" {
		t.Errorf("compose.yaml (-) and .env.example (+): %s", diff)
	}
	if diff := gocmp.Diff(composed, documentedVariables(t)); diff != "" {
		t.Errorf("compose.yaml (-) and docs/configuration.md (+): %s", diff)
	}
}

func fields(t *testing.T, config any) []env.FieldParams {
	t.Helper()
	all, err := env.GetFieldParams(config)
	if err != nil || len(all) == 0 {
		t.Fatal(all, err)
	}
	return slices.DeleteFunc(all, func(f env.FieldParams) bool { return f.Ignored || f.Key == "" })
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "..", "..", path))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

var (
	reference = regexp.MustCompile(`\$\{([A-Z][A-Z0-9_]*)(?::-([^}]*))?\}`)
	setting   = regexp.MustCompile(`(?m)^(?:# )?([A-Z][A-Z0-9_]*)=(.*)$`)
	tableRow  = regexp.MustCompile("(?m)^\\| `([A-Z][A-Z0-9_]*)` \\| (?:`([^`|]*)`|empty) \\|")
)

// composeVariables returns what the Compose files interpolate, with defaults.
func composeVariables(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, file := range []string{"compose.yaml", "vmimage/qemu/compose.yaml"} {
		for line := range strings.Lines(read(t, file)) {
			if strings.HasPrefix(strings.TrimSpace(line), "#") {
				continue
			}
			for _, m := range reference.FindAllStringSubmatch(strings.ReplaceAll(line, "$$", ""), -1) {
				if before, ok := found[m[1]]; ok && before != m[2] {
					t.Errorf("%s: %s has the default %q here and %q elsewhere", file, m[1], m[2], before)
				}
				found[m[1]] = m[2]
			}
		}
	}
	return found
}

// composeEnvironment returns the variables that a service is given. Each must
// be handed on under its own name.
func composeEnvironment(t *testing.T, service string) map[string]string {
	t.Helper()
	var project struct {
		Services map[string]struct {
			Environment map[string]string `yaml:"environment"`
		} `yaml:"services"`
	}
	if err := yaml.Unmarshal([]byte(read(t, "compose.yaml")), &project); err != nil {
		t.Fatal(err)
	}
	given := project.Services[service].Environment
	if len(given) == 0 {
		t.Fatalf("the service %s has no environment", service)
	}
	for key, value := range given {
		if m := reference.FindStringSubmatch(value); m == nil || m[0] != value || m[1] != key {
			t.Errorf("%s of the service %s is %q", key, service, value)
		}
	}
	return maps.Clone(given)
}

func exampleVariables(t *testing.T) map[string]string {
	return collect(t, ".env.example", setting)
}

func documentedVariables(t *testing.T) map[string]string {
	return collect(t, "docs/configuration.md", tableRow)
}

func collect(t *testing.T, file string, pattern *regexp.Regexp) map[string]string {
	t.Helper()
	found := map[string]string{}
	for _, m := range pattern.FindAllStringSubmatch(read(t, file), -1) {
		if _, ok := found[m[1]]; ok {
			t.Errorf("%s names %s twice", file, m[1])
		}
		found[m[1]] = m[2]
	}
	return found
}
