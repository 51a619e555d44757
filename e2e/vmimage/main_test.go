//go:build e2e

// Package vmimage tests the service that makes the NixOS VM's ISO from
// outside, in its container and with a real Nix. No VM is started.
package vmimage

import (
	"context"
	"fmt"
	"os"
	"testing"

	"osbuilder/e2e/internal/harness"
)

// installation is what each test's own is made from.
var installation *harness.Project

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := harness.New(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "vmimage:", err)
		return 2
	}
	installation = p
	defer func() {
		if err := p.Remove(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "vmimage: remove the installation:", err)
			code = max(code, 1)
		}
	}()
	return m.Run()
}
