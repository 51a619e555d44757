//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"osbuilder/e2e/internal/harness"
)

// What the daemon says of damaged records can be typed as it stands, in the
// containers as they are; then everything is there again.
var restoreSteps = regexp.MustCompile(`docker compose (stop sidecar) && docker compose (run --rm --no-deps sidecar restore) && docker compose (up -d sidecar)\.`)

func TestDamagedRecords(t *testing.T) {
	p := installation
	p.Drop(t, "recorded.sh", "true\n")
	before := p.Outcome(t, "recorded")
	if out, err := p.Compose(t.Context(), "exec", "-T", "sidecar", "osbuilder", "restore"); err == nil || !strings.Contains(out, "Another osbuilder uses it") {
		t.Errorf("restored while the daemon runs: %v, %s", err, out)
	}
	sidecar := p.Container(t, "sidecar")
	compose := func(args string) string {
		t.Helper()
		out, err := p.Compose(t.Context(), strings.Fields(args)...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	compose("stop sidecar")
	if out, err := p.Compose(t.Context(), "run", "--rm", "--no-deps", "sidecar", "restore"); err == nil || !strings.Contains(out, "the records are sound") {
		t.Errorf("restored what is sound: %v, %s", err, out)
	}
	damaged := filepath.Join(t.TempDir(), "osbuilder.db")
	if err := os.WriteFile(damaged, []byte(strings.Repeat("no records\n", 5000)), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(damaged, 0o666); err != nil { // whoever the daemon is
		t.Fatal(err)
	}
	harness.Docker(t, "cp", damaged, sidecar+":/state/osbuilder.db")
	compose("up -d --no-build sidecar")
	var steps []string
	harness.Eventually(t, harness.StepTimeout, "word of the damaged records", func() bool {
		steps = restoreSteps.FindStringSubmatch(harness.Docker(t, "logs", p.Container(t, "sidecar")))
		return steps != nil
	})
	for _, step := range steps[1:] {
		compose(strings.Replace(step, "up -d", "up -d --no-build", 1)) // the test's images are made before it
	}
	harness.Eventually(t, harness.StepTimeout, "daemon that goes on from a copy", func() bool {
		out, err := p.Compose(t.Context(), "exec", "-T", "sidecar", "osbuilder", "jobs", "--all")
		return err == nil && strings.Contains(out, "ID ") && p.Logged(t, "records are those of a copy")
	})
	// What was published since the copy is not lost, and new jobs run.
	p.Drop(t, "after-restore.sh", "true\n")
	if r := p.Outcome(t, "after-restore"); r.Status != "succeeded" {
		t.Errorf("%s: %s", r.Status, r.Reason)
	}
	if again := p.Results(t, "recorded"); len(again) != 1 || again[0].Job != before.Job {
		t.Errorf("the outcomes of what was recorded: %v", again)
	}
	if p.Logged(t, "it has to be dropped again", before.Job) {
		t.Error("a published job is said to be lost")
	}
}
