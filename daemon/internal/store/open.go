package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

// A migration leads from one schema version to the next.
type migration struct {
	sql  string
	then func(ctx context.Context, tx *sql.Tx) error // what SQL can't do
}

// migrations are all there are: the first one makes version 1 out of an empty
// file. What was released is never changed.
var migrations = []migration{
	{sql: `
	CREATE TABLE jobs (
		id       TEXT    NOT NULL PRIMARY KEY,
		revision INTEGER NOT NULL,
		settled  INTEGER NOT NULL,
		record   BLOB    NOT NULL,
		digest   BLOB    NOT NULL
	) STRICT;
	CREATE INDEX jobs_unsettled ON jobs (id) WHERE settled = 0;

	-- Outlives the job's record, so that a drop never becomes two jobs.
	CREATE TABLE drops (
		key TEXT NOT NULL PRIMARY KEY,
		job TEXT NOT NULL
	) STRICT;

	CREATE TABLE checkpoints (
		builder TEXT NOT NULL PRIMARY KEY,
		record  BLOB NOT NULL,
		digest  BLOB NOT NULL
	) STRICT;

	CREATE TABLE meta (
		key    TEXT NOT NULL PRIMARY KEY,
		record BLOB NOT NULL,
		digest BLOB NOT NULL
	) STRICT;

	-- For people; nothing reads it.
	CREATE TABLE damaged (
		found  TEXT NOT NULL,
		kind   TEXT NOT NULL,
		key    TEXT NOT NULL,
		why    TEXT NOT NULL,
		record BLOB,
		digest BLOB
	) STRICT;
	`},
	// From here on records have wishes to cancel and priorities, which the code
	// before would drop without a word: so it must refuse them.
	//
	// The name is there to find a job by; what counts is the one in the record.
	{sql: `
	ALTER TABLE jobs ADD COLUMN name TEXT NOT NULL DEFAULT '';
	UPDATE jobs SET name = coalesce(CASE WHEN json_valid(CAST(record AS TEXT))
		THEN json_extract(CAST(record AS TEXT), '$.name') END, '');
	CREATE INDEX jobs_named ON jobs (name, id);
	`},
	{sql: `ALTER TABLE drops ADD COLUMN digest BLOB NOT NULL DEFAULT x''`, then: sealDrops},
}

// Open opens the store in the file at path and makes it if it is absent. A
// file of a newer version is refused; one of an older version is copied to
// path.vVERSION before it is changed. A copy that was put into the place of the
// file is noticed, and its jobs are marked; see [SQLite.Restored].
func Open(ctx context.Context, path string) (*SQLite, error) {
	return open(ctx, path, migrations)
}

func open(ctx context.Context, path string, migrations []migration) (*SQLite, error) {
	s := &SQLite{path: path, news: make(chan struct{}, 1)}
	if err := s.open(ctx, migrations); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, errors.Join(advise(ctx, full(err), path), s.Close()))
	}
	return s, nil
}

func (s *SQLite) open(ctx context.Context, migrations []migration) (err error) {
	if s.held, err = hold(s.path); err != nil {
		return err
	}
	if err := s.missing(); err != nil {
		return err
	}
	if s.db, err = connect(s.path, url.Values{
		"_pragma": {
			// Whoever copies the file reads it beside whoever writes it. Another
			// process is kept out by hold.
			"journal_mode(WAL)",
			"synchronous(FULL)",
			// A person who looks with a tool of SQLite's may hold it up, and no more.
			"busy_timeout(10000)",
		},
		"_txlock": {"immediate"},
	}); err != nil {
		return err
	}
	if err := s.prepare(ctx, migrations); err != nil {
		return err
	}
	// Made at the first start, so that no copy is without it.
	if _, err := s.Owner(ctx); err != nil {
		return err
	}
	if err := s.noticeRestore(ctx); err != nil {
		return err
	}
	if err := s.mendDrops(ctx); err != nil {
		return err
	}
	return s.forgetRestoring()
}

