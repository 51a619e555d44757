//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
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
func wholeLog(r result, lines int) error {
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d of %s\n", i+1, r.Job)
	}
	want.WriteString("shipped\n")
	if r.log != want.String() {
		return fmt.Errorf("build.log has %d bytes, want %d; it ends %q", len(r.log), want.Len(), tail(r.log))
	}
	return nil
}

func tail(s string) string { return s[max(0, len(s)-200):] }

// endedOnce checks what must hold for a job that was disturbed: one outcome,
// every line once, the image whole, nothing left behind.
func endedOnce(t *testing.T, name string, lines int) {
	t.Helper()
	p := installation
	r := p.outcome(t, name)
	if r.Status != "succeeded" || r.Attempts != 1 {
		t.Errorf("status %s after %d attempts: %s", r.Status, r.Attempts, r.Reason)
	}
	if err := wholeLog(r, lines); err != nil {
		t.Error(err)
	}
	if len(r.Artifacts) != 1 {
		t.Fatalf("artifacts: %+v", r.Artifacts)
	}
	sum, size := digest(t, filepath.Join(r.folder, "image.bin"))
	if a := r.Artifacts[0]; sum != a.SHA256 || size != a.Size {
		t.Errorf("image.bin is %d bytes, %s; announced were %d bytes, %s", size, sum, a.Size, a.SHA256)
	}
	eventually(t, stepTimeout, "clean folder for partial downloads", func() bool {
		left, err := os.ReadDir(p.output(".partial"))
		return len(left) == 0 && (err == nil || os.IsNotExist(err))
	})
}

// noHalfImage looks at output/NAME until stop is closed: whatever is visible
// there at any moment must be whole.
func noHalfImage(t *testing.T, name string) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			folders, _ := filepath.Glob(installation.output(name, "*"))
			for _, folder := range folders {
				if !isOutcome(folder) {
					continue
				}
				for _, file := range []string{"image.bin", "SHA256SUMS", "result.json", "build.log"} {
					info, err := os.Stat(filepath.Join(folder, file))
					if err != nil || file == "image.bin" && info.Size()%(1<<20) != 0 {
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

// The sidecar dies after it took the drop, before the VM could get it.
func TestKilledAfterTaken(t *testing.T) {
	p := installation
	p.connect(t) // the VM is up
	vm := p.container(t, "vm")
	docker(t, "pause", vm)
	paused := true
	t.Cleanup(func() {
		if paused {
			docker(t, "unpause", vm)
		}
	})
	p.drop(t, "killed-taken.sh", numbered(20, 1))
	eventually(t, stepTimeout, "taken drop", func() bool {
		_, err := os.Stat(p.jobs("killed-taken.sh"))
		return os.IsNotExist(err)
	})
	p.kill9(t)
	docker(t, "unpause", vm)
	paused = false
	endedOnce(t, "killed-taken", 20)
}

// The sidecar dies while the job runs.
func TestKilledAfterAccepted(t *testing.T) {
	p := installation
	noHalfImage(t, "killed-accepted")
	p.drop(t, "killed-accepted.sh", numbered(100, 1))
	eventually(t, jobTimeout, "start of the job", func() bool { return p.logs.has("job started", `"killed-accepted"`) })
	p.kill9(t)
	endedOnce(t, "killed-accepted", 100)
}

// The sidecar dies in the middle of a download, and goes on with it.
func TestKilledInDownload(t *testing.T) {
	p := installation
	noHalfImage(t, "killed-download")
	const size = 48
	p.drop(t, "killed-download.sh", numbered(5, size))
	eventually(t, jobTimeout, "partial download", func() bool {
		files, err := filepath.Glob(p.output(".partial", "*", "image.bin*"))
		if err != nil || len(files) == 0 {
			return false
		}
		info, err := os.Stat(files[0])
		return err == nil && info.Size() > 1<<20 && info.Size() < size<<20
	})
	p.kill9(t)
	endedOnce(t, "killed-download", 5)
}

// A restart by hand in the middle of a job is nothing special.
func TestRestartInMidJob(t *testing.T) {
	p := installation
	noHalfImage(t, "restarted")
	p.drop(t, "restarted.sh", numbered(200, 1))
	eventually(t, jobTimeout, "start of the job", func() bool { return p.logs.has("job started", `"restarted"`) })
	if _, err := p.composeRun(t.Context(), "restart", "sidecar"); err != nil {
		t.Fatal(err)
	}
	endedOnce(t, "restarted", 200)
}
