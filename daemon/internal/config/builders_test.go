package config

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/hint"
)

const labelled = "    image: vm\n    labels:\n      osbuilder.builder: \"true\"\n"

func TestBuilders(t *testing.T) {
	for _, tt := range []struct {
		name    string
		files   map[string]string
		compose Compose
		environ []string
		want    []string
		notes   int
	}{
		{
			name:  "label as a mapping, one service of two",
			files: map[string]string{"compose.yaml": "services:\n  vm:\n" + labelled + "  other:\n    image: x\n"},
			want:  []string{"vm"},
		},
		{
			name:  "label as a list, under another name of the file",
			files: map[string]string{"docker-compose.yml": "services:\n  vm:\n    image: x\n    labels: [osbuilder.builder=true, a=b]\n"},
			want:  []string{"vm"},
		},
		{
			name:  "a label that says no",
			files: map[string]string{"compose.yaml": "services:\n  vm:\n" + labelled + "  b:\n    labels:\n      osbuilder.builder: false\n"},
			want:  []string{"vm"},
		},
		{
			name: "the override adds one and takes one away",
			files: map[string]string{
				"compose.yaml":          "services:\n  vm:\n" + labelled + "  b:\n    image: x\n",
				"compose.override.yaml": "services:\n  vm:\n    labels: !reset {}\n  b:\n" + labelled,
			},
			want: []string{"b"},
		},
		{
			name: "COMPOSE_FILE leaves the override out, and its paths are the folder's",
			files: map[string]string{
				"compose.yaml":          "services:\n  vm:\n" + labelled,
				"compose.override.yaml": "services:\n  b:\n" + labelled,
				"more/c.yaml":           "services:\n  c:\n" + labelled,
			},
			compose: Compose{Files: "compose.yaml:more/c.yaml"},
			want:    []string{"c", "vm"},
		},
		{
			name: "COMPOSE_FILE and its separator from .env",
			files: map[string]string{
				"a.yaml": "services:\n  a:\n" + labelled, "b.yaml": "services:\n  b:\n" + labelled,
				".env": "COMPOSE_FILE=a.yaml;b.yaml\nCOMPOSE_PATH_SEPARATOR=;\n",
			},
			environ: []string{"COMPOSE_FILE="},
			want:    []string{"a", "b"},
		},
		{
			name: "profiles",
			files: map[string]string{
				"compose.yaml": "services:\n  vm:\n" + labelled + "  a:\n    profiles: [arm]\n" + labelled + "  b:\n    profiles: [big]\n" + labelled,
			},
			compose: Compose{Profiles: "gpu,arm"},
			want:    []string{"a", "vm"},
		},
		{
			name: "variables in label and include, from .env",
			files: map[string]string{
				"compose.yaml": "include: [\"${MORE}\"]\nservices:\n  vm:\n    labels:\n      osbuilder.builder: ${BUILD:-false}\n",
				"more.yaml":    "services:\n  c:\n" + labelled,
				".env":         "BUILD=true\nMORE=more.yaml\n",
			},
			want: []string{"c", "vm"},
		},
		{
			name: "variables that nobody here knows",
			files: map[string]string{
				"compose.yaml": "services:\n  vm:\n" + labelled +
					"    ports: [\"${ADDR}:${PORT:?set it}:22\"]\n    cpus: ${CPUS}\n    env_file: [\"${HOME}/none.env\"]\n" +
					"    mem_limit: ${MEM}\n    volumes: [\"${DATA}:/data\"]\n",
			},
			want: []string{"vm"},
		},
		{
			name: "an unknown extension of a newer Compose",
			files: map[string]string{
				"compose.yaml": "x-new: {a: 1}\nservices:\n  vm:\n    some_new_key: [1, 2]\n" + labelled,
			},
			want: []string{"vm"},
		},
		{
			name: "extends",
			files: map[string]string{
				"compose.yaml": "services:\n  vm:\n    extends: {file: base.yaml, service: base}\n",
				"base.yaml":    "services:\n  base:\n" + labelled,
			},
			want: []string{"vm"},
		},
		{
			name:    "a file outside",
			files:   map[string]string{"compose.yaml": "services:\n  vm:\n" + labelled},
			compose: Compose{Files: "compose.yaml:/no/such/override.yaml:../up.yaml"},
			want:    []string{"vm"},
			notes:   2,
		},
		{
			name:  "a broken .env",
			files: map[string]string{"compose.yaml": "services:\n  vm:\n" + labelled, ".env": "A='never closed\n"},
			want:  []string{"vm"},
			notes: 1,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := project(t, tt.files)
			builders, notes, err := findBuilders(t.Context(), dir, tt.compose, tt.environ)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, b := range builders {
				got = append(got, b.Name)
				if b.Addr != b.Name+":22" {
					t.Errorf("address %q of %q", b.Addr, b.Name)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if len(notes) != tt.notes {
				t.Errorf("notes: %q", notes)
			}
		})
	}
}

func TestNoBuilders(t *testing.T) {
	for _, tt := range []struct {
		name    string
		files   map[string]string
		compose Compose
		want    string // in the error
		hint    string
	}{
		{"no label", map[string]string{"compose.yaml": "services:\n  vm:\n    image: x\n"}, Compose{}, "no service of it is a builder", `osbuilder.builder: "true"`},
		{"no folder", nil, Compose{}, "no compose.yaml", ".:/project:ro"},
		{"a file that is absent", map[string]string{"compose.yaml": ""}, Compose{Files: "compose.yaml:none.yaml"}, "none.yaml", "project's folder"},
		{"only files outside", map[string]string{"compose.yaml": ""}, Compose{Files: "/no/such.yaml"}, "/no/such.yaml", "relative"},
		{"no YAML", map[string]string{"compose.yaml": "services: ["}, Compose{}, "compose.yaml", "docker compose config"},
		{"a name that is no folder", map[string]string{"compose.yaml": "services:\n  ..:\n" + labelled}, Compose{}, `".."`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := findBuilders(t.Context(), project(t, tt.files), tt.compose, nil)
			if !errors.Is(err, ErrProject) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v; want %q in it", err, tt.want)
			}
			if hints := strings.Join(hint.Of(err), " "); !strings.Contains(hints, tt.hint) {
				t.Errorf("hints %q; want %q in them", hints, tt.hint)
			}
		})
	}
}

