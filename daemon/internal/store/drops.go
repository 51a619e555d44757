package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
)

// A dropRow says which job a drop became, as it lies in the file. It outlives
// the job's record. Without a job it only says that the drop was taken.
type dropRow struct {
	key, job string
	digest   []byte
}

func sealDrop(key, id string) []byte { return seal(kindDrop, key, 0, []byte(id)) }

func (r dropRow) check() error { return sealed(kindDrop, r.key, 0, []byte(r.job), r.digest) }

// FindDrop returns the job that was made from a drop, even if the job's
// record was set aside since. ErrDamaged: it was taken, and nobody knows any
// more for which job.
func (s *SQLite) FindDrop(ctx context.Context, key string) (job.ID, error) {
	r, err := s.findDrop(ctx, key)
	if err == nil && r.check() != nil {
		if err = s.mendDrops(ctx); err == nil {
			r, err = s.findDrop(ctx, key)
		}
	}
	switch {
	case errors.Is(err, sql.ErrNoRows):
		err = ErrNotFound
	case err == nil && r.job == "":
		err = hint.With(fmt.Errorf("%w: it was taken, but it is not known any more for which job", ErrDamaged),
			"To have it built, give it another name.")
	}
	if err != nil {
		return "", fmt.Errorf("find drop: %w", err)
	}
	return job.ID(r.job), nil
}

func (s *SQLite) findDrop(ctx context.Context, key string) (r dropRow, err error) {
	err = s.db.QueryRowContext(ctx, `SELECT key, job, digest FROM drops WHERE key = ?`, key).Scan(&r.key, &r.job, &r.digest)
	return r, err
}

// mendDrops sets damaged rows of drops aside and makes them anew from the jobs'
// records, which have the drops' keys, too. Where no record has it a row stays
// that says no more than that the drop was taken: it must not be taken twice.
func (s *SQLite) mendDrops(ctx context.Context) error {
	all, err := dropRows(ctx, s.db)
	if err != nil {
		return err
	}
	var damaged []dropRow
	for _, r := range all {
		if r.check() != nil {
			damaged = append(damaged, r)
		}
	}
	if len(damaged) == 0 {
		return nil
	}
	var found []finding
	err = s.write(ctx, func(tx *sql.Tx) error {
		for _, r := range damaged {
			if err := setAside(ctx, tx, kindDrop, r.key, r.check(), []byte(r.job), r.digest); err != nil {
				return err
			}
			if _, err := tx.ExecContext(ctx, `DELETE FROM drops WHERE key = ?`, r.key); err != nil {
				return err
			}
		}
		made, err := dropsOfJobs(ctx, tx)
		if err != nil {
			return err
		}
		for _, id := range made {
			found = append(found, finding{dropMended, id, ErrDamaged})
		}
		for _, r := range damaged {
			if slices.Contains(made, job.ID(r.job)) {
				continue // only its key was another
			}
			left, err := changed(tx.ExecContext(ctx, `INSERT INTO drops (key, job, digest) VALUES (?, '', ?) ON CONFLICT DO NOTHING`,
				r.key, sealDrop(r.key, "")))
			if err != nil {
				return err
			}
			if left {
				found = append(found, finding{dropLost, job.ID(r.job), r.check()})
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("mend the records of drops: %w", err)
	}
	s.tell(found...)
	return nil
}

// dropsOfJobs makes the rows of drops that the records of jobs say should be
// there, and returns for which jobs it had to.
func dropsOfJobs(ctx context.Context, tx *sql.Tx) ([]job.ID, error) {
	all, err := rows(ctx, tx, `SELECT id, revision, record, digest FROM jobs`)
	if err != nil {
		return nil, err
	}
	var made []job.ID
	for _, r := range all {
		j, err := r.decode()
		if err != nil || j.DropKey == "" {
			continue // a damaged one is told of when it is asked for
		}
		anew, err := changed(tx.ExecContext(ctx, `INSERT INTO drops (key, job, digest) VALUES (?, ?, ?)
			ON CONFLICT (key) DO UPDATE SET job = excluded.job, digest = excluded.digest WHERE job <> excluded.job`,
			j.DropKey, r.id, sealDrop(j.DropKey, r.id)))
		if err != nil {
			return nil, err
		}
		if anew {
			made = append(made, j.ID)
		}
	}
	return made, nil
}

// sealDrops gives the rows of drops of version 2 the digest that they lack. In
// doubt a job's record is right, which has one.
func sealDrops(ctx context.Context, tx *sql.Tx) error {
	all, err := dropRows(ctx, tx)
	if err != nil {
		return err
	}
	for _, r := range all {
		if _, err := tx.ExecContext(ctx, `UPDATE drops SET digest = ? WHERE key = ?`, sealDrop(r.key, r.job), r.key); err != nil {
			return err
		}
	}
	_, err = dropsOfJobs(ctx, tx)
	return err
}

func dropRows(ctx context.Context, db querier) ([]dropRow, error) {
	found, err := db.QueryContext(ctx, `SELECT key, job, digest FROM drops`)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	var all []dropRow
	for found.Next() {
		var r dropRow
		if err := found.Scan(&r.key, &r.job, &r.digest); err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, errors.Join(found.Close(), found.Err())
}
