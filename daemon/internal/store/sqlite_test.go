package store

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func openAt(t *testing.T, path string, migrations []migration) *SQLite {
	t.Helper()
	s, err := open(t.Context(), path, migrations)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func queued(id job.ID) job.Job {
	return job.Job{ID: id, Name: "image", DropKey: "key of " + string(id), State: job.Queued}
}

func TestDamagedRecordsAreSetAside(t *testing.T) {
	for name, damage := range map[string]string{
		"a flipped bit in the record":     `UPDATE jobs SET record = replace(record, 'image', 'imbge') WHERE id = 'b'`,
		"another revision":                `UPDATE jobs SET revision = 9 WHERE id = 'b'`,
		"another digest":                  `UPDATE jobs SET digest = x'00' WHERE id = 'b'`,
		"the record of another job":       `UPDATE jobs SET (record, digest) = (SELECT record, digest FROM jobs WHERE id = 'a') WHERE id = 'b'`,
		"no JSON":                         `UPDATE jobs SET record = x'' WHERE id = 'b'`,
		"an ID that names another record": `UPDATE jobs SET id = 'bb' WHERE id = 'b'`,
	} {
		t.Run(name, func(t *testing.T) {
			s := openAt(t, filepath.Join(t.TempDir(), "db"), migrations)
			for _, id := range []job.ID{"a", "b", "c"} {
				if _, err := s.Create(t.Context(), queued(id)); err != nil {
					t.Fatal(err)
				}
			}
			// A BLOB that replace() made is TEXT, which the strict table refuses.
			if _, err := s.db.ExecContext(t.Context(), strings.Replace(damage, "replace(record, 'image', 'imbge')",
				"CAST(replace(record, 'image', 'imbge') AS BLOB)", 1)); err != nil {
				t.Fatal(err)
			}
			jobs, damaged, err := s.Unsettled(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(jobs) != 2 || jobs[0].ID != "a" || jobs[1].ID != "c" {
				t.Errorf("the sound ones: %v", jobs)
			}
			if len(damaged) != 1 || !strings.HasPrefix(string(damaged[0].ID), "b") || !errors.Is(damaged[0].Err, ErrDamaged) {
				t.Errorf("the damaged ones: %v", damaged)
			}
			if _, damaged, err = s.List(t.Context(), "", 10); len(damaged) != 0 || err != nil {
				t.Errorf("reported again: %v, %v", damaged, err)
			}
			var kept int
			if err := s.db.QueryRowContext(t.Context(), `SELECT count(*) FROM damaged`).Scan(&kept); err != nil || kept != 1 {
				t.Errorf("%d set aside, %v", kept, err)
			}
			// Its drop must not become a second job.
			if id, err := s.FindDrop(t.Context(), "key of b"); err != nil || id != "b" {
				t.Errorf("the drop leads to %q, %v", id, err)
			}
		})
	}
}

func TestGetOfDamagedRecord(t *testing.T) {
	s := openAt(t, filepath.Join(t.TempDir(), "db"), migrations)
	if _, err := s.Create(t.Context(), queued("a")); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.ExecContext(t.Context(), `UPDATE jobs SET digest = x'00'`); err != nil {
		t.Fatal(err)
	}
	_, err := s.Get(t.Context(), "a")
	if !errors.Is(err, ErrNotFound) || !errors.Is(err, ErrDamaged) {
		t.Errorf("first: %v", err)
	}
	_, err = s.Get(t.Context(), "a")
	if !errors.Is(err, ErrNotFound) || errors.Is(err, ErrDamaged) {
		t.Errorf("then: %v", err)
	}
}

func TestDamagedCheckpoint(t *testing.T) {
	s := openAt(t, filepath.Join(t.TempDir(), "db"), migrations)
	c := job.Checkpoint{Position: pipe.Position{Generation: "1-00000000", Offset: 5}}
	if err := s.SaveCheckpoint(t.Context(), "vm", c); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.ExecContext(t.Context(), `UPDATE checkpoints SET builder = 'other'`); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Checkpoint(t.Context(), "other"); !errors.Is(err, ErrDamaged) || got.Position != (pipe.Position{}) {
		t.Errorf("first: %v, %v", got, err)
	}
	if got, err := s.Checkpoint(t.Context(), "other"); err != nil || got.Position != (pipe.Position{}) {
		t.Errorf("then: %v, %v", got, err)
	}
}

func TestDamagedOwner(t *testing.T) {
	s := openAt(t, filepath.Join(t.TempDir(), "db"), migrations)
	if _, err := s.Owner(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.db.ExecContext(t.Context(), `UPDATE meta SET record = x'41'`); err != nil {
		t.Fatal(err)
	}
	if owner, err := s.Owner(t.Context()); !errors.Is(err, ErrDamaged) {
		t.Errorf("%q, %v", owner, err)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	first := openAt(t, path, migrations)
	if second, err := open(t.Context(), path, migrations); err == nil {
		second.Close()
		t.Fatal("opened twice")
	} else if hints := hint.Of(err); len(hints) != 1 || !strings.Contains(hints[0], "Another osbuilder") {
		t.Errorf("%v, hints %q", err, hints)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	openAt(t, path, migrations)
}

// A path's letters must not be taken for parts of a URL.
func TestPathOfAnyLetters(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a b?mode=memory#%20", "db")
	if err := os.Mkdir(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	openAt(t, path, migrations)
	if !fileExists(path) {
		t.Error("the file is elsewhere")
	}
}

func TestSettings(t *testing.T) {
	s := openAt(t, filepath.Join(t.TempDir(), "db"), migrations)
	for pragma, want := range map[string]string{"journal_mode": "wal", "synchronous": "2"} {
		var got string
		if err := s.db.QueryRowContext(t.Context(), "PRAGMA "+pragma).Scan(&got); err != nil || got != want {
			t.Errorf("%s is %q, %v; want %q", pragma, got, err, want)
		}
	}
}

func TestMigration(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	old := openAt(t, path, migrations)
	if _, err := old.Create(t.Context(), queued("a")); err != nil {
		t.Fatal(err)
	}
	if err := old.Close(); err != nil {
		t.Fatal(err)
	}

	next := append(slices.Clone(migrations), migration{sql: `ALTER TABLE jobs ADD COLUMN extra TEXT`}, migration{sql: `CREATE TABLE more (a TEXT) STRICT`})

	t.Run("one that doesn't work changes nothing", func(t *testing.T) {
		broken := append(slices.Clone(migrations), migration{sql: `CREATE TABLE half (a TEXT) STRICT; CREATE GARBAGE`})
		if s, err := open(t.Context(), path, broken); err == nil {
			s.Close()
			t.Fatal("no error")
		}
		s := openAt(t, path, migrations)
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	})

	changed := openAt(t, path, next)
	if _, err := changed.Get(t.Context(), "a"); err != nil {
		t.Error(err)
	}
	if err := changed.Close(); err != nil {
		t.Fatal(err)
	}
	if fileExists(backupName(path, len(migrations)) + ".tmp") {
		t.Error("half a copy is left")
	}

	_, err := open(t.Context(), path, migrations)
	if err == nil {
		t.Fatal("an older program opened it")
	}
	if hints := hint.Of(err); len(hints) != 1 || !strings.Contains(hints[0], backupName(path, len(migrations))) {
		t.Errorf("%v: the copy is not named: %q", err, hints)
	}

	// The copy is what the older program left.
	copied := openAt(t, backupName(path, len(migrations)), migrations)
	if _, err := copied.Get(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

func TestUnusableFile(t *testing.T) {
	for name, content := range map[string]string{
		"garbage":        strings.Repeat("no database at all\n", 1000),
		"a cut database": "",
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "db")
			if content == "" {
				s := openAt(t, path, migrations)
				for n := range 200 {
					if _, err := s.Create(t.Context(), queued(job.ID("a"+strings.Repeat("b", n%50)+string(rune('a'+n/50))))); err != nil {
						t.Fatal(err)
					}
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
				info, err := os.Stat(path)
				if err != nil {
					t.Fatal(err)
				}
				if err := os.Truncate(path, info.Size()/2); err != nil {
					t.Fatal(err)
				}
			} else if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
			s, err := open(t.Context(), path, migrations)
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			if hints := hint.Of(err); len(hints) != 1 || !strings.Contains(err.Error(), path) {
				t.Errorf("%v, hints %q", err, hints)
			}
		})
	}
	t.Run("no folder", func(t *testing.T) {
		_, err := open(t.Context(), filepath.Join(t.TempDir(), "none", "db"), migrations)
		if hints := hint.Of(err); len(hints) != 1 {
			t.Errorf("%v, hints %q", err, hints)
		}
	})
}
