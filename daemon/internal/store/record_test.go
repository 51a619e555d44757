package store

import (
	"bytes"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func TestSealCoversEverything(t *testing.T) {
	base := seal("job", "a", 1, []byte("x"))
	for name, other := range map[string][]byte{
		"kind":     seal("jo", "ba", 1, []byte("x")),
		"key":      seal("job", "b", 1, []byte("x")),
		"revision": seal("job", "a", 2, []byte("x")),
		"data":     seal("job", "a", 1, []byte("y")),
		"borders":  seal("job", "ax", 1, nil),
	} {
		if bytes.Equal(base, other) {
			t.Errorf("another %s has the same digest", name)
		}
	}
}

// FuzzRecord: whatever lies in a record, reading it gives an error or a job
// that is written and read again unchanged.
func FuzzRecord(f *testing.F) {
	// Without seeds it would only ever see JSON's outside.
	if seeds, err := os.ReadDir("testdata/fuzz/FuzzRecord"); err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	code := 1
	full, err := encodeJob(job.Job{
		ID: "20260102-030405-abcdef", State: job.Failed, Attempt: 1, Timeout: time.Hour,
		Artifacts: []pipe.Artifact{{Name: "a"}}, Result: &pipe.Finished{Status: pipe.StatusFailed, ExitCode: &code},
		History: []job.Step{{Event: job.Created}},
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(full)
	f.Fuzz(func(t *testing.T, data []byte) {
		first, err := decodeJob(data)
		if err != nil {
			return
		}
		record, err := encodeJob(first)
		if err != nil {
			t.Fatalf("read but not to be written: %v", err)
		}
		second, err := decodeJob(record)
		if err != nil {
			t.Fatalf("written but not to be read: %v\n%s", err, record)
		}
		if diff := cmp.Diff(first, second, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	})
}
