package main

import (
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store/storetest"
)

const healed = "record of a job was damaged, and is written anew from what is known of the job"

// Records are damaged under a running daemon, whoever notices first: it goes
// on, and so do the jobs that it has in flight. Of one that has ended nobody
// knows any more: it is set aside, and that is said.
func TestRecordDamagedUnderTheDaemon(t *testing.T) {
	for name, notice := range map[string]func(s *sidecar, id job.ID){
		"show":       func(s *sidecar, id job.ID) { s.must("show", string(id)) },
		"show NAME":  func(s *sidecar, _ job.ID) { s.must("show", "runs") },
		"jobs --all": func(s *sidecar, _ job.ID) { s.must("jobs", "--all") },
		"priority":   func(s *sidecar, id job.ID) { s.must("priority", string(id), "7") },
		"its end":    func(*sidecar, job.ID) {},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSidecar(t)
			path := filepath.Join(s.cfg.Paths.State, database)
			stop := s.start()
			defer func() { stop() }()
			s.drop("ended.sh", "true\n")
			s.outcome("ended")
			s.until("nothing left to do", func() bool { return s.show("ended").Settled })
			ended := s.show("ended").ID
			script, open := gate(t)
			s.drop("runs.sh", script)
			runs := s.is("runs", job.Running).ID

			storetest.Damage(t, path, runs)
			storetest.Damage(t, path, ended)
			notice(s, runs)
			open()
			if status, _, _ := s.outcome("runs"); status != "succeeded" {
				t.Errorf("it is %s", status)
			}
			s.until("line", func() bool { return s.logs.FilterMessage(healed).Len() > 0 })
			if lines := s.logs.FilterMessage(healed).All(); len(lines) != 1 || lines[0].ContextMap()["id"] != string(runs) {
				t.Errorf("healed: %v", lines)
			}
			if _, errs, code := s.osbuilder("show", string(ended)); code != exitFailed || !strings.Contains(errs, "no such job") && !strings.Contains(errs, "not found") {
				t.Errorf("exit code %d: %s", code, errs)
			}
			aside := s.logs.FilterMessage("record is damaged and was set aside; the others go on").All()
			if len(aside) != 1 || aside[0].ContextMap()["id"] != string(ended) {
				t.Errorf("set aside: %v", aside)
			}
			s.until("nothing left to do", func() bool { return s.show("runs").Settled })
			stop()
			stop = s.start()
			if j := s.is("runs", job.Done); j.ID != runs || j.Attempt != 1 {
				t.Errorf("%+v", j)
			}
		})
	}
}
