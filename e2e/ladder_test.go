//go:build e2e

package e2e

import (
	"context"
	"testing"

	"osbuilder/e2e/internal/harness"
)

// What keeps a VM from answering is told by the containers themselves: here
// QEMU's has no image, then one that does not boot. No VM is booted.
func TestAnImageThatDoesNotBootIsSaid(t *testing.T) {
	t.Parallel() // it has an installation of its own
	p, err := harness.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Remove(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	compose := func(args ...string) {
		t.Helper()
		if out, err := p.Compose(t.Context(), args...); err != nil {
			t.Fatal(err, out)
		}
	}
	told := func(rung, what, hint string) {
		t.Helper()
		harness.Eventually(t, harness.StepTimeout, "word of "+what, func() bool {
			return p.Logged(t, `"builder can't be reached yet"`, `"rung":"`+rung+`"`, what, hint)
		})
	}
	compose("up", "--detach", "--no-build", "sidecar")
	told("tcp", "no such host", "the VM's container does not run")
	compose("up", "--detach", "--no-build", "--no-deps", "vm")
	told("image", "the VM has no image to boot: there is neither /boot.iso nor /storage/boot.iso", "docker compose logs vmimage")
	compose("run", "--rm", "--no-deps", "--entrypoint", "bash", "vm", "-c", "echo junk >/storage/boot.iso")
	compose("restart", "vm")
	told("image", "the VM's image does not boot: /storage/boot.iso is no ISO image", "remove boot.iso from the volume vm-storage")
}
