//go:build e2e

// Package e2e tests the whole project from outside: real containers, a real
// VM, the committed compose.yaml. `make test` prepares what it needs; see
// [harness]. One installation serves all tests.
package e2e

import (
	"bytes"
	"context"
	"encoding/pem"
	"flag"
	"os"
	"strings"
	"testing"

	"osbuilder/e2e/internal/harness"
)

var (
	installation *harness.Project
	storage      string // the disk beneath its VM's; empty: it has none of its own
)

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, func(ctx context.Context, p *harness.Project) (err error) {
		installation = p
		// In memory a disk costs nothing: benchmarks have the machine's own.
		flag.Parse()
		if os.Getuid() == 0 && flag.Lookup("test.bench").Value.String() == "" {
			if storage, err = p.StorageDisk(ctx, 4<<30); err != nil {
				return err
			}
		}
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
