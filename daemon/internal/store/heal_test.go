package store

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/job"
)

func run(t *testing.T, s *SQLite, statement string, args ...any) {
	t.Helper()
	if _, err := s.db.ExecContext(t.Context(), statement, args...); err != nil {
		t.Fatal(err)
	}
}

// spoilJob are the ways in which the row of job b is found damaged.
var spoilJob = map[string]string{
	"a flipped bit in the record": `UPDATE jobs SET record = CAST(replace(record, 'image', 'imbge') AS BLOB) WHERE id = 'b'`,
	"another revision":            `UPDATE jobs SET revision = 9 WHERE id = 'b'`,
	"an earlier revision":         `UPDATE jobs SET revision = 1 WHERE id = 'b'`,
	"another digest":              `UPDATE jobs SET digest = x'00' WHERE id = 'b'`,
	"another ID":                  `UPDATE jobs SET id = 'bb' WHERE id = 'b'`,
	"gone":                        `DELETE FROM jobs WHERE id = 'b'`,
}

// said are the lines that Run would log now.
func said(s *SQLite) []string {
	core, logs := observer.New(zapcore.DebugLevel)
	s.sayFound(zap.New(core))
	var lines []string
	for _, e := range logs.All() {
		lines = append(lines, e.Message)
	}
	return lines
}

// Who has the last revision of a record that is damaged writes it anew, whether
// somebody has read it meanwhile and so set it aside, or not.
func TestUpdateHeals(t *testing.T) {
	for name, damage := range spoilJob {
		for _, read := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "db")
				s := openAt(t, path, migrations)
				first, err := s.Create(t.Context(), queued("b"))
				if err != nil {
					t.Fatal(err)
				}
				known, err := s.Update(t.Context(), first)
				if err != nil {
					t.Fatal(err)
				}
				run(t, s, damage)
				if read {
					if _, err := s.Get(t.Context(), "b"); !errors.Is(err, ErrNotFound) {
						t.Errorf("read all the same: %v", err)
					}
				}
				// Not by who is behind: that would take back what came since.
				if _, err := s.Update(t.Context(), first); !errors.Is(err, ErrConflict) {
					t.Errorf("an earlier revision was written: %v", err)
				}
				known.Why = "written anew"
				healed, err := s.Update(t.Context(), known)
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.Get(t.Context(), "b")
				if diff := cmp.Diff(healed, got); err != nil || diff != "" || got.Why != known.Why {
					t.Errorf("%v: %s", err, diff)
				}
				if lines := said(s); len(lines) > 1 || len(lines) == 0 && (read || strings.HasSuffix(name, "revision")) {
					t.Errorf("it is said: %q", lines)
				}
				// And so it stays.
				if _, err := s.Update(t.Context(), healed); err != nil {
					t.Error(err)
				}
				closeStore(t, s)
				s = openAt(t, path, migrations)
				if _, err := s.Get(t.Context(), "b"); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// What this process has neither written nor read can be any revision: it is not
// written anew.
func TestUpdateDoesNotGuess(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := openAt(t, path, migrations)
	known, err := s.Create(t.Context(), queued("b"))
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	s = openAt(t, path, migrations)
	run(t, s, `DELETE FROM jobs`)
	if _, err := s.Update(t.Context(), known); !errors.Is(err, ErrNotFound) {
		t.Errorf("written: %v", err)
	}
}

// spoilDrop are the ways in which the row of b's drop is found damaged.
var spoilDrop = map[string]string{
	"another job":    `UPDATE drops SET job = 'a' WHERE job = 'b'`,
	"another key":    `UPDATE drops SET key = 'key' WHERE job = 'b'`,
	"another digest": `UPDATE drops SET digest = x'00' WHERE job = 'b'`,
}

func TestDamagedDrop(t *testing.T) {
	const key = "key of b"
	for name, damage := range spoilDrop {
		for _, lost := range []bool{false, true} { // the job's record, too
			t.Run(name, func(t *testing.T) {
				path := filepath.Join(t.TempDir(), "db")
				s := openAt(t, path, migrations)
				for _, id := range []job.ID{"a", "b", "c"} {
					if _, err := s.Create(t.Context(), queued(id)); err != nil {
						t.Fatal(err)
					}
				}
				run(t, s, damage)
				if lost {
					run(t, s, `DELETE FROM jobs WHERE id = 'b'`)
				}
				if name == "another key" { // noticed with the next start
					closeStore(t, s)
					s = openAt(t, path, migrations)
				}
				id, err := s.FindDrop(t.Context(), key)
				again := queued("d")
				again.DropKey = key
				switch {
				case !lost:
					if err != nil || id != "b" {
						t.Errorf("it leads to %q, %v", id, err)
					}
				case name == "another key":
					return // two rows are damaged, and nothing is left that has the key
				case !errors.Is(err, ErrDamaged):
					t.Errorf("it leads to %q, %v", id, err)
				}
				if _, err := s.Create(t.Context(), again); !errors.Is(err, ErrExists) {
					t.Errorf("taken twice: %v", err)
				}
				for _, other := range []job.ID{"a", "c"} {
					if id, err := s.FindDrop(t.Context(), "key of "+string(other)); err != nil || id != other {
						t.Errorf("the drop of %s leads to %q, %v", other, id, err)
					}
				}
				if lines := said(s); len(lines) != 1 {
					t.Errorf("it is said: %q", lines)
				}
				var kept int
				if err := s.db.QueryRowContext(t.Context(), `SELECT count(*) FROM damaged WHERE kind = 'drop'`).Scan(&kept); err != nil || kept != 1 {
					t.Errorf("%d set aside, %v", kept, err)
				}
				closeStore(t, s)
				s = openAt(t, path, migrations)
				if lines := said(s); len(lines) > 0 {
					t.Errorf("said again: %q", lines)
				}
			})
		}
	}
}

// A file of version 2 has drops without a digest: in doubt the job's record is
// right.
func TestDropsOfVersion2(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	s := openAt(t, path, migrations)
	for _, id := range []job.ID{"a", "b", "c"} {
		if _, err := s.Create(t.Context(), queued(id)); err != nil {
			t.Fatal(err)
		}
	}
	run(t, s, `ALTER TABLE drops DROP COLUMN digest`)
	run(t, s, `PRAGMA user_version = 2`)
	run(t, s, `UPDATE drops SET job = 'c' WHERE job = 'a'`)
	run(t, s, `DELETE FROM drops WHERE key = 'key of b'`)
	run(t, s, `INSERT INTO drops (key, job) VALUES ('key', 'gone')`)
	closeStore(t, s)
	s = openAt(t, path, migrations)
	for key, want := range map[string]job.ID{"key of a": "a", "key of b": "b", "key of c": "c", "key": "gone"} {
		if id, err := s.FindDrop(t.Context(), key); err != nil || id != want {
			t.Errorf("%s leads to %q, %v; want %q", key, id, err, want)
		}
	}
}
