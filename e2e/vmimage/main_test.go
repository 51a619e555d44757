//go:build e2e

// Package vmimage tests the service that makes the NixOS VM's ISO from
// outside, in its container and with a real Nix. No VM is started.
package vmimage

import (
	"context"
	"os"
	"testing"

	"osbuilder/e2e/internal/harness"
)

// installation is what each test's own is made from.
var installation *harness.Project

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, func(_ context.Context, p *harness.Project) error {
		installation = p
		return nil
	}))
}