// forgetRestoring removes what a restoring left that was broken off before the
// file in place had left it: that one is sound, and should it ever be missing,
// those records are older than the copies of it.
func (s *SQLite) forgetRestoring() error {
	next := whatIsNext(s.path)
	for _, left := range []string{next, next + ".tmp", next + ".tmp-journal"} {
		if !fileExists(left) {
			continue
		}
		if err := removeIfThere(left); err != nil {
			return err
		}
	}
	return nil
}

// missing is an error if there should be records and there are none: an empty
// store in their place would be all of them lost without a word, and what was
// written ahead of a file that is empty would be removed.
func (s *SQLite) missing() error {
	info, err := os.Stat(s.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	switch {
	case err == nil && info.Size() > 0:
		return nil
	case err != nil && fileExists(whatIsNext(s.path)):
		return hint.With(errors.New("restoring it was broken off: the old file is set aside, and what comes into its place is not there yet"),
			"Give the same command again: "+steps("restore"))
	case len(Copies(s.path)) > 0:
		return fmt.Errorf("%w: the file is gone or empty, though there are copies of it", ErrDamaged)
	case fileExists(s.path + "-wal"):
		return fmt.Errorf("%w: the file is gone or empty, though %s-wal is there, which was written ahead of it", ErrDamaged, s.path)
	}
	return nil
}

// connect opens a database, with one connection: so its writes come one after
// the other, and none is refused because of another.
func connect(path string, query url.Values) (*sql.DB, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: abs, RawQuery: query.Encode()}).String())
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	return db, nil
}

// errHeld: another process uses the file.
var errHeld = errors.New("it is in use")

// hold keeps other processes from the file, by a lock of our own: SQLite's are
// not there while the file is exchanged.
func hold(path string) (*effect.File, error) {
	f, err := effect.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%w: %w", errHeld, err), f.Close())
	}
	return f, nil
}

// prepare checks the file and brings it to the version of the last migration.
func (s *SQLite) prepare(ctx context.Context, migrations []migration) error {
	var version int
	if err := s.db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return hint.With(fmt.Errorf("it is of version %d, and this program knows versions up to %d", version, len(migrations)),
			newerHint(s.path, version))
	}
	if version == 0 && len(Copies(s.path)) > 0 {
		return fmt.Errorf("%w: nothing is in it, though there are copies of it", ErrDamaged)
	}
	if err := s.check(ctx); err != nil {
		return err
	}
	if version > 0 && version < len(migrations) {
		if err := backUp(ctx, s.path, backupName(s.path, version)); err != nil {
			return fmt.Errorf("copy it before changing it to version %d: %w", len(migrations), err)
		}
	}
	for ; version < len(migrations); version++ {
		err := s.write(ctx, func(tx *sql.Tx) error {
			m := migrations[version]
			if _, err := tx.ExecContext(ctx, m.sql); err != nil {
				return err
			}
			if m.then != nil {
				if err := m.then(ctx, tx); err != nil {
					return err
				}
			}
			_, err := tx.ExecContext(ctx, fmt.Sprintf(`PRAGMA user_version = %d`, version+1))
			return err
		})
		if err != nil {
			return fmt.Errorf("change it to version %d: %w", version+1, err)
		}
	}
	return nil
}

// check looks at the whole file. An index that says something else than its
// table is made anew: the table has the records, with their digests.
func (s *SQLite) check(ctx context.Context) error {
	whole, err := pragma(ctx, s.db, `PRAGMA integrity_check(1)`)
	if err != nil || whole == "ok" {
		return err
	}
	quick, err := pragma(ctx, s.db, `PRAGMA quick_check(1)`)
	if err != nil {
		return err
	}
	if quick != "ok" {
		return fmt.Errorf("%w: %s", ErrDamaged, quick)
	}
	if err := s.reindex(ctx); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrDamaged, whole, err)
	}
	if again, err := pragma(ctx, s.db, `PRAGMA integrity_check(1)`); err != nil || again != "ok" {
		return errors.Join(fmt.Errorf("%w: %s, and after its indexes were made anew: %s", ErrDamaged, whole, again), err)
	}
	s.mended = whole
	return nil
}

