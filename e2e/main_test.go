//go:build e2e

// Package e2e tests the whole project from outside: real containers, a real
// VM, the committed compose.yaml. `make test` prepares what it needs; see
// [harness]. One installation serves all tests.
package e2e

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
	"testing"

	"osbuilder/e2e/internal/harness"
)

var (
	installation *harness.Project
	storage      string // the disk beneath its VM's; empty: it has none of its own
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := harness.New(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}
	installation = p
	defer func() {
		if code != 0 {
			p.Explain(ctx)
		}
		if err := p.Remove(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: remove the installation:", err)
			code = max(code, 1)
		}
	}()
	if os.Getuid() == 0 {
		if storage, err = p.StorageDisk(ctx, 8<<30); err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
	}
	if err := p.Up(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return m.Run()
}

// privateKeyPEM is the header that every private key in a file begins with.
func privateKeyPEM(data []byte) bool {
	for {
		i := bytes.Index(data, []byte("-----BEGIN "))
		if i < 0 {
			return false
		}
		data = data[i:]
		if block, _ := pem.Decode(data); block != nil && strings.HasSuffix(block.Type, "PRIVATE KEY") {
			return true
		}
		data = data[1:]
	}
}
