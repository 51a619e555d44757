//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/e2e/internal/harness"
)

// numbered is a job that says n numbered lines, slowly enough to be caught in
// the middle, and ships size MiB.
func numbered(lines, size int) string {
	return fmt.Sprintf(`for i in $(seq %d); do echo "line $i of $JOB_ID"; sleep 0.05; done
head -c %dM /dev/urandom > "$OUT/image.bin"
echo "shipped"
`, lines, size)
}

// wholeLog reports what is wrong with the log of a numbered job.
func wholeLog(r harness.Result, lines int) error {
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d of %s\n", i+1, r.Job)
	}
	want.WriteString("shipped\n")
	if r.Log != want.String() {
		return fmt.Errorf("build.log has %d bytes, want %d; it ends %q", len(r.Log), want.Len(), tail(r.Log))
	}
	return nil
}

func tail(s string) string { return s[max(0, len(s)-200):] }

// endedOnce checks what must hold for a job that was disturbed: one outcome,
// every line once, the image whole, nothing left behind.
func endedOnce(t *testing.T, name string, lines int) {
	t.Helper()
	p := installation
	r := p.Outcome(t, name)
	if r.Status != "succeeded" || r.Attempts != 1 {
		t.Errorf("status %s after %d attempts: %s", r.Status, r.Attempts, r.Reason)
	}
	if err := wholeLog(r, lines); err != nil {
		t.Error(err)
	}
	if len(r.Artifacts) != 1 {
		t.Fatalf("artifacts: %+v", r.Artifacts)
	}
	sum, size := digest(t, filepath.Join(r.Folder, "image.bin"))
	if a := r.Artifacts[0]; sum != a.SHA256 || size != a.Size {
		t.Errorf("image.bin is %d bytes, %s; announced were %d bytes, %s", size, sum, a.Size, a.SHA256)
	}
	harness.Eventually(t, harness.StepTimeout, "clean folder for partial downloads", func() bool {
		left, err := os.ReadDir(p.Output(".partial"))
		return len(left) == 0 && (err == nil || os.IsNotExist(err))
	})
	// The last word about a job is that the VM may forget it. Nothing more
	// came of it until then, and the VM started it once.
	client := p.Connect(t)
	starts := 0
	harness.Eventually(t, harness.StepTimeout, "acknowledgement", func() bool {
		acknowledged := false
		starts = 0
		for _, e := range harness.Events(t, client) {
			if e.Type == "started" && e.Job == r.Job {
				starts++
			}
			acknowledged = acknowledged || e.Accepted.Request == "acknowledge/"+r.Job+"/1"
		}
		return acknowledged
	})
	if starts != 1 || len(p.Results(t, name)) != 1 {
		t.Errorf("%d starts in the VM, %d outcomes", starts, len(p.Results(t, name)))
	}
}

// noHalfImage looks at output/NAME until stop is closed: whatever is visible
// there at any moment must be whole: an image of size MiB, and all that goes
// with it.
func noHalfImage(t *testing.T, name string, size int64) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(5 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			folders, _ := filepath.Glob(installation.Output(name, "*"))
			for _, folder := range folders {
				if !harness.IsOutcome(folder) {
					continue
				}
				for _, file := range []string{"image.bin", "SHA256SUMS", "result.json", "build.log"} {
					info, err := os.Stat(filepath.Join(folder, file))
					if err != nil || file == "image.bin" && info.Size() != size<<20 {
						t.Errorf("half a result is visible: %s (%v)", filepath.Join(folder, file), err)
						return
					}
				}
			}
		}
	}()
	t.Cleanup(func() {
		close(stop)
		<-done
	})
}

// The sidecar dies while lines of the job come in.
func TestKilledInMidJob(t *testing.T) {
	p := installation
	noHalfImage(t, "killed-running", 1)
	p.Drop(t, "killed-running.sh", numbered(100, 1))
	harness.Eventually(t, harness.JobTimeout, "lines of the job", func() bool { return p.Logged(t, `"killed-running"`, "line 20 of ") })
	p.Kill9(t)
	endedOnce(t, "killed-running", 100)
}

// The VM powers itself off under a job and comes back with its disk: the job
// runs again, and its log says so. Last, since it begins another generation.
func TestVMStoppedAndStarted(t *testing.T) {
	p := installation
	p.Drop(t, "vm-stopped.sh", `echo "try $JOB_ATTEMPT"
[ "$JOB_ATTEMPT" = 2 ] || sleep 600
echo fine > "$OUT/fine"
`)
	harness.Eventually(t, harness.JobTimeout, "first try", func() bool { return p.Logged(t, `"vm-stopped"`, "try 1") })
	for _, verb := range []string{"stop", "start"} {
		if _, err := p.Compose(t.Context(), verb, "vm"); err != nil {
			t.Fatal(err)
		}
	}
	r := p.Outcome(t, "vm-stopped")
	if r.Status != "succeeded" || r.Attempts != 2 || !strings.HasPrefix(r.Log, "try 1\n") || !strings.HasSuffix(r.Log, "]\ntry 2\n") {
		t.Errorf("status %s (%s) after %d attempts, build.log %q", r.Status, r.Reason, r.Attempts, r.Log)
	}
	for _, line := range [][]string{{"link to the builder lost", `"hint"`}, {"builder can't be reached yet", `"rung"`, `"hint"`}, {"builder is up"}} {
		if !p.Logged(t, line...) {
			t.Errorf("no line with %q", line)
		}
	}
	out := harness.Docker(t, "logs", p.Container(t, "vm"))
	if n := strings.Count(out, "formatted"); n != 1 {
		t.Errorf("the data disk was formatted %d times:\n%s", n, out)
	}
	// What the sidecar would tell of a VM that it can't reach.
	seen := harness.Docker(t, "exec", p.Container(t, "vm"), "cat", "/status/vm/state", "/status/vm/console")
	if !strings.HasPrefix(seen, "running\n") || !strings.Contains(seen, "osbuilder: address ") {
		t.Errorf("in the volume status lies:\n%s", seen)
	}
}
