package store

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// SQLite is a store in one file. It is safe for concurrent use. A second
// process that opens the same file is refused.
type SQLite struct {
	path   string
	held   *effect.File // keeps other processes out
	db     *sql.DB
	writes atomic.Int64 // since it was opened

	mu    sync.Mutex       // guards what follows
	last  map[job.ID]int64 // see note
	found []finding        // damaged, and not told of yet
	news  chan struct{}    // there are some

	mended   string    // what was wrong with its indexes when it was opened
	restored time.Time // of the copy that it is, if it was put in place before
}

// What a digest covers begins with the kind of its row.
const (
	kindJob        = "job"
	kindDrop       = "drop"
	kindCheckpoint = "checkpoint"
	kindOwner      = "owner"
	kindCopied     = "copied" // when a copy was made; in nothing but a copy
)

// Close ends the use of the file.
func (s *SQLite) Close() error {
	var errs []error
	if s.db != nil {
		errs = append(errs, s.db.Close())
	}
	if s.held != nil {
		errs = append(errs, s.held.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close store: %w", err)
	}
	return nil
}

// Create records a new job and returns it with its revision. A job that has a
// drop key is recorded only if that drop never was.
func (s *SQLite) Create(ctx context.Context, j job.Job) (job.Job, error) {
	made, err := s.CreateAll(ctx, []job.Job{j})
	if err != nil {
		return job.Job{}, err
	}
	return made[0], nil
}

// CreateAll does what Create does for many jobs at once, for all or for none.
func (s *SQLite) CreateAll(ctx context.Context, jobs []job.Job) ([]job.Job, error) {
	made := slices.Clone(jobs)
	records := make([][]byte, len(made))
	for i := range made {
		made[i].Revision = 1
		var err error
		if records[i], err = encodeJob(made[i]); err != nil {
			return nil, fmt.Errorf("record job: %w", err)
		}
	}
	err := s.write(ctx, func(tx *sql.Tx) error {
		for i, j := range made {
			if err := insert(ctx, tx, j, records[i]); err != nil {
				return fmt.Errorf("record job %s: %w", j.ID, err)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, j := range made {
		s.note(j)
	}
	return made, nil
}

func insert(ctx context.Context, tx *sql.Tx, j job.Job, record []byte) error {
	if j.DropKey != "" {
		if added, err := changed(tx.ExecContext(ctx,
			`INSERT INTO drops (key, job, digest) VALUES (?, ?, ?) ON CONFLICT DO NOTHING`,
			j.DropKey, string(j.ID), sealDrop(j.DropKey, string(j.ID)))); err != nil {
			return err
		} else if !added {
			return fmt.Errorf("its drop: %w", ErrExists)
		}
	}
	return put(ctx, tx, j, record)
}

// put writes a row where there is none.
func put(ctx context.Context, tx *sql.Tx, j job.Job, record []byte) error {
	added, err := changed(tx.ExecContext(ctx,
		`INSERT INTO jobs (id, name, revision, settled, record, digest) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`,
		string(j.ID), j.Name, j.Revision, j.Settled(), record, seal(kindJob, string(j.ID), j.Revision, record)))
	if err == nil && !added {
		err = ErrExists
	}
	return err
}

// Get returns a job. A damaged record is set aside; it is not found then.
func (s *SQLite) Get(ctx context.Context, id job.ID) (job.Job, error) {
	jobs, damaged, err := s.query(ctx, `SELECT id, revision, record, digest FROM jobs WHERE id = ?`, string(id))
	switch {
	case err != nil:
		return job.Job{}, fmt.Errorf("read job %s: %w", id, err)
	case len(damaged) > 0:
		return job.Job{}, fmt.Errorf("read job %s: %w: %w", id, ErrNotFound, damaged[0].Err)
	case len(jobs) == 0:
		return job.Job{}, fmt.Errorf("read job %s: %w", id, ErrNotFound)
	}
	return jobs[0], nil
}

// Update replaces the record whose revision j has, and returns j with its new
// revision. ErrConflict: the record has another revision by now. A record that
// is damaged, or was set aside for it, is written anew, if j has the revision
// that was the last.
func (s *SQLite) Update(ctx context.Context, j job.Job) (job.Job, error) {
	var updated job.Job
	var damaged error
	err := s.write(ctx, func(tx *sql.Tx) (err error) {
		if last, known := s.lastOf(j.ID); known && last > j.Revision {
			return ErrConflict // whatever a damaged row says
		}
		updated, err = replace(ctx, tx, j)
		if errors.Is(err, ErrConflict) || errors.Is(err, ErrNotFound) {
			updated, damaged = j, fmt.Errorf("%w: revision %d of it: %w", ErrDamaged, j.Revision, err)
			updated.Revision++
			err = s.heal(ctx, tx, updated, err)
		}
		return err
	})
	if err != nil {
		return job.Job{}, fmt.Errorf("update job %s: %w", j.ID, err)
	}
	s.note(updated)
	if damaged != nil {
		s.tell(finding{recordHealed, j.ID, damaged})
	}
	return updated, nil
}

// replace is Update in a transaction.
func replace(ctx context.Context, tx *sql.Tx, j job.Job) (job.Job, error) {
	record, err := encodeJob(j)
	if err != nil {
		return job.Job{}, err
	}
	old := j.Revision
	j.Revision++
	replaced, err := changed(tx.ExecContext(ctx,
		`UPDATE jobs SET name = ?, revision = ?, settled = ?, record = ?, digest = ? WHERE id = ? AND revision = ?`,
		j.Name, j.Revision, j.Settled(), record, seal(kindJob, string(j.ID), j.Revision, record), string(j.ID), old))
	if err != nil || replaced {
		return j, err
	}
	var there bool
	if err := tx.QueryRowContext(ctx,
		`SELECT EXISTS (SELECT 1 FROM jobs WHERE id = ?)`, string(j.ID)).Scan(&there); err != nil {
		return job.Job{}, err
	}
	if there {
		return job.Job{}, ErrConflict
	}
	return job.Job{}, ErrNotFound
}

// Unsettled returns all jobs for which something is left to do, oldest ID
// first, and those whose record is damaged.
func (s *SQLite) Unsettled(ctx context.Context) ([]job.Job, []Damaged, error) {
	jobs, damaged, err := s.query(ctx,
		`SELECT id, revision, record, digest FROM jobs WHERE settled = 0 ORDER BY id`)
	if err != nil {
		return nil, nil, fmt.Errorf("list unsettled jobs: %w", err)
	}
	return jobs, damaged, nil
}

// List returns at most limit jobs whose ID comes after the given one, oldest
// first; damaged ones count. The last page is the first one with neither.
func (s *SQLite) List(ctx context.Context, after job.ID, limit int) ([]job.Job, []Damaged, error) {
	jobs, damaged, err := s.query(ctx,
		`SELECT id, revision, record, digest FROM jobs WHERE id > ? ORDER BY id LIMIT ?`, string(after), limit)
	if err != nil {
		return nil, nil, fmt.Errorf("list jobs: %w", err)
	}
	return jobs, damaged, nil
}

// Named returns at most limit jobs of that name, the youngest first.
func (s *SQLite) Named(ctx context.Context, name string, limit int) ([]job.Job, []Damaged, error) {
	// IDs of one second are in no order: so some more, and those in order.
	const more = 50
	jobs, damaged, err := s.query(ctx,
		`SELECT id, revision, record, digest FROM jobs WHERE name = ? ORDER BY id DESC LIMIT ?`, name, limit+more)
	if err != nil {
		return nil, nil, fmt.Errorf("find jobs named %q: %w", name, err)
	}
	jobs = slices.DeleteFunc(jobs, func(j job.Job) bool { return j.Name != name })
	slices.SortStableFunc(jobs, job.Youngest)
	return jobs[:min(len(jobs), limit)], damaged, nil
}

// IDs returns the IDs of all jobs on record, of damaged ones, too.
func (s *SQLite) IDs(ctx context.Context) (map[job.ID]bool, error) {
	rows, err := s.db.QueryContext(ctx, `SELECT id FROM jobs`)
	if err != nil {
		return nil, fmt.Errorf("list IDs: %w", err)
	}
	defer rows.Close()
	ids := make(map[job.ID]bool)
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("list IDs: %w", err)
		}
		ids[job.ID(id)] = true
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("list IDs: %w", err)
	}
	return ids, nil
}

var ownerPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

// Owner returns the lasting id of this installation. The first call makes it.
func (s *SQLite) Owner(ctx context.Context) (string, error) {
	var random [16]byte
	_, _ = rand.Read(random[:]) // never fails, says its documentation
	fresh := []byte(hex.EncodeToString(random[:]))
	var owner, digest []byte
	err := s.write(ctx, func(tx *sql.Tx) error {
		if _, err := tx.ExecContext(ctx, `INSERT INTO meta (key, record, digest) VALUES (?, ?, ?) ON CONFLICT DO NOTHING`,
			kindOwner, fresh, seal(kindOwner, "", 0, fresh)); err != nil {
			return err
		}
		return tx.QueryRowContext(ctx, `SELECT record, digest FROM meta WHERE key = ?`, kindOwner).Scan(&owner, &digest)
	})
	if err == nil {
		err = sealed(kindOwner, "", 0, owner, digest)
	}
	if err == nil && !ownerPattern.Match(owner) {
		err = fmt.Errorf("%w: %q", ErrDamaged, owner)
	}
	if err != nil {
		return "", fmt.Errorf("read this installation's id: %w", err)
	}
	return string(owner), nil
}

// Checkpoint returns how far a builder's events have taken effect, and the
// zero value if nothing is stored. A damaged one is set aside and is an error
// once; the next call gives the zero value.
func (s *SQLite) Checkpoint(ctx context.Context, builder string) (job.Checkpoint, error) {
	var c job.Checkpoint
	var record, digest []byte
	err := s.db.QueryRowContext(ctx,
		`SELECT record, digest FROM checkpoints WHERE builder = ?`, builder).Scan(&record, &digest)
	if errors.Is(err, sql.ErrNoRows) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read checkpoint of builder %s: %w", builder, err)
	}
	err = sealed(kindCheckpoint, builder, 0, record, digest)
	if err == nil {
		err = json.Unmarshal(record, &c)
	}
	if err == nil {
		return c, nil
	}
	aside := s.write(ctx, func(tx *sql.Tx) error {
		if err := setAside(ctx, tx, kindCheckpoint, builder, err, record, digest); err != nil {
			return err
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM checkpoints WHERE builder = ?`, builder)
		return err
	})
	return job.Checkpoint{}, fmt.Errorf("read checkpoint of builder %s: %w", builder, errors.Join(err, aside))
}

// SaveCheckpoint stores how far a builder's events have taken effect. When it
// returns, that is on disk.
func (s *SQLite) SaveCheckpoint(ctx context.Context, builder string, c job.Checkpoint) error {
	record, err := json.Marshal(c)
	if err == nil {
		s.writes.Add(1)
		effect.Before("commit", "checkpoint")
		_, err = s.db.ExecContext(ctx,
			`INSERT INTO checkpoints (builder, record, digest) VALUES (?, ?, ?)
			 ON CONFLICT (builder) DO UPDATE SET record = excluded.record, digest = excluded.digest`,
			builder, record, seal(kindCheckpoint, builder, 0, record))
	}
	if err != nil {
		return fmt.Errorf("store checkpoint of builder %s: %w", builder, full(err))
	}
	return nil
}

// row is a job as it lies in the file.
type row struct {
	id             string
	revision       int64
	record, digest []byte
}

func (r row) decode() (job.Job, error) {
	if err := sealed(kindJob, r.id, r.revision, r.record, r.digest); err != nil {
		return job.Job{}, err
	}
	j, err := decodeJob(r.record)
	if err != nil {
		return job.Job{}, err
	}
	if string(j.ID) != r.id {
		return job.Job{}, fmt.Errorf("%w: it is the record of job %s", ErrDamaged, j.ID)
	}
	j.Revision = r.revision
	return j, nil
}

// A querier is the store, or a transaction in it.
type querier interface {
	QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error)
}

// rows returns what a query of the four columns of a row finds.
func rows(ctx context.Context, db querier, query string, args ...any) ([]row, error) {
	found, err := db.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	var all []row
	for found.Next() {
		var r row
		if err := found.Scan(&r.id, &r.revision, &r.record, &r.digest); err != nil {
			return nil, err
		}
		all = append(all, r)
	}
	return all, errors.Join(found.Close(), found.Err())
}

// query returns the jobs that a query of the four columns of a row finds. The
// damaged ones among them it sets aside.
func (s *SQLite) query(ctx context.Context, query string, args ...any) (jobs []job.Job, damaged []Damaged, err error) {
	all, err := rows(ctx, s.db, query, args...)
	if err != nil {
		return nil, nil, err
	}
	var bad []row
	for _, r := range all {
		j, err := r.decode()
		if err != nil {
			bad = append(bad, r)
			damaged = append(damaged, Damaged{ID: job.ID(r.id), Err: err})
			continue
		}
		s.note(j)
		jobs = append(jobs, j)
	}
	if len(bad) == 0 {
		return jobs, nil, nil
	}
	err = s.write(ctx, func(tx *sql.Tx) error {
		for i, r := range bad {
			if err := removeDamaged(ctx, tx, r, damaged[i].Err); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, nil, fmt.Errorf("set damaged records aside: %w", err)
	}
	return jobs, damaged, nil
}

func setAside(ctx context.Context, tx *sql.Tx, kind, key string, why error, record, digest []byte) error {
	_, err := tx.ExecContext(ctx,
		`INSERT INTO damaged (found, kind, key, why, record, digest) VALUES (?, ?, ?, ?, ?, ?)`,
		time.Now().UTC().Format(time.RFC3339), kind, key, why.Error(), record, digest)
	return err
}

// write runs f in a transaction that is kept if f returns nil.
func (s *SQLite) write(ctx context.Context, f func(*sql.Tx) error) error {
	tx, err := s.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	if err := f(tx); err != nil {
		// A context that ended has rolled it back already.
		if undone := tx.Rollback(); !errors.Is(undone, sql.ErrTxDone) {
			err = errors.Join(err, undone)
		}
		return full(err)
	}
	s.writes.Add(1)
	effect.Before("commit", "records")
	return full(tx.Commit())
}

// full makes SQLite's error of a full disk one of the system's, which is what
// others look for.
func full(err error) error {
	var e *sqlite.Error
	if errors.As(err, &e) && (e.Code()&0xff == sqlite3.SQLITE_FULL || e.Code() == sqlite3.SQLITE_IOERR_SHMSIZE) {
		return fmt.Errorf("%w: %w", err, unix.ENOSPC)
	}
	return err
}

// changed reports whether a statement changed a row.
func changed(result sql.Result, err error) (bool, error) {
	if err != nil {
		return false, err
	}
	n, err := result.RowsAffected()
	return n > 0, err
}