func pragma(ctx context.Context, db *sql.DB, query string) (value string, err error) {
	err = db.QueryRowContext(ctx, query).Scan(&value)
	return value, err
}

// reindex makes the indexes anew, and what they are made from besides the
// records themselves.
func (s *SQLite) reindex(ctx context.Context) error {
	effect.Before("write", s.path)
	if _, err := s.db.ExecContext(ctx, `REINDEX`); err != nil {
		return err
	}
	all, err := rows(ctx, s.db, `SELECT id, revision, record, digest FROM jobs NOT INDEXED`)
	if err != nil {
		return err
	}
	return s.write(ctx, func(tx *sql.Tx) error {
		for _, r := range all {
			j, err := r.decode()
			if err != nil {
				continue // it is told of when it is asked for
			}
			if _, err := tx.ExecContext(ctx, `UPDATE jobs SET settled = ? WHERE id = ? AND settled <> ?`, j.Settled(), string(j.ID), j.Settled()); err != nil {
				return err
			}
		}
		return nil
	})
}

func backupName(path string, version int) string { return fmt.Sprintf("%s.v%d", path, version) }

func newerHint(path string, version int) string {
	for v := version - 1; v > 0; v-- {
		if name := backupName(path, v); fileExists(name) {
			return "Start the newer version of osbuilder again. Or go back to the copy that was made before the change, without the jobs since: " +
				steps("restore "+name)
		}
	}
	return "Start the newer version of osbuilder again."
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// steps are what a person types to have a command carried out while the daemon
// stands still. Its image has no shell, nor any other tool.
func steps(command string) string {
	return "docker compose stop sidecar && docker compose run --rm --no-deps sidecar " + command + " && docker compose up -d sidecar"
}

// advise adds what the user can do to the errors that he can do something
// about.
func advise(ctx context.Context, err error, path string) error {
	var e *sqlite.Error
	switch {
	case errors.Is(err, errHeld):
		return hint.With(err, otherHint)
	case errors.Is(err, ErrDamaged):
		return restoreHint(ctx, err, path)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, fs.ErrNotExist):
		return hint.With(err, ownerHint(path))
	case !errors.As(err, &e):
		return err
	}
	switch e.Code() & 0xff { // the rest tells apart cases of the same kind
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return hint.With(err, otherHint)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return restoreHint(ctx, err, path)
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM:
		return hint.With(err, ownerHint(path))
	case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR:
		return hint.With(err, "Look whether the disk under Docker's volumes is full.")
	}
	return err
}

const otherHint = "Another osbuilder uses it. Only one may run on one state folder: stop the other one."

func ownerHint(path string) string {
	return fmt.Sprintf("The folder %s and what is in it must belong to PUID:PGID. "+
		"`docker compose up init` gives it the folder; files that an earlier PUID made must be given away by hand.", filepath.Dir(path))
}

// restoreHint names the newest sound copy, and how it gets into its place.
func restoreHint(ctx context.Context, err error, path string) error {
	if c, ok := soundCopy(ctx, path); ok {
		return hint.With(err, fmt.Sprintf("The newest sound copy is %s, of %s UTC. Put it in place: %s. "+
			"What became since then of the jobs on record is found out from the VM and from output/; "+
			"the log names each later drop that has to be dropped again. The damaged file is kept.",
			c.Path, c.Time.Format(time.DateTime), steps("restore")))
	}
	return hint.With(err, "There is no sound copy of it. Begin anew, without the jobs that were under way: "+steps("restore --empty")+
		". The log names each drop that has to be dropped again; output/ stays as it is, and the damaged file is kept.")
}
