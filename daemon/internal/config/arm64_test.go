package config

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
)

// Nobody can run compose.arm64.yaml where this is written. What can be held:
// Compose accepts it, it changes what it says, and both QEMU images are of one
// version, since they share their scripts.
func TestArm64Project(t *testing.T) {
	root, err := filepath.Abs(filepath.Join("..", "..", ".."))
	if err != nil {
		t.Fatal(err)
	}
	images, systems := map[string]string{}, map[string]string{}
	for _, files := range [][]string{{"compose.yaml"}, {"compose.yaml", "compose.arm64.yaml"}} {
		for i, file := range files {
			files[i] = filepath.Join(root, file)
		}
		options, err := cli.NewProjectOptions(files, cli.WithWorkingDirectory(root))
		if err != nil {
			t.Fatal(err)
		}
		project, err := options.LoadProject(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		vm, err := project.GetService("vm")
		if err != nil {
			t.Fatal(err)
		}
		vmimage, err := project.GetService("vmimage")
		if err != nil {
			t.Fatal(err)
		}
		sidecar, err := project.GetService("sidecar")
		if err != nil {
			t.Fatal(err)
		}
		images[vmimage.Platform] = vm.Image
		if system := sidecar.Environment["SYSTEM"]; system != nil {
			systems[vmimage.Platform] = *system
		}
		if len(vm.Environment) < 5 || vm.Labels[Label] != "true" {
			t.Errorf("%v: the VM has lost its settings: %v %v", files, vm.Environment, vm.Labels)
		}
	}
	if systems["linux/amd64"] != "x86_64-linux" || systems["linux/arm64"] != "aarch64-linux" {
		t.Errorf("jobs are for %v", systems)
	}
	x86, version, ok := strings.Cut(images["linux/amd64"], ":")
	if want := x86 + "-arm:" + version; !ok || len(images) != 2 || images["linux/arm64"] != want {
		t.Errorf("images by the platform of the VM's image: %v; want %q for arm64", images, want)
	}
}
