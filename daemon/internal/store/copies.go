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
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// How the store is copied.
const (
	// copyEvery is how old the newest copy gets while records change.
	copyEvery = time.Hour
	// copyGap lies between two copies, whatever happens: a daemon that is
	// started again and again must not replace all of them.
	copyGap    = 10 * time.Minute
	keepCopies = 6
	// copyReserve is room, in bytes, that copies leave to the records.
	copyReserve = 64 << 20
)

// A Copy is a copy of the whole store, as it was at a time.
type Copy struct {
	Path string
	Time time.Time // UTC, to the second
}

const copyStamp = "20060102-150405"

func copiesDir(path string) string { return filepath.Join(filepath.Dir(path), "copies") }

// Copies returns the copies of the store at path, the newest first. Those with
// a time that is still to come are from when the clock was ahead: they are older
// than all that were made since, and come last.
func Copies(path string) []Copy {
	entries, err := os.ReadDir(copiesDir(path))
	if err != nil {
		return nil
	}
	var copies []Copy
	for _, e := range entries {
		stamp, ok := strings.CutPrefix(e.Name(), filepath.Base(path)+".")
		if at, err := time.Parse(copyStamp, stamp); ok && err == nil {
			copies = append(copies, Copy{filepath.Join(copiesDir(path), e.Name()), at})
		}
	}
	now := time.Now()
	slices.SortFunc(copies, func(a, b Copy) int {
		switch ahead := a.Time.After(now); {
		case ahead == b.Time.After(now):
			return b.Time.Compare(a.Time)
		case ahead:
			return 1
		default:
			return -1
		}
	})
	return copies
}

// soundCopy returns the newest copy that can be put in the place of the store.
func soundCopy(ctx context.Context, path string) (Copy, bool) {
	for _, c := range Copies(path) {
		if checkCopy(ctx, c.Path) == nil {
			return c, true
		}
	}
	return Copy{}, false
}

// checkCopy reports what is wrong with a copy. It changes nothing.
func checkCopy(ctx context.Context, path string) (err error) {
	if _, err := os.Stat(path); err != nil {
		return err
	}
	db, err := connect(path, url.Values{"mode": {"ro"}, "immutable": {"1"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	var version int
	if err := db.QueryRowContext(ctx, `PRAGMA user_version`).Scan(&version); err != nil {
		return err
	}
	if version < 1 || version > len(migrations) {
		return fmt.Errorf("it is of version %d, and this program knows versions up to %d", version, len(migrations))
	}
	if whole, err := pragma(ctx, db, `PRAGMA integrity_check(1)`); err != nil || whole != "ok" {
		return errors.Join(fmt.Errorf("%w: %s", ErrDamaged, whole), err)
	}
	return nil
}

// Run makes copies until ctx is over: when it begins, and then every hour in
// which something changed. What goes wrong with them is said, and is no reason
// to stop. It also says what is found damaged meanwhile, and was mended.
func (s *SQLite) Run(ctx context.Context, log *zap.Logger) error {
	if s.mended != "" {
		log.Warn("indexes of the records were damaged, and are made anew", zap.String("reason", s.mended))
	}
	first := time.Duration(0)
	if copies := Copies(s.path); len(copies) > 0 {
		first = min(max(copyGap-time.Since(copies[0].Time), 0), copyGap)
	}
	copied := int64(-1) // writes that the newest copy has
	timer := time.NewTimer(first)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.news:
			s.sayFound(log)
			continue
		case <-timer.C:
		}
		timer.Reset(copyEvery)
		writes := s.writes.Load()
		if writes == copied {
			continue
		}
		name, err := s.Copy(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			log.Warn("records can't be copied, trying again", zap.Duration("in", copyEvery), zap.Error(err),
				zap.String("hint", strings.Join(hint.Of(err), " ")))
		default:
			copied = writes
			log.Debug("records copied", zap.String("file", name))
		}
	}
}

// Copy makes a copy of the store, for which old ones make room, and returns
// its name.
func (s *SQLite) Copy(ctx context.Context) (string, error) {
	dir := copiesDir(s.path)
	if err := disk.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("copy store: %w", err)
	}
	if err := s.roomForCopy(); err != nil {
		return "", fmt.Errorf("copy store: %w", err)
	}
	name := filepath.Join(dir, filepath.Base(s.path)+"."+time.Now().UTC().Format(copyStamp))
	if err := backUp(ctx, s.path, name); err != nil {
		return "", fmt.Errorf("copy store: %w", advise(ctx, err, s.path))
	}
	copies := Copies(s.path)
	for _, old := range copies[min(keepCopies, len(copies)):] {
		if err := effect.Remove(old.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return name, fmt.Errorf("remove old copy of the store: %w", err)
		}
	}
	return name, nil
}

