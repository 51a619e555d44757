//go:build e2e

package vmimage

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/e2e/internal/harness"
)

// A maker is an installation of its own of which only the service vmimage is
// started, in the flavour that makes its image by itself: the committed
// service, with its rights and mounts, a real Nix, and a nixpkgs of a few lines
// in place of the real one.
type maker struct {
	p       harness.Project
	dir     string
	storage string // where vm-storage lies, unless it has a size

	// Of the next run.
	command     []string
	environment map[string]string
	volumes     []string // further mounts
	noNetwork   bool
}

// fixture is the nixpkgs: the address of a tarball, so that it is pinned.
const fixture = "file:///fixture/nixpkgs.tar.gz"

// newMaker makes the installation. A size makes its storage a file system of
// that size.
func newMaker(t *testing.T, size string) *maker {
	t.Helper()
	name := filepath.Base(installation.Dir) + "-" + strings.ToLower(strings.TrimPrefix(t.Name(), "Test"))
	m := &maker{p: *installation, dir: t.TempDir()}
	m.p.Env = append(append([]string{}, m.p.Env...), "COMPOSE_PROJECT_NAME="+name, "VM_FLAVOUR=nixos", "VM_NIXPKGS="+fixture,
		// Without one Nix would ask the public one again and again.
		"VM_NIX_CONF=substituters =")
	m.environment = map[string]string{"DISK_NEEDED": "1"}
	m.storage = filepath.Join(m.dir, "storage")
	for _, dir := range []string{m.storage, m.fixture()} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.pack(t)
	storage := map[string]string{"type": "tmpfs", "device": "tmpfs", "o": "size=" + size}
	if size == "" {
		storage = map[string]string{"type": "none", "device": m.storage, "o": "bind"}
	}
	m.write(t, "storage.json", map[string]any{"volumes": map[string]any{"vm-storage": map[string]any{"driver_opts": storage}}})
	files, err := m.p.ComposeFiles()
	if err != nil {
		t.Fatal(err)
	}
	m.p.Env = append(m.p.Env, "COMPOSE_FILE="+strings.Join(append(files, filepath.Join(m.dir, "storage.json"), filepath.Join(m.dir, "run.json")), ":"))
	t.Cleanup(func() {
		m.override(t)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), harness.StepTimeout)
		defer cancel()
		out, err := m.p.Command(ctx, "down", "--volumes", "--timeout", "1").CombinedOutput()
		if err != nil {
			t.Errorf("remove %s: %v\n%s", name, err, out)
		}
	})
	return m
}

// fixture is the folder that the service sees as /fixture.
func (m *maker) fixture() string { return filepath.Join(m.dir, "fixture") }

// pack makes the tarball of the nixpkgs, with further files if there are any.
func (m *maker) pack(t *testing.T, more ...string) {
	t.Helper()
	var packed bytes.Buffer
	zipped := gzip.NewWriter(&packed)
	w := tar.NewWriter(zipped)
	err := w.AddFS(os.DirFS(filepath.Join(m.p.Root, "e2e", "vmimage", "testdata", "nixpkgs")))
	for _, name := range more {
		err = errors.Join(err, w.WriteHeader(&tar.Header{Name: name, Mode: 0o644}))
	}
	err = errors.Join(err, w.Close(), zipped.Close(), os.WriteFile(filepath.Join(m.fixture(), "nixpkgs.tar.gz"), packed.Bytes(), 0o644))
	if err != nil {
		t.Fatal(err)
	}
}

func (m *maker) write(t *testing.T, name string, value any) {
	t.Helper()
	data, err := json.Marshal(value)
	if err == nil {
		err = os.WriteFile(filepath.Join(m.dir, name), data, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func (m *maker) override(t *testing.T) {
	t.Helper()
	service := map[string]any{
		"command":     m.command,
		"environment": m.environment,
		"volumes":     append([]string{m.fixture() + ":/fixture:ro"}, m.volumes...),
	}
	if m.noNetwork {
		service["network_mode"] = "none"
	}
	m.write(t, "run.json", map[string]any{"services": map[string]any{"vmimage": service}})
}

// run starts the service and returns what it said and its exit code. At each
// line, what is to happen then happens, if anything.
func (m *maker) run(t *testing.T, at func(line string), more ...string) (string, int) {
	t.Helper()
	m.override(t)
	cmd := m.p.Command(t.Context(), "--ansi", "never", "up", "--no-build", "--force-recreate", "--no-log-prefix", "--exit-code-from", "vmimage", "vmimage")
	cmd.Env = append(cmd.Env, more...)
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		w.Close()
		ended <- err
	}()
	var said strings.Builder
	for lines := bufio.NewScanner(r); lines.Scan(); {
		said.WriteString(lines.Text() + "\n")
		if at != nil {
			at(lines.Text())
		}
	}
	if err := <-ended; err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			t.Fatal(err)
		}
		return said.String(), exit.ExitCode()
	}
	return said.String(), 0
}

