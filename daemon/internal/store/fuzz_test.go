package store

import (
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"osbuilder/daemon/internal/job"
)

// FuzzCheckpoint: whatever lies in a checkpoint's row, with a digest that
// holds or without, it is read or set aside, once.
func FuzzCheckpoint(f *testing.F) {
	f.Add([]byte(`{"position":{"generation":"1-0123abcd","offset":5},"logs":{"a":{"attempt":1,"file":2,"stream":3}}}`), true)
	f.Add([]byte(`{"position":{"offset":-1},"logs":{"":{}}}`), true)
	f.Add([]byte(`null`), true)
	f.Add([]byte(`{`), true)
	f.Add([]byte(`{}`), false)
	s, err := Open(f.Context(), filepath.Join(f.TempDir(), "osbuilder.db"))
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.Error(err)
		}
	})
	f.Fuzz(func(t *testing.T, record []byte, sealed bool) {
		digest := []byte("wrong")
		if sealed {
			digest = seal(kindCheckpoint, "vm", 0, record)
		}
		if _, err := s.db.ExecContext(t.Context(), `INSERT OR REPLACE INTO checkpoints (builder, record, digest) VALUES ('vm', ?, ?)`, record, digest); err != nil {
			t.Fatal(err)
		}
		first, err := s.Checkpoint(t.Context(), "vm")
		if err == nil && !sealed {
			t.Errorf("%q was read", record)
		}
		second, again := s.Checkpoint(t.Context(), "vm")
		if again != nil {
			t.Errorf("%q: %v, and again %v", record, err, again)
		}
		if diff := cmp.Diff(first, second, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
		if err != nil && !cmp.Equal(second, job.Checkpoint{}) {
			t.Errorf("%q: %+v", record, second)
		}
	})
}
