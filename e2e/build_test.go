//go:build e2e

package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/e2e/internal/harness"
)

// The main job: the example's image arrives whole, and it boots.
func TestExampleImageBoots(t *testing.T) {
	p := installation
	script, err := os.ReadFile(filepath.Join(p.Root, "examples", "hello-iso.sh"))
	if err != nil {
		t.Fatal(err)
	}
	p.Drop(t, "hello-iso.sh", string(script))
	r := p.Outcome(t, "hello-iso")
	if r.Status != "succeeded" {
		t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
	}
	if len(r.Artifacts) != 1 || r.Artifacts[0].Name != "hello.iso" {
		t.Fatalf("artifacts: %+v", r.Artifacts)
	}
	image := filepath.Join(r.Folder, "hello.iso")
	sum, size := digest(t, image)
	if a := r.Artifacts[0]; sum != a.SHA256 || size != a.Size {
		t.Errorf("hello.iso is %d bytes, %s; the VM said %d bytes, %s", size, sum, a.Size, a.SHA256)
	}
	sums, err := os.ReadFile(filepath.Join(r.Folder, "SHA256SUMS"))
	if err != nil {
		t.Fatal(err)
	}
	if want := sum + "  hello.iso\n"; string(sums) != want {
		t.Errorf("SHA256SUMS is %q, want %q", sums, want)
	}
	latest, err := os.Readlink(p.Output("hello-iso", "latest"))
	if err != nil || latest != filepath.Base(r.Folder) {
		t.Errorf("latest points at %q (%v), want %q", latest, err, filepath.Base(r.Folder))
	}
	source, err := os.ReadFile(filepath.Join(r.Folder, "source", "hello-iso.sh"))
	if err != nil || string(source) != string(script) {
		t.Errorf("source/hello-iso.sh is not what was dropped (%v)", err)
	}
	// The VM's own word, before the sidecar had a hand in it.
	said := ""
	for _, e := range harness.Events(t, p.Connect(t)) {
		if e.Type == "artifact" && e.Job == r.Job && e.Artifact.Name == "hello.iso" {
			said = e.Artifact.SHA256
		}
	}
	if said != sum {
		t.Errorf("the VM announced %q, the image is %q", said, sum)
	}

	const marker = "OSBUILDER HELLO: this image boots"
	if console, ok := boots(t, image, marker); !ok {
		t.Errorf("the image did not print %q on its console:\n%s", marker, console)
	}
}

// boots starts an image in a second QEMU, in a container of its own without
// network, until the marker is on the serial console or the image powers off.
func boots(t *testing.T, image, marker string) (console string, ok bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.StepTimeout)
	defer cancel()
	name := filepath.Base(installation.Dir) + "-boots"
	cmd := exec.CommandContext(ctx, "docker", "run", "--rm", "--name", name, "--network", "none",
		"--volume", image+":/image.iso:ro", "--entrypoint", "qemu-system-x86_64", installation.Images+"/qemu",
		"-accel", "tcg", "-m", "512", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot",
		"-cdrom", "/image.iso")
	defer func() { // gone already where the image powered off
		_ = exec.CommandContext(context.WithoutCancel(ctx), "docker", "rm", "--force", "--volumes", name).Run()
	}()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen strings.Builder
	buf := make([]byte, 4096)
	for {
		n, err := out.Read(buf)
		seen.Write(buf[:n])
		if strings.Contains(seen.String(), marker) {
			cancel()
			_, _ = io.Copy(io.Discard, out)
			_ = cmd.Wait()
			return seen.String(), true
		}
		if err != nil {
			_ = cmd.Wait()
			return seen.String(), false
		}
	}
}

func digest(t *testing.T, path string) (sum string, size int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	size, err = io.Copy(h, f)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(h.Sum(nil)), size
}

// A script that fails says so, with its last lines, and the next one runs.
func TestFailingScript(t *testing.T) {
	p := installation
	p.Drop(t, "fails.sh", "echo one step\necho the cause is this >&2\nexit 7\n")
	p.Drop(t, "after-fails.sh", "echo fine > \"$OUT/fine.txt\"\n")

	r := p.Outcome(t, "fails")
	if r.Status != "failed" || r.ExitCode == nil || *r.ExitCode != 7 {
		t.Errorf("status %s, exit code %v; want failed, 7", r.Status, r.ExitCode)
	}
	if diff := cmp.Diff([]string{"one step", "the cause is this"}, r.LastLines); diff != "" {
		t.Errorf("last lines (-want +got):\n%s", diff)
	}
	if r.Log != "one step\nthe cause is this\n" {
		t.Errorf("build.log: %q", r.Log)
	}
	for _, parts := range [][]string{
		{`"fails"`, "the cause is this"},
		{`"fails"`, "job finished", `"exit_code":7`},
	} {
		harness.Eventually(t, harness.StepTimeout, fmt.Sprintf("log line with %q", parts), func() bool { return p.Logged(t, parts...) })
	}

	next := p.Outcome(t, "after-fails")
	if next.Status != "succeeded" {
		t.Errorf("the next job: %s, %s", next.Status, next.Reason)
	}
	if data, err := os.ReadFile(filepath.Join(next.Folder, "fine.txt")); err != nil || string(data) != "fine\n" {
		t.Errorf("its artifact: %q, %v", data, err)
	}
}