// image reads the ISO that is in the storage; nil if there is none.
func (m *maker) image(t *testing.T) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(m.storage, "boot.iso"))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	return data
}

// pin reads which nixpkgs is kept to.
func (m *maker) pin(t *testing.T) string {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(m.storage, "nixpkgs", "*"))
	if err != nil || len(pins) != 1 {
		t.Fatalf("which nixpkgs it was is not kept: %v, %v", pins, err)
	}
	text, err := os.ReadFile(pins[0])
	if err != nil || !bytes.Contains(text, []byte(`"sha256:`)) {
		t.Fatalf("%s (%v):\n%s", pins[0], err, text)
	}
	return string(text)
}

// says holds what was said and the exit code against what is expected.
func says(t *testing.T, said string, code, want int, parts ...string) {
	t.Helper()
	if code != want {
		t.Errorf("exit code %d, want %d", code, want)
	}
	for _, part := range parts {
		if !strings.Contains(said, part) {
			t.Errorf("it does not say %q", part)
		}
	}
	if t.Failed() {
		t.Fatalf("it said:\n%s", said)
	}
}

// It is made once, and made anew when what it is made from has changed.
func TestVMImageIsMade(t *testing.T) {
	m := newMaker(t, "")
	said, code := m.run(t, nil)
	says(t, said, code, 0, "step 1 of 5", "step 2 of 5", "step 3 of 5", "step 4 of 5", "step 5 of 5", "FIXTURE is being built", "was put into its storage")
	first := m.image(t)
	if !bytes.Contains(first, []byte("CD001 FIXTURE")) {
		t.Fatal("what is in the storage is not what was built")
	}
	m.pin(t)

	said, code = m.run(t, nil)
	says(t, said, code, 0, "is up to date")
	if strings.Contains(said, "step") {
		t.Errorf("it was made again:\n%s", said)
	}

	changed := filepath.Join(m.dir, "configuration.nix")
	if err := os.WriteFile(changed, []byte("{ } # another one\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.volumes = []string{changed + ":/osbuilder/nixos/configuration.nix:ro"}
	said, code = m.run(t, nil)
	says(t, said, code, 0, "step 2 of 5", "was replaced", "docker compose restart vm")
	if second := m.image(t); !bytes.Contains(second, []byte("another one")) {
		t.Error("the new ISO is not of the new sources")
	}

	m.pack(t, "another-file")
	said, code = m.run(t, nil)
	says(t, said, code, 0, "is up to date")
	// Kept to, until it is asked to move on.
	before := m.pin(t)
	m.command = []string{"renew"}
	said, code = m.run(t, nil)
	says(t, said, code, 0, "step 2 of 5", "is the same")
	m.command = nil
	if after := m.pin(t); after == before {
		t.Error("nixpkgs was not renewed")
	}
	said, code = m.run(t, nil)
	says(t, said, code, 0, "is up to date")

	given := filepath.Join(m.dir, "given.iso")
	if err := os.WriteFile(given, append(make([]byte, 32769), "CD001 given"...), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"is taken; none is made", "is in place"} {
		said, code = m.run(t, nil, "BOOT_ISO="+given)
		says(t, said, code, 0, want)
		if got := m.image(t); !bytes.HasSuffix(got, []byte("CD001 given")) || strings.Contains(said, "step") {
			t.Fatalf("the given ISO is not what is there; it said:\n%s", said)
		}
	}
	said, code = m.run(t, nil)
	says(t, said, code, 0, "was replaced")
}

// Killed at any point the old image stays, and the next run makes the new one.
func TestVMImageInterrupted(t *testing.T) {
	m := newMaker(t, "")
	said, code := m.run(t, nil)
	says(t, said, code, 0, "was put into its storage")
	old := m.image(t)

	changed := filepath.Join(m.dir, "configuration.nix")
	if err := os.WriteFile(changed, []byte("{ } # another one\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m.volumes = []string{changed + ":/osbuilder/nixos/configuration.nix:ro"}
	// While it is there the build doesn't end.
	wait := filepath.Join(m.fixture(), "wait")
	if err := os.WriteFile(wait, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		at   string
		kill []string
	}{
		{"step 1 of 5", []string{"kill", "--signal", "KILL"}},
		{"step 3 of 5", []string{"kill", "--signal", "KILL"}},
		{"FIXTURE waits", []string{"kill", "--signal", "KILL"}},
		{"FIXTURE waits", []string{"stop", "--time", "20"}},
		{"step 5 of 5", []string{"kill", "--signal", "KILL"}},
	} {
		if c.at == "step 5 of 5" {
			if err := os.Remove(wait); err != nil {
				t.Fatal(err)
			}
		}
		done := false
		start := time.Now()
		said, code := m.run(t, func(line string) {
			if !done && strings.Contains(line, c.at) {
				done = true
				start = time.Now()
				// It may have ended by itself between the line and this.
				_ = exec.CommandContext(t.Context(), "docker", append(append([]string{}, c.kill...), m.p.Container(t, "vmimage"))...).Run()
			}
		})
		if !done {
			t.Fatalf("it never said %q:\n%s", c.at, said)
		}
		if got := m.image(t); !bytes.Equal(got, old) && !bytes.Contains(got, []byte("another one")) {
			t.Fatalf("%s at %q: what is there is neither the old image nor the new one:\n%s", c.kill[0], c.at, said)
		}
		if c.at == "FIXTURE waits" {
			if !bytes.Equal(m.image(t), old) || code == 0 {
				t.Errorf("%s at %q: exit code %d, and the image changed: %v", c.kill[0], c.at, code, !bytes.Equal(m.image(t), old))
			}
			if c.kill[0] == "stop" {
				says(t, said, 1, 1, "interrupted; the ISO in the storage is as it was")
				if took := time.Since(start); took > 15*time.Second {
					t.Errorf("stopping took %s", took)
				}
			}
		}
	}
	said, code = m.run(t, nil)
	if code != 0 || !bytes.Contains(m.image(t), []byte("another one")) {
		t.Fatalf("exit code %d:\n%s", code, said)
	}
	entries, err := os.ReadDir(m.storage)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || strings.Contains(e.Name(), ".new") {
			t.Errorf("left over: %s", e.Name())
		}
	}
}

// Without a network: said plainly, with what to do. If there is an image, that
// one is kept, and the VM may start.
func TestVMImageWithoutNetwork(t *testing.T) {
	m := newMaker(t, "")
	m.noNetwork = true
	said, code := m.run(t, nil, "VM_NIXPKGS=nixos-26.05")
	says(t, said, code, 1, "VM_FLAVOUR=debian", "the VM's ISO was not made (network)")

	said, code = m.run(t, nil)
	says(t, said, code, 0, "was put into its storage")
	before := m.image(t)
	said, code = m.run(t, nil, "VM_NIXPKGS=nixos-26.05")
	says(t, said, code, 0, "warning: the VM's ISO was not made anew", "VM_FLAVOUR=debian")
	// Asked for on purpose, it is an error.
	m.command = []string{"renew"}
	said, code = m.run(t, nil, "VM_NIXPKGS=nixos-26.05")
	says(t, said, code, 1, "the VM's ISO was not made (network)")
	if !bytes.Equal(before, m.image(t)) {
		t.Error("the image that was there was not kept")
	}
}

// A disk without room: figures before anything is made, and no half image
// where it fills up all the same.
func TestVMImageWithoutRoom(t *testing.T) {
	m := newMaker(t, "2m")
	m.environment["DISK_NEEDED"] = "99999999"
	said, code := m.run(t, nil)
	says(t, said, code, 1, "needed, by estimate: 99999999 MiB", "VM_FLAVOUR=debian", "there is not enough room")
	m.environment["DISK_NEEDED"] = "0"
	said, code = m.run(t, nil)
	says(t, said, code, 1, "cannot write the VM's ISO (3 MiB) into /storage")
}
