package store

import (
	"context"
	"database/sql"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
)

// note keeps which revision of a job this process has written or read last, for
// as long as something is left to do for the job. No other process writes.
func (s *SQLite) note(j job.Job) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if j.Settled() {
		delete(s.last, j.ID)
		return
	}
	if s.last == nil {
		s.last = make(map[job.ID]int64)
	}
	s.last[j.ID] = max(s.last[j.ID], j.Revision) // a reader may come late
}

// lastOf returns what note kept.
func (s *SQLite) lastOf(id job.ID) (revision int64, known bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	revision, known = s.last[id]
	return revision, known
}

// heal writes a record whose row is damaged or gone, and returns nil, if j
// follows on the last revision that ever was: then the row can have been nothing
// else, and who holds j knows all that was in it. Otherwise it returns why, and
// the row stays as it is.
func (s *SQLite) heal(ctx context.Context, tx *sql.Tx, j job.Job, why error) error {
	if last, known := s.lastOf(j.ID); !known || last != j.Revision-1 {
		return why
	}
	found, err := rows(ctx, tx, `SELECT id, revision, record, digest FROM jobs WHERE id = ?`, string(j.ID))
	if err != nil {
		return err
	}
	for _, r := range found {
		if _, err := r.decode(); err == nil {
			return why
		} else if err := removeDamaged(ctx, tx, r, err); err != nil {
			return err
		}
	}
	record, err := encodeJob(j)
	if err != nil {
		return err
	}
	return put(ctx, tx, j, record)
}

// removeDamaged sets a job's row aside.
func removeDamaged(ctx context.Context, tx *sql.Tx, r row, why error) error {
	if err := setAside(ctx, tx, kindJob, r.id, why, r.record, r.digest); err != nil {
		return err
	}
	// Not what another goroutine has just written over it.
	_, err := tx.ExecContext(ctx, `DELETE FROM jobs WHERE id = ? AND digest = ?`, r.id, r.digest)
	return err
}

// A finding is what was found damaged, and what became of it.
type finding struct {
	kind findingKind
	id   job.ID // of the job, where it is known
	err  error
}

type findingKind int

const (
	recordHealed findingKind = iota
	dropMended
	dropLost
)

// tell has Run say what was found.
func (s *SQLite) tell(f ...finding) {
	s.mu.Lock()
	s.found = append(s.found, f...)
	s.mu.Unlock()
	select {
	case s.news <- struct{}{}:
	default: // it is told already that there is something
	}
}

func (s *SQLite) sayFound(log *zap.Logger) {
	s.mu.Lock()
	found := s.found
	s.found = nil
	s.mu.Unlock()
	for _, f := range found {
		log := log.With(zap.String("id", string(f.id)), zap.Error(f.err))
		switch f.kind {
		case recordHealed:
			log.Warn("record of a job was damaged, and is written anew from what is known of the job")
		case dropMended:
			log.Warn("record of a drop was damaged, and is made anew from its job's")
		case dropLost:
			log.Error("record of a drop is damaged; should it still lie in the jobs folder, it is not taken again")
		}
	}
}
