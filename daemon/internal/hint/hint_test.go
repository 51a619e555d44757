package hint

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOf(t *testing.T) {
	base := errors.New("disk full")
	one := With(base, "Free some space.")
	for _, tt := range []struct {
		name string
		err  error
		want []string
	}{
		{"no error", nil, nil},
		{"no hint", base, nil},
		{"direct", one, []string{"Free some space."}},
		{"wrapped", fmt.Errorf("open store: %w", one), []string{"Free some space."}},
		{"joined, one of them twice", errors.Join(one, With(base, "Or move it."), one), []string{"Free some space.", "Or move it."}},
		{"hint upon hint", With(fmt.Errorf("x: %w", one), "First."), []string{"First.", "Free some space."}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Of(tt.err)); diff != "" {
				t.Error(diff)
			}
		})
	}
	if With(nil, "x") != nil {
		t.Error("a hint made an error out of none")
	}
	if !errors.Is(one, base) || one.Error() != "disk full" {
		t.Errorf("the hint changed the error: %v", one)
	}
}
