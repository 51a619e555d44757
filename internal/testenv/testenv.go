// Package testenv is how a test says that this machine lacks what it needs.
package testenv

import (
	"os"
	"testing"
)

// Lacks ends a test that can't be had here. On a developer's machine it is
// skipped; where CI is set it fails, or the run would pass without having
// tried what it is there to try.
func Lacks(t testing.TB, format string, args ...any) {
	t.Helper()
	switch os.Getenv("CI") { //nolint:forbidigo // every CI service sets it; no setting of the program
	case "", "0", "false":
		t.Skipf(format, args...) //nolint:forbidigo // the one place
	default:
		t.Fatalf("with CI set no test is skipped: "+format, args...)
	}
}
