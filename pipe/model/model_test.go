package model

import "testing"

// one is one fault of any kind, at any moment.
var one = faults{all: 1, killSidecar: 1, killRunner: 1, power: 1, reset: 1, cut: 1, early: 1, cancel: 1, damage: 1}

// kills are one of the two programs, once.
var kills = faults{all: 1, killSidecar: 1, killRunner: 1}

func TestGuarantees(t *testing.T) {
	for _, test := range []struct {
		name  string
		model model
	}{
		{"one job, one fault", model{jobs: 1, lines: [jobs]uint8{2}, faults: one}},
		{"two jobs, one kill", model{jobs: 2, faults: kills}},
	} {
		t.Run(test.name, func(t *testing.T) { holds(t, test.model) })
	}
}

func holds(t *testing.T, m model) {
	t.Helper()
	w, err := walk(m.system(), 40_000_000)
	if err != nil {
		t.Fatal(err)
	}
	if w.found != nil {
		t.Fatal(w.found)
	}
	if w.ends == 0 {
		t.Fatal("nothing ends")
	}
	t.Logf("%d states, %d steps between them; all that began has ended in %d; the farthest is %d steps away", w.states, w.steps, w.ends, w.deepest)
}

// Each rule is needed: without it the model fails, in the way that the rule is
// there to prevent.
func TestRulesAreNeeded(t *testing.T) {
	for _, test := range []struct {
		name    string
		without rules
		faults  faults
		kind    string
	}{
		{"accepted before the spool is synced", rules{acceptUnsynced: true}, faults{all: 1, reset: 1}, notOnDisk},
		{"what a killed runner left is not synced", rules{adoptUnsynced: true}, faults{all: 2, killRunner: 1, reset: 1}, unknown},
		{"the marker after the start", rules{markLate: true}, kills, twice},
		{"the result without the output", rules{hookUnsynced: true}, faults{all: 1, reset: 1}, endUnmarked},
		{"forgotten without a tombstone", rules{noTombstone: true}, faults{all: 1, cut: 1}, twice},
		{"the checkpoint before the logs are synced", rules{checkpointFirst: true}, faults{all: 1, power: 1}, lostAlive},
		{"sent before the claim is on record", rules{sendFirst: true}, kills, stuck},
		{"acknowledged before it is in output/", rules{ackEarly: true}, faults{}, forgotten},
		{"taken before what is missing was told again", rules{takeGaps: true}, faults{all: 1, damage: 1}, lostAlive},
		{"told again from where it was told to", rules{repeatRest: true}, faults{all: 1, damage: 1}, lostAlive},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := model{jobs: 1, lines: [jobs]uint8{1}, faults: test.faults, without: test.without}
			w, err := walk(m.system(), 1_000_000)
			if err != nil {
				t.Fatal(err)
			}
			if w.found == nil || w.found.kind != test.kind {
				t.Fatalf("found %v in %d states, want %q", w.found, w.states, test.kind)
			}
			t.Logf("in %d states: %v", w.states, w.found)
		})
	}
}
