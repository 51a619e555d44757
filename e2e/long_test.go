//go:build e2e && long

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/e2e/internal/harness"
)

// What takes make test too long, and what other tests are close to: the daemon's
// TestStopped kills both halves at any point, though without a VM.

// The sidecar dies after it took the drop, before the VM could get it.
func TestKilledAfterTaken(t *testing.T) {
	p := installation
	noHalfImage(t, "killed-taken", 1)
	p.Connect(t) // the VM is up
	vm := p.Container(t, "vm")
	harness.Docker(t, "pause", vm)
	paused := true
	t.Cleanup(func() {
		if paused {
			harness.Docker(t, "unpause", vm)
		}
	})
	p.Drop(t, "killed-taken.sh", numbered(20, 1))
	p.ID(t, "killed-taken.sh")
	p.Kill9(t)
	harness.Docker(t, "unpause", vm)
	paused = false
	endedOnce(t, "killed-taken", 20)
}

// The sidecar dies as soon as the VM has said "accepted".
func TestKilledAfterAccepted(t *testing.T) {
	p := installation
	noHalfImage(t, "killed-accepted", 1)
	p.Drop(t, "killed-accepted.sh", numbered(100, 1))
	request := "job/" + p.ID(t, "killed-accepted.sh") + "/1"
	client := p.Connect(t)
	harness.Eventually(t, harness.JobTimeout, "accepted request", func() bool {
		for _, e := range harness.Events(t, client) {
			if e.Accepted.Request == request {
				return true
			}
		}
		return false
	})
	p.Kill9(t)
	endedOnce(t, "killed-accepted", 100)
}

// The sidecar dies in the middle of a download, and goes on with it.
func TestKilledInDownload(t *testing.T) {
	p := installation
	const size = 48
	noHalfImage(t, "killed-download", size)
	p.Drop(t, "killed-download.sh", numbered(5, size))
	harness.Eventually(t, harness.JobTimeout, "partial download", func() bool {
		files, err := filepath.Glob(p.Output(".partial", "*", "image.bin*"))
		if err != nil || len(files) == 0 {
			return false
		}
		info, err := os.Stat(files[0])
		return err == nil && info.Size() > 1<<20 && info.Size() < size<<20
	})
	p.Kill9(t)
	endedOnce(t, "killed-download", 5)
}

// A restart by hand in the middle of a job is nothing special.
func TestRestartInMidJob(t *testing.T) {
	p := installation
	noHalfImage(t, "restarted", 1)
	p.Drop(t, "restarted.sh", numbered(200, 1))
	harness.Eventually(t, harness.JobTimeout, "start of the job", func() bool { return p.Logged(t, "job started", `"restarted"`) })
	if _, err := p.Compose(t.Context(), "restart", "sidecar"); err != nil {
		t.Fatal(err)
	}
	endedOnce(t, "restarted", 200)
}

// The other format, and a mark that the installer's own module was in it.
func TestInstallerImage(t *testing.T) {
	useFixture(t)
	set(t, "FORMAT=install-iso")
	defer set(t, "FORMAT=iso")
	installation.Drop(t, "installer.nix", "{ boot.marker = \"MARKER of an installer\"; }\n")
	image(t, installation.Outcome(t, "installer"), nixpkgs, "image.modules", "MARKER of an installer")
}

// The other classes of failures; see [TestConfigurationThatFails].
func TestConfigurationThatFailsOtherwise(t *testing.T) {
	failures(t, []failure{
		{"syntax", "{ ... }: {\n  networking.hostName = ;\n}\n", "evaluation", "syntax.nix:2", "syntax error"},
		{"wrong-hash", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.wrong-hash ];\n}\n", "hash", "", "not what was expected"},
		{"crashing", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.crashing ];\n}\n", "killed", "", "crashing"},
		{"unreachable", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.unreachable ];\n}\n", "network", "", "example.invalid"},
		{"wants-kvm", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.needs-kvm ];\n}\n", "unsupported", "", "kvm"},
	})
}

// The other ends of a job; see [TestNoBuilderIsLeft].
func TestNoBuilderIsLeftByOtherEnds(t *testing.T) {
	p := installation
	client := p.Connect(t)
	t.Run("left behind", func(t *testing.T) {
		p.Drop(t, "left-behind.sh", endless+"exit 0\n")
		if r := p.Outcome(t, "left-behind"); r.Status != "succeeded" || !strings.Contains(r.Log, "it builds now") {
			t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
		untilIdle(t, client)
	})
	t.Run("cancelled though it ignores SIGTERM", func(t *testing.T) {
		p.Drop(t, "stubborn.sh", "trap '' TERM\necho it goes on\nwhile :; do sleep 1; done\n")
		harness.Eventually(t, harness.StepTimeout, "line of the job", func() bool { return p.Logged(t, `"job":"stubborn"`, "it goes on") })
		asked := time.Now()
		p.Osbuilder(t, "cancel", "stubborn")
		if r := p.Outcome(t, "stubborn"); r.Status != "cancelled" || r.Reason != "cancelled by hand" {
			t.Errorf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
		t.Logf("cancelled after %s", time.Since(asked).Round(time.Millisecond))
	})
	t.Run("too much memory", func(t *testing.T) {
		// More than a job may hold, and less than the VM has.
		p.Drop(t, "hungry.sh", "perl -e '$held = \"x\" x 1_700_000_000; print \"not ended\\n\"'\n")
		if r := p.Outcome(t, "hungry"); r.Status != "failed" || !strings.Contains(r.Reason, "memory") {
			t.Errorf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
	})
	t.Run("timeout", func(t *testing.T) {
		set(t, "JOB_TIMEOUT=30s")
		defer set(t, "JOB_TIMEOUT=6h")
		p.Drop(t, "too-long.sh", endless+"wait\n")
		untilBuilding(t, client)
		if r := p.Outcome(t, "too-long"); r.Status != "timeout" || !strings.Contains(r.Log, "it builds now") {
			t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
		untilIdle(t, client)
	})
}
