//go:build e2e

// Package e2e tests the whole project from outside: real containers, a real
// VM, the committed compose.yaml. `make test` prepares what it needs; see
// [harness]. One installation serves all tests.
package e2e

import (
	"bytes"
	"context"
	"encoding/pem"
	"os"
	"strings"
	"testing"

	"osbuilder/e2e/internal/harness"
)

var installation *harness.Project

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, func(ctx context.Context, p *harness.Project) error {
		installation = p
		return p.Up(ctx)
	}))
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
