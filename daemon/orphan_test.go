package main

import (
	"database/sql" //nolint:depguard // a record that the store loses
	"errors"
	"os"
	"path/filepath"
	"testing"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// A job runs in the VM's only slot, without an end, and its record is lost: it
// is ended there, and the next one has the slot.
func TestRecordLostFreesTheSlot(t *testing.T) {
	s := newSidecar(t)
	s.run.Stop()
	s.run = vmtest.NewRunner(t, s.vm, func(c *runner.Config) { c.Slots = 1 })
	stop := s.start()
	s.drop("endless.sh", "echo up\nexec sleep 600\n")
	lost := s.is("endless", job.Running)
	stop()

	db, err := sql.Open("sqlite", filepath.Join(s.cfg.Paths.State, database))
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.ExecContext(t.Context(), `DELETE FROM jobs WHERE id = ?`, lost.ID)
	if err = errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	s.run.Stop()
	s.run.Start() // its hello lists the job
	stop = s.start()
	defer stop()
	s.drop("next.sh", "echo image >\"$OUT/next.iso\"\n")
	if status, _, _ := s.outcome("next"); status != "succeeded" {
		t.Errorf("status %s", status)
	}
	s.until("an empty spool", func() bool {
		left, err := os.ReadDir(filepath.Join(s.run.Data(), "spool", "jobs"))
		return err == nil && len(left) == 0
	})
	if s.said("whose record is lost") != 1 || s.said("has to be dropped again") != 1 {
		t.Errorf("the log: %v", s.logs.All())
	}
}
