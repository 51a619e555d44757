package store

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

// migrations lead from one schema version to the next: the first one makes
// version 1 out of an empty file. What was released is never changed.
var migrations = []string{
	`
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
	`,
	// From here on records have wishes to cancel and priorities, which the code
	// before would drop without a word: so it must refuse them.
	//
	// The name is there to find a job by; what counts is the one in the record.
	`
	ALTER TABLE jobs ADD COLUMN name TEXT NOT NULL DEFAULT '';
	UPDATE jobs SET name = coalesce(CASE WHEN json_valid(CAST(record AS TEXT))
		THEN json_extract(CAST(record AS TEXT), '$.name') END, '');
	CREATE INDEX jobs_named ON jobs (name, id);
	`,
}

// Open opens the store in the file at path and makes it if it is absent. A
// file of a newer version is refused; one of an older version is copied to
// path.vVERSION before it is changed.
func Open(ctx context.Context, path string) (*SQLite, error) {
	return open(ctx, path, migrations)
}

func open(ctx context.Context, path string, migrations []string) (*SQLite, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("open store: %w", err)
	}
	query := url.Values{
		"_pragma": {
			// Held from the first access until the file is closed, so that two
			// sidecars can't both believe that the jobs are theirs.
			"locking_mode(EXCLUSIVE)",
			"journal_mode(WAL)",
			"synchronous(FULL)",
		},
		"_txlock": {"immediate"},
	}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: abs, RawQuery: query.Encode()}).String())
	if err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, err)
	}
	// One connection: an exclusive lock shuts out any other of our own, too.
	db.SetMaxOpenConns(1)
	if err := prepare(ctx, db, path, migrations); err != nil {
		return nil, fmt.Errorf("open store %s: %w", path, errors.Join(advise(full(err), path), db.Close()))
	}
	return &SQLite{db}, nil
}

// prepare checks the file and brings it to the version of the last migration.
func prepare(ctx context.Context, db *sql.DB, path string, migrations []string) error {
	var version int
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if version > len(migrations) {
		return hint.With(fmt.Errorf("it is of version %d, and this program knows versions up to %d", version, len(migrations)),
			newerHint(path, version))
	}
	var check string
	if err := db.QueryRowContext(ctx, `PRAGMA quick_check(1)`).Scan(&check); err != nil {
		return err
	}
	if check != "ok" {
		return fmt.Errorf("%w: %s", ErrDamaged, check)
	}
	if version > 0 && version < len(migrations) {
		if err := backUp(ctx, db, backupName(path, version)); err != nil {
			return fmt.Errorf("copy it before changing it to version %d: %w", len(migrations), err)
		}
	}
	s := SQLite{db}
	for ; version < len(migrations); version++ {
		err := s.write(ctx, func(tx *sql.Tx) error {
			if _, err := tx.ExecContext(ctx, migrations[version]); err != nil {
				return err
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

func backupName(path string, version int) string { return fmt.Sprintf("%s.v%d", path, version) }

// backUp writes a copy of the whole database that appears complete or not at
// all.
func backUp(ctx context.Context, db *sql.DB, name string) error {
	temp := name + ".tmp"
	if err := effect.Remove(temp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	effect.Before("write", temp)
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, temp); err != nil {
		return err
	}
	if err := syncPath(temp); err != nil {
		return err
	}
	if err := effect.Rename(temp, name); err != nil {
		return err
	}
	return syncPath(filepath.Dir(name))
}

func syncPath(path string) error {
	f, err := effect.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func newerHint(path string, version int) string {
	for v := version - 1; v > 0; v-- {
		if name := backupName(path, v); fileExists(name) {
			return fmt.Sprintf("Start the newer version of osbuilder again. Or, to go back without the jobs since, "+
				"put the copy that was made before the change, %s, in the place of %s.", name, path)
		}
	}
	return "Start the newer version of osbuilder again."
}

func fileExists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// advise adds what the user can do to the errors of SQLite that he can do
// something about.
func advise(err error, path string) error {
	moveAway := fmt.Sprintf("Move %s and the files whose names begin like it out of the state volume and start again: "+
		"jobs that were under way are forgotten, output/ stays as it is.", path)
	if errors.Is(err, ErrDamaged) {
		return hint.With(err, moveAway)
	}
	var e *sqlite.Error
	if !errors.As(err, &e) {
		return err
	}
	switch e.Code() & 0xff { // the rest tells apart cases of the same kind
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return hint.With(err, "Another osbuilder uses it. Only one may run on one state folder: stop the other one.")
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return hint.With(err, moveAway)
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM:
		return hint.With(err, fmt.Sprintf("The folder %s and what is in it must belong to PUID:PGID. "+
			"`docker compose up init` gives it the folder; files that an earlier PUID made must be given away by hand.", filepath.Dir(path)))
	case sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR:
		return hint.With(err, "Look whether the disk under Docker's volumes is full.")
	}
	return err
}
