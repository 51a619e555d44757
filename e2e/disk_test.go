//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"osbuilder/e2e/internal/harness"
	"osbuilder/internal/testenv"
)

// The disk beneath the VM's is full, and QEMU stops the VM in the middle of a
// job. The VM's container and the sidecar say so, and once there is room all
// goes on by itself, as if nothing had been.
func TestHostDiskFull(t *testing.T) {
	p := installation
	if storage == "" {
		testenv.Lacks(t, "only root can give the VM's storage a small disk of its own")
	}
	t.Parallel() // beside installations that have no VM
	const lines = 50
	p.Drop(t, "fills.sh", fmt.Sprintf(`for i in $(seq %d); do
  yes "$JOB_ID" | head -c %d >"$TMPDIR/$i"
  sync "$TMPDIR/$i"
  echo "line $i of $JOB_ID"
  sleep 0.2
done
head -c 1M /dev/urandom >"$OUT/image.bin"
echo shipped
`, lines, unused(t, p)/lines))
	started := func() bool { return p.Logged(t, `"build output"`, `"job":"fills"`, `"line 3 of `) }
	harness.Eventually(t, harness.JobTimeout, "third line", started)
	free, err := harness.Fill(t.Context(), storage)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = free() }() // in case that it is still full
	vmSays := func(what string) func() bool {
		return func() bool { return strings.Contains(harness.Docker(t, "logs", p.Container(t, "vm")), what) }
	}
	harness.Eventually(t, harness.StepTimeout, "word of the VM's container",
		vmSays("qemu: warning: the VM stands still: its disk could not grow, the host has 0 MiB free for it. It goes on by itself when there are 512 MiB"))
	harness.Eventually(t, harness.StepTimeout, "word of the sidecar", func() bool {
		return p.Logged(t, `"builder can't be reached yet"`, `"rung":"qemu"`,
			"QEMU stopped the VM because its disk can't grow: the host has 0 MiB free for it", "make room on the disk of Docker's volumes")
	})
	if p.Logged(t, `"job":"fills"`, `"line `+strconv.Itoa(lines)+` of `) {
		t.Error("the job came to its end: its disk was never full")
	}
	if err := free(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.StepTimeout, "VM that goes on", vmSays("free again: the VM goes on"))
	endedOnce(t, "fills", lines)
}

// unused is how much the VM has to write until it can't do without new blocks
// of the host's: more than it once used and uses no more.
func unused(t *testing.T, p *harness.Project) int64 {
	t.Helper()
	c := p.Connect(t)
	info, err := os.Stat(filepath.Join(storage, "data.img"))
	if err != nil {
		t.Fatal(err)
	}
	held := info.Sys().(*syscall.Stat_t).Blocks * 512
	out, err := harness.OnVM(t, c, "df --output=used --block-size=1 /data | tail -n 1")
	if err != nil {
		t.Fatal(err, out)
	}
	used, err := strconv.ParseInt(strings.TrimSpace(out), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("the VM uses %d MiB of its disk, and the host holds %d", used>>20, held>>20)
	return max(0, held-used) + 128<<20
}
