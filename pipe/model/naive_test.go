package model

import "testing"

// The naive loop, in place of the runner:
//
//	while inotifywait -e modify pipe_in; do bash pipe_in; done
//
// Its writer is better than most: it begins the second job only when the first
// has begun to run, and after a restart it writes again what it has not on
// record as written. There are two jobs.
type naive struct {
	pieces  uint8    // in which a script is written
	written [2]uint8 // of each job
	noted   [2]bool  // on record: this job was written
	in      script   // what lies in pipe_in
	notice  bool     // inotifywait saw a change
	runs    script   // none: inotifywait runs
	ran     [2]uint8 // how often each ran whole
	cut     bool     // half a script ran
	kills   uint8    // of the writer, left to happen
}

// A script can be half there.
type script struct {
	job  uint8 // from 1; 0 is none
	half bool
}

var naiveJobs = [2]string{"job A", "job B"}

func naiveLoop(pieces, kills uint8) system[naive] {
	return system[naive]{
		start: naive{pieces: pieces, kills: kills},
		steps: func(s naive, next func(step, naive)) {
			writer(s, next)
			switch none := (script{}); {
			case s.runs == none && s.notice:
				n := s
				n.notice, n.runs = false, s.in
				next(step{who: "loop", what: "wakes up and has Bash run what lies in pipe_in"}, n)
			case s.runs != none:
				n := s
				n.runs = none
				if s.runs.half {
					n.cut = true
				} else {
					n.ran[s.runs.job-1]++
				}
				next(step{who: "loop", what: "sees the script end, and watches again"}, n)
			}
		},
		ended: func(s naive) bool { return s.ran[0] > 0 && s.ran[1] > 0 && s.noted[1] },
	}
}

func writer(s naive, next func(step, naive)) {
	for job, name := range naiveJobs {
		if s.noted[job] || job == 1 && (!s.noted[0] || s.runs.job == 0 && s.ran[0] == 0) {
			continue
		}
		n := s
		if n.written[job] < s.pieces {
			n.written[job]++
			n.in = script{uint8(job + 1), n.written[job] < s.pieces}
			n.notice = n.runs == script{} // while a script runs, nobody watches
			what := "writes the script"
			if n.in.half {
				what = "writes half of the script"
			}
			next(step{who: "writer", what: what, of: name}, n)
		} else {
			n.noted[job] = true
			next(step{who: "writer", what: "records the writing", of: name}, n)
		}
		if s.kills > 0 && s.written[job] > 0 {
			k := s
			k.kills--
			k.written[job] = 0
			next(step{who: "writer", what: "is killed and started again, amid the writing", of: name, fault: true}, k)
		}
	}
}

// It is asked for one guarantee at a time, since it gives none.
func TestNaiveLoop(t *testing.T) {
	const twice, cut = "a job ran twice", "half a script ran"
	for _, test := range []struct {
		name          string
		pieces, kills uint8
		wrong         func(s naive) bool
		kind          string
	}{
		{"a job that is written during another never runs", 1, 0, func(naive) bool { return false }, stuck},
		{"a script that comes in pieces runs cut off", 2, 0, func(s naive) bool { return s.cut }, cut},
		{"a job that is written again runs again", 1, 1, func(s naive) bool { return s.ran[0] > 1 || s.ran[1] > 1 }, twice},
	} {
		t.Run(test.name, func(t *testing.T) {
			sys := naiveLoop(test.pieces, test.kills)
			sys.wrong = func(_, s naive) string {
				if test.wrong(s) {
					return test.kind
				}
				return ""
			}
			w, err := walk(sys, 100_000)
			if err != nil {
				t.Fatal(err)
			}
			if w.found == nil || w.found.kind != test.kind {
				t.Fatalf("found %v in %d states, want %q", w.found, w.states, test.kind)
			}
			t.Logf("%v", w.found)
		})
	}
}
