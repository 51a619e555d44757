package testenv

import (
	"fmt"
	"testing"
)

// A said is a test that notes how it was ended.
type said struct {
	testing.TB
	how string
}

func (s *said) Helper() {}

func (s *said) Skipf(format string, args ...any) { s.how = "skipped: " + fmt.Sprintf(format, args...) }

func (s *said) Fatalf(format string, args ...any) { s.how = "failed: " + fmt.Sprintf(format, args...) }

func TestLacks(t *testing.T) {
	const skipped, failed = "skipped: no sshd: gone", "failed: with CI set no test is skipped: no sshd: gone"
	for ci, want := range map[string]string{"": skipped, "false": skipped, "0": skipped, "true": failed, "1": failed, "woodpecker": failed} {
		t.Run(ci, func(t *testing.T) {
			t.Setenv("CI", ci)
			s := &said{TB: t}
			Lacks(s, "no sshd: %s", "gone")
			if s.how != want {
				t.Errorf("CI=%s: %s, want %s", ci, s.how, want)
			}
		})
	}
}
