// Package store keeps the records of jobs. A record is the only truth about
// its job: it is on disk before anything is done that it says.
//
// SQLite holds them on one machine. The suite in storetest says what any
// implementation must do.
package store

import (
	"errors"

	"osbuilder/daemon/internal/job"
)

// Errors that callers branch on.
var (
	// ErrNotFound: there is no such record.
	ErrNotFound = errors.New("not found")
	// ErrExists: a job of that ID, or from that very drop, is on record already.
	ErrExists = errors.New("exists already")
	// ErrConflict: the record changed since it was read; read it again.
	ErrConflict = errors.New("changed since it was read")
)

// Damaged tells of a record that is not what was once written. It has been
// set aside and is reported once.
type Damaged struct {
	ID  job.ID
	Err error
}
