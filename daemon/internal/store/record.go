package store

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// ErrDamaged says: what was read is not what was written.
var ErrDamaged = errors.New("record is damaged")

// seal returns the digest of a row: of every column that decides anything, so
// that a flipped bit in any of them shows. Lengths keep the parts apart.
func seal(kind, key string, revision int64, data []byte) []byte {
	h := sha256.New()
	for _, part := range [][]byte{[]byte(kind), []byte(key), data} {
		_ = binary.Write(h, binary.BigEndian, int64(len(part))) // a hash takes every write
		h.Write(part)
	}
	_ = binary.Write(h, binary.BigEndian, revision)
	return h.Sum(nil)
}

func sealed(kind, key string, revision int64, data, digest []byte) error {
	if !bytes.Equal(seal(kind, key, revision, data), digest) {
		return fmt.Errorf("%w: its digest does not match", ErrDamaged)
	}
	return nil
}

// encodeJob and decodeJob are each other's inverse, except for the revision,
// which is a column.
func encodeJob(j job.Job) ([]byte, error) {
	if err := checkJob(j); err != nil {
		return nil, err
	}
	return json.Marshal(j)
}

func decodeJob(data []byte) (job.Job, error) {
	var j job.Job
	if err := json.Unmarshal(data, &j); err != nil {
		return job.Job{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err := checkJob(j); err != nil {
		return job.Job{}, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return j, nil
}

// checkJob refuses what no reader could make sense of.
func checkJob(j job.Job) error {
	if !pipe.ValidID(string(j.ID)) {
		return fmt.Errorf("job ID %q is not valid", j.ID)
	}
	if !slices.Contains(job.States, j.State) {
		return fmt.Errorf("job %s: unknown state %q", j.ID, j.State)
	}
	return nil
}