// roomForCopy leaves the records room to grow.
func (s *SQLite) roomForCopy() error {
	info, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	dir := filepath.Dir(s.path)
	free, err := disk.Free(dir)
	if err != nil {
		return err
	}
	if need := 2*info.Size() + copyReserve; free < need {
		return hint.With(&disk.NoRoom{Path: dir, Need: need, Free: free}, "Make room on the disk of Docker's volumes.")
	}
	return nil
}

// backUp writes a copy of the whole database at path that appears complete or
// not at all, and that can be told from the original. It has a connection of
// its own: the copy is of one moment, takes as long as the disk takes, and
// meanwhile the others read and write.
func backUp(ctx context.Context, path, name string) (err error) {
	db, err := connect(path, url.Values{"mode": {"ro"}, "_pragma": {"busy_timeout(10000)"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	temp := name + ".tmp"
	for _, left := range []string{temp, temp + "-journal"} {
		if err := removeIfThere(left); err != nil {
			return err
		}
	}
	effect.Before("write", temp)
	if _, err := db.ExecContext(ctx, `VACUUM INTO ?`, temp); err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	if err := mark(ctx, temp, time.Now()); err != nil {
		return errors.Join(err, removeIfThere(temp))
	}
	if err := syncPath(temp); err != nil {
		return err
	}
	if err := effect.Rename(temp, name); err != nil {
		return err
	}
	return syncPath(filepath.Dir(name))
}

func removeIfThere(name string) error {
	if err := effect.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// mark writes into a copy that it is one, unless that is in it.
func mark(ctx context.Context, path string, at time.Time) (err error) {
	db, err := connect(path, url.Values{"_pragma": {"journal_mode(DELETE)", "synchronous(FULL)"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	text := []byte(at.UTC().Format(time.RFC3339))
	effect.Before("commit", path)
	_, err = db.ExecContext(ctx, `INSERT INTO meta (key, record, digest) VALUES (?, ?, ?) ON CONFLICT DO NOTHING`,
		kindCopied, text, seal(kindCopied, "", 0, text))
	return err
}

func syncPath(path string) error {
	f, err := effect.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// noticeRestore finds out whether the file is a copy that was put in the place
// of the one that it was made from. Then nobody knows what happened since: its
// jobs are marked, and wait until it is found out.
func (s *SQLite) noticeRestore(ctx context.Context) error {
	var text []byte
	err := s.db.QueryRowContext(ctx, `SELECT record FROM meta WHERE key = ?`, kindCopied).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("find out whether it is a copy: %w", err)
	}
	at, err := time.Parse(time.RFC3339, string(text))
	if err != nil {
		at = time.Unix(0, 0) // damaged, it is a copy all the same
	}
	all, err := rows(ctx, s.db, `SELECT id, revision, record, digest FROM jobs WHERE settled = 0`)
	if err != nil {
		return err
	}
	reason := fmt.Sprintf("from the copy of %s UTC; what happened since is not on record", at.UTC().Format(time.DateTime))
	err = s.write(ctx, func(tx *sql.Tx) error {
		for _, r := range all {
			j, err := r.decode()
			if err != nil || j.State.Terminal() {
				continue // a damaged one is told of when it is asked for
			}
			marked, err := j.Apply(job.Restored, time.Now(), reason)
			if err != nil {
				return err
			}
			marked.Restored, marked.Why = true, ""
			if _, err := replace(ctx, tx, marked); err != nil {
				return err
			}
		}
		_, err := tx.ExecContext(ctx, `DELETE FROM meta WHERE key = ?`, kindCopied)
		return err
	})
	if err != nil {
		return fmt.Errorf("mark the jobs of a copy: %w", err)
	}
	s.restored = at.UTC()
	return nil
}

// Restored is when the copy was made that the store is, if one was put in the
// place of the file before it was opened; else it is zero.
func (s *SQLite) Restored() time.Time { return s.restored }
