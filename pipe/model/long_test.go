//go:build long

package model

import "testing"

func TestGuaranteesInLargerBounds(t *testing.T) {
	two := one
	two.all, two.reset, two.killRunner, two.killSidecar = 2, 2, 2, 2
	for _, test := range []struct {
		name  string
		model model
	}{
		{"two jobs, one fault", model{jobs: 2, lines: [jobs]uint8{1}, faults: one}},
		{"one job, two faults", model{jobs: 1, lines: [jobs]uint8{1}, faults: two}},
	} {
		t.Run(test.name, func(t *testing.T) { holds(t, test.model) })
	}
}