// Ten drops at once: all run, once each. The jobs count themselves, in a
// folder of the VM that outlives them.
func TestTenAtOnce(t *testing.T) {
	p := installation
	const jobs = 10
	for i := range jobs {
		p.Drop(t, fmt.Sprintf("ten-%d.sh", i), fmt.Sprintf("echo run %d of %s\necho %d > \"$OUT/n\"\n", i, "$JOB_ID", i))
	}
	ids := make(map[string]bool)
	for i := range jobs {
		r := p.Outcome(t, fmt.Sprintf("ten-%d", i))
		if r.Status != "succeeded" {
			t.Errorf("job %d: %s, %s", i, r.Status, r.Reason)
		}
		if want := fmt.Sprintf("run %d of %s\n", i, r.Job); r.Log != want {
			t.Errorf("job %d logged %q, want %q", i, r.Log, want)
		}
		ids[r.Job] = true
	}
	if len(ids) != jobs {
		t.Errorf("%d different jobs, want %d", len(ids), jobs)
	}
	// Every start is in the stream of events, which only grows.
	started := make(map[string]int)
	for _, e := range harness.Events(t, p.Connect(t)) {
		if e.Type == "started" && ids[e.Job] {
			started[e.Job]++
		}
	}
	for id := range ids {
		if started[id] != 1 {
			t.Errorf("job %s was started %d times", id, started[id])
		}
	}
	if entries, err := filepath.Glob(p.Jobs("ten-*")); err != nil || len(entries) > 0 {
		t.Errorf("still in the inbox: %v, %v", entries, err)
	}
}

// The oldest way in: a person writes a script into pipe_in.
func TestPersonWritesPipeIn(t *testing.T) {
	client := installation.Connect(t)
	if out, err := harness.OnVM(t, client, "echo 'uname -a; id -un' > /nexus_bootstrap/pipe_in"); err != nil {
		t.Fatalf("write pipe_in: %v\n%s", err, out)
	}
	var said, user string
	harness.Eventually(t, harness.StepTimeout, "end of the anonymous job", func() bool {
		said, user = "", ""
		for _, e := range harness.Events(t, client) {
			if !strings.HasPrefix(e.Job, "anon-") {
				continue
			}
			switch e.Type {
			case "started":
				user = e.Started.User
			case "log":
				said += e.Log.Text
			case "finished":
				return true
			}
		}
		return false
	})
	if !regexp.MustCompile(`^Linux builder .*\n`+user+`\n$`).MatchString(said) || !strings.HasPrefix(user, "job-") {
		t.Errorf("as %q it said %q", user, said)
	}
}

// What can't be a job moves to rejected/, with a message beside it.
func TestRejectedDrop(t *testing.T) {
	p := installation
	p.Drop(t, "notes.txt", "not a job")
	// The message comes first, so that there is no moment without it.
	harness.Eventually(t, harness.StepTimeout, "rejected drop", func() bool {
		_, err := os.Stat(p.Jobs("rejected", "notes.txt"))
		return err == nil
	})
	message, err := os.ReadFile(p.Jobs("rejected", "notes.txt.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(message), ".sh") {
		t.Errorf("the message doesn't say what would be right: %q", message)
	}
	if data, err := os.ReadFile(p.Jobs("rejected", "notes.txt")); err != nil || string(data) != "not a job" {
		t.Errorf("the drop itself: %q, %v", data, err)
	}
	if _, err := os.Stat(p.Jobs("notes.txt")); !os.IsNotExist(err) {
		t.Errorf("still in the inbox: %v", err)
	}
}

// Nix is there for jobs, through its daemon, without a network: a derivation
// is built in the sandbox, and its output shipped by a link into the store.
func TestNix(t *testing.T) {
	p := installation
	p.Drop(t, "nix.sh", `cat > d.nix <<'NIX'
derivation { name = "hello"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo built by nix > $out" ]; }
NIX
nix-build --option substitute false d.nix
ln -s "$(readlink -f result)" "$OUT/hello"
`)
	r := p.Outcome(t, "nix")
	if r.Status != "succeeded" {
		t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
	}
	if data, err := os.ReadFile(filepath.Join(r.Folder, "hello")); err != nil || string(data) != "built by nix\n" {
		t.Errorf("the artifact: %q, %v", data, err)
	}
}

// The site's settings of Nix are the VM's.
func TestNixConfOfTheSite(t *testing.T) {
	out, err := harness.OnVM(t, installation.Connect(t), "nix config show log-lines")
	if err != nil || strings.TrimSpace(out) != "51" {
		t.Errorf("log-lines is %q (%v); VM_NIX_CONF says 51", out, err)
	}
}

// Whether the VM has KVM, and why not, is one line of its log.
func TestKVMIsSaid(t *testing.T) {
	line := regexp.MustCompile(`(?m)^KVM: (yes|no)\b.*$`)
	id := installation.Container(t, "vm")
	harness.Eventually(t, harness.StepTimeout, "line about KVM in the VM's log", func() bool { return line.MatchString(harness.Docker(t, "logs", id)) })
}
