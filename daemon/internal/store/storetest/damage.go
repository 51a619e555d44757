package storetest

import (
	"database/sql"
	"net/url"
	"testing"

	_ "modernc.org/sqlite" // what holds the records

	"osbuilder/daemon/internal/job"
)

// Damage changes the record of a job in the file at path, as a disk might, also
// while a store has it open.
func Damage(t *testing.T, path string, id job.ID) {
	t.Helper()
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Path: path, RawQuery: "_pragma=busy_timeout(10000)"}).String())
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	result, err := db.ExecContext(t.Context(), `UPDATE jobs SET revision = revision + 100, record = CAST(replace(record, 'name', 'nbme') AS BLOB) WHERE id = ?`, string(id))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := result.RowsAffected(); n != 1 || err != nil {
		t.Fatalf("%d records changed, %v", n, err)
	}
}
