package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
)

// composed loads the project as Compose does, with a setting.
func composed(t *testing.T, setting string, files ...string) *types.Project {
	t.Helper()
	root, err := filepath.Abs(filepath.Join("..", "..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	for i, file := range files {
		files[i] = filepath.Join(root, file)
	}
	options, err := cli.NewProjectOptions(files, cli.WithWorkingDirectory(root), cli.WithEnv([]string{setting}))
	if err != nil {
		t.Fatal(err)
	}
	project, err := options.LoadProject(t.Context())
	if err != nil {
		t.Fatal(setting, err)
	}
	return project
}

// A folder may be named in every way that names one, and is made where it is
// absent.
func TestFoldersOfTheHost(t *testing.T) {
	root, err := filepath.Abs(filepath.Join("..", "..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	home, err := os.UserHomeDir()
	if err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"JOBS_DIR": "/jobs", "OUTPUT_DIR": "/output"} {
		for value, want := range map[string]string{
			"": filepath.Join(root, target), "mine": filepath.Join(root, "mine"), "./mine": filepath.Join(root, "mine"),
			"../mine": filepath.Join(filepath.Dir(root), "mine"), "/mine": "/mine", "~/mine": filepath.Join(home, "mine"), "my own": filepath.Join(root, "my own"),
		} {
			project := composed(t, name+"="+value, "compose.yaml")
			for _, service := range []string{"init", "sidecar"} {
				mounted := false
				for _, v := range project.Services[service].Volumes {
					if v.Target != target {
						continue
					}
					mounted = true
					if v.Type != types.VolumeTypeBind || v.Source != want || v.Bind == nil || !bool(v.Bind.CreateHostPath) {
						t.Errorf("%s=%s: %s has %s of %q at %s, want %q", name, value, service, v.Type, v.Source, target, want)
					}
				}
				if !mounted {
					t.Errorf("%s has nothing at %s", service, target)
				}
			}
		}
	}
}

// What is built here is built where it is absent, and otherwise neither built,
// for which the registry would be asked for the base images, nor pulled.
func TestNothingIsBuiltAtEveryStart(t *testing.T) {
	built := 0
	for name, service := range composed(t, "NO_COLOR=", "compose.yaml", "vmimage/qemu/compose.yaml").Services {
		ours := strings.HasPrefix(service.Image, "osbuilder/")
		if service.Build != nil {
			built++
		}
		if (service.Build != nil) && !ours || ours && service.PullPolicy != types.PullPolicyNever {
			t.Errorf("%s, of the image %s: pull_policy %q", name, service.Image, service.PullPolicy)
		}
	}
	if built != 3 {
		t.Errorf("%d services are built", built)
	}
}