// The project as it is committed, in both of its forms.
func TestOwnProject(t *testing.T) {
	for _, files := range []string{"", "compose.yaml:vmimage/qemu/compose.yaml"} {
		builders, notes, err := findBuilders(t.Context(), filepath.Join("..", "..", ".."), Compose{Files: files}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]string{"vm vm:22"}, addresses(builders)); diff != "" || len(notes) > 0 {
			t.Errorf("COMPOSE_FILE=%s: %s %q", files, diff, notes)
		}
	}
}

func project(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func addresses(builders []Builder) []string {
	var out []string
	for _, b := range builders {
		out = append(out, b.Name+" "+b.Addr)
	}
	return out
}

// What a builder is given is read with the variables that count: the container's
// own, which has those of the shell and of --env-file, before .env.
func TestWhatABuilderIsGiven(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		".env": "RAM_SIZE=8G\nDISK_SIZE=64G\n",
		"compose.yaml": "services:\n  a:\n" + labelled + "    environment:\n      RAM_SIZE: ${RAM_SIZE:-16G}\n      DISK_SIZE: ${DISK_SIZE:-128G}\n" +
			"      CPU_CORES: ${CPU_CORES:-4}\n      ODD: \n      NUMBER: 3\n  b:\n" + labelled + "    environment: [\"RAM_SIZE=${RAM_SIZE:-16G}\", KVM]\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	builders, notes, err := findBuilders(t.Context(), dir, Compose{}, []string{"RAM_SIZE=4G"})
	if err != nil || len(notes) > 0 {
		t.Fatal(err, notes)
	}
	want := []Builder{
		{"a", "a:22", "vm", map[string]string{"RAM_SIZE": "4G", "DISK_SIZE": "64G", "CPU_CORES": "4", "NUMBER": "3"}},
		{"b", "b:22", "vm", map[string]string{"RAM_SIZE": "4G", "KVM": ""}},
	}
	if diff := cmp.Diff(want, builders); diff != "" {
		t.Error(diff)
	}
}
