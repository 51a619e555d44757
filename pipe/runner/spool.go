package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// A spool keeps on disk what was accepted and what became of it.
type spool struct {
	cfg  Config
	disk disk
	room *reserve
	lock *effect.File
	gone int // tombstones, about
}

// Bounds of what is read back, in bytes: far above what is written.
const (
	maxRecord  = 64 << 10
	maxOutcome = 64 << 20
)

// maxGone is how many tombstones are kept; maxAside how many stale requests.
const (
	maxGone  = 10_000
	maxAside = 20
)

// tombstone is what stays of an acknowledged job: enough to answer a repeat.
type tombstone struct {
	SHA256 string `json:"sha256"`
	Inputs string `json:"inputs,omitempty"`
}

func (s *spool) path(names ...string) string {
	return filepath.Join(append([]string{s.cfg.spool()}, names...)...)
}

// open makes the spool's folders and holds the lock for as long as this
// runner lives. Another that lives already is an error.
func (s *spool) open() error {
	for _, name := range []string{"jobs", "gone", "aside", "damaged", "trash", "inputs"} {
		if err := effect.MkdirAll(s.path(name), 0o700); err != nil {
			return fmt.Errorf("open spool: %w", err)
		}
	}
	f, err := effect.OpenFile(s.path("lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("open spool: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return fmt.Errorf("open spool %s: another runner works here, stop it first: %w", s.cfg.spool(), err)
	}
	s.lock = f
	entries, err := os.ReadDir(s.path("gone"))
	if err != nil {
		return fmt.Errorf("open spool: %w", err)
	}
	s.gone = len(entries)
	for _, dir := range []string{"", "jobs", "gone", "inputs"} {
		if err := removeParts(s.path(dir)); err != nil {
			return err
		}
	}
	return s.room.fill()
}

func (s *spool) close() { _ = s.lock.Close() }

// load reads every job, in the order of acceptance. What can't be read is set
// aside and reported, so that one bad record doesn't stop the rest.
func (s *spool) load(logf func(string, ...any)) ([]*job, error) {
	entries, err := os.ReadDir(s.path("jobs"))
	if err != nil {
		return nil, fmt.Errorf("load spool: %w", err)
	}
	var jobs []*job
	for _, e := range entries {
		j, err := s.loadJob(e.Name())
		if err != nil {
			aside := s.path("damaged", e.Name()+"."+strconv.FormatInt(time.Now().UnixNano(), 36))
			logf("job %s can't be read, its folder is now %s: %v", e.Name(), aside, err)
			if err := effect.Rename(s.path("jobs", e.Name()), aside); err != nil {
				return nil, fmt.Errorf("load spool: %w", err)
			}
			continue
		}
		jobs = append(jobs, j)
	}
	if err := s.adopt(jobs); err != nil {
		return nil, fmt.Errorf("load spool: %w", err)
	}
	slices.SortFunc(jobs, func(a, b *job) int {
		if a.Order < b.Order {
			return -1
		}
		return 1
	})
	return jobs, nil
}

// adopt makes last what was found: the runner that put it there may have been
// killed between its rename and its sync, and this one goes by it.
func (s *spool) adopt(jobs []*job) error {
	for _, j := range jobs {
		if err := syncDir(s.cfg.paths(j.ref()).spool); err != nil {
			return err
		}
	}
	for _, name := range []string{"jobs", "gone", ""} {
		if err := syncDir(s.path(name)); err != nil {
			return err
		}
	}
	return nil
}

func (s *spool) loadJob(name string) (*job, error) {
	ref, ok := parseFolder(name)
	if !ok {
		return nil, errors.New("its name is no job's")
	}
	p := s.cfg.paths(ref)
	j := &job{}
	if err := readJSON(p.record(), maxRecord, &j.record); err != nil {
		return nil, err
	}
	if j.ref() != ref {
		return nil, fmt.Errorf("the record is of %s", folder(j.ref()))
	}
	if err := readJSON(p.base(), maxRecord, &j.base); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if j.base < 0 {
		return nil, fmt.Errorf("read %s: %d", p.base(), j.base)
	}
	if exists(p.ran()) {
		j.ran = &marker{}
		if err := readJSON(p.ran(), maxResult, j.ran); err != nil {
			j.ran = &marker{} // cut by a crash: never started, but who knows
		}
	}
	if exists(p.cancel()) {
		j.wish = &wish{}
		if err := readJSON(p.cancel(), maxResult, j.wish); err != nil {
			j.wish = &wish{} // since when nobody knows; that it is wanted is what counts
		}
	}
	var o outcome
	switch err := readJSON(p.outcome(), maxOutcome, &o); {
	case err == nil && (o.Finished.Status == "" || o.Finished.LogLength < 0):
		return nil, fmt.Errorf("read %s: status %q, %d bytes of output", p.outcome(), o.Finished.Status, o.Finished.LogLength)
	case err == nil:
		j.outcome, j.started = &o, o.Started
	case !errors.Is(err, fs.ErrNotExist):
		return nil, err
	}
	// What ran already needs them no more.
	if j.Inputs != "" && j.outcome == nil && j.ran == nil && !exists(p.inputs()) {
		return nil, errors.New("its inputs are gone")
	}
	return j, nil
}

// accept stores a job; the copy of its inputs, if it has any, is moved to it.
// After an error nothing of the job is there.
func (s *spool) accept(rec record, body []byte, inputs string) error {
	dir := s.cfg.paths(rec.ref()).spool
	temp := dir + tempSuffix
	err := s.fill(temp, rec, body, inputs)
	if err == nil {
		err = effect.Rename(temp, dir)
	}
	if err == nil {
		temp = dir // refused, it is not for the next runner to find
		err = s.disk.syncDir(filepath.Dir(dir))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("spool job %s: %w", folder(rec.ref()), err), effect.RemoveAll(temp))
	}
	return nil
}

func (s *spool) fill(dir string, rec record, body []byte, inputs string) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	if err := effect.RemoveAll(dir); err != nil {
		return err
	}
	if err := effect.Mkdir(dir, 0o700); err != nil {
		return err
	}
	if err := s.disk.writeNew(filepath.Join(dir, "record"), data, 0o600); err != nil {
		return err
	}
	if err := s.disk.writeNew(filepath.Join(dir, "body"), body, 0o600); err != nil {
		return err
	}
	if inputs != "" {
		if err := effect.Rename(inputs, filepath.Join(dir, "inputs")); err != nil {
			return err
		}
	}
	// The log is there from the start: systemd appends to it, the attendant
	// watches it.
	if err := s.disk.writeNew(filepath.Join(dir, "log"), nil, 0o600); err != nil {
		return err
	}
	return syncDir(dir)
}

// setBase notes how much of a job's output earlier generations told.
func (s *spool) setBase(ref pipe.JobRef, n int64) error {
	return s.room.use(func() error {
		return s.disk.write(s.cfg.paths(ref).base(), strconv.AppendInt(nil, n, 10))
	})
}

// wish notes that a job is to end.
func (s *spool) wish(ref pipe.JobRef, w wish) error {
	data, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("note that a job is to end: %w", err)
	}
	return s.room.use(func() error { return s.disk.write(s.cfg.paths(ref).cancel(), data) })
}

// mark is what was freed of pipe_out; of none if that can't be read, and then
// the file shows that it is not whole.
func (s *spool) mark() mark {
	var m mark
	if err := readJSON(s.path("consumed"), maxOutcome, &m); err != nil {
		return mark{}
	}
	return m
}

func (s *spool) setMark(m mark) error {
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("note what was read of pipe_out: %w", err)
	}
	return s.room.use(func() error { return s.disk.write(s.path("consumed"), data) })
}

// repeated is the place for which all was told again last.
func (s *spool) repeated() pipe.Position {
	var p pipe.Position
	if err := readJSON(s.path("repeated"), maxResult, &p); err != nil {
		return pipe.Position{} // then it is told once more
	}
	return p
}

func (s *spool) setRepeated(p pipe.Position) error {
	data, err := json.Marshal(p)
	if err != nil {
		return fmt.Errorf("note what was told again: %w", err)
	}
	return s.room.use(func() error { return s.disk.write(s.path("repeated"), data) })
}

// settle stores the one outcome. It is the first that counts.
func (s *spool) settle(ref pipe.JobRef, o outcome) error {
	data, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("record outcome: %w", err)
	}
	return s.room.use(func() error { return s.disk.write(s.cfg.paths(ref).outcome(), data) })
}

// bury leaves the tombstone of a job.
func (s *spool) bury(rec record) error {
	data, err := json.Marshal(tombstone{SHA256: rec.SHA256, Inputs: rec.Inputs})
	if err != nil {
		return fmt.Errorf("bury job: %w", err)
	}
	path := s.path("gone", folder(rec.ref()))
	if err := s.room.use(func() error { return s.disk.write(path, data) }); err != nil {
		return err
	}
	s.gone++
	// Not one at a time: each pruning looks at all of them.
	if s.gone > maxGone+maxGone/10 {
		return s.pruneGone(maxGone)
	}
	return nil
}

// tombstone returns what is left of an acknowledged job, if anything is.
func (s *spool) tombstone(ref pipe.JobRef) (tombstone, bool) {
	var t tombstone
	err := readJSON(s.path("gone", folder(ref)), maxRecord, &t)
	// A damaged one still says that the job was here: it answers no repeat,
	// but nothing runs twice.
	return t, !errors.Is(err, fs.ErrNotExist)
}

// pruneGone removes the oldest tombstones until keep are left.
func (s *spool) pruneGone(keep int) error {
	n, err := pruneOldest(s.path("gone"), keep)
	s.gone = n
	return err
}

// pruneOldest removes the oldest files of a folder until keep are left, and
// returns how many there are then.
func pruneOldest(dir string, keep int) (int, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, fmt.Errorf("prune %s: %w", dir, err)
	}
	infos := make([]fs.FileInfo, 0, len(entries))
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			infos = append(infos, info)
		}
	}
	if len(infos) <= keep {
		return len(infos), nil
	}
	slices.SortFunc(infos, func(a, b fs.FileInfo) int { return a.ModTime().Compare(b.ModTime()) })
	for _, info := range infos[:len(infos)-keep] {
		if err := effect.RemoveAll(filepath.Join(dir, info.Name())); err != nil {
			return len(infos), fmt.Errorf("prune %s: %w", dir, err)
		}
	}
	return keep, nil
}

// forget moves all that belongs to a job out of sight; emptyTrash removes it.
func (s *spool) forget(ref pipe.JobRef) error {
	p := s.cfg.paths(ref)
	if err := effect.RemoveAll(p.roots); err != nil {
		return fmt.Errorf("forget job %s: %w", folder(ref), err)
	}
	// The record goes last: with it gone nothing leads back to the rest.
	for i, path := range []string{p.own, p.artifacts + tempSuffix, p.artifacts, p.spool} {
		name := fmt.Sprintf("%s.%d.%s", folder(ref), i, strconv.FormatInt(time.Now().UnixNano(), 36))
		if err := effect.Rename(path, s.path("trash", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("forget job %s: %w", folder(ref), err)
		}
	}
	return syncDir(s.path("jobs"))
}

// emptyTrash removes what was forgotten. It may take long.
func (s *spool) emptyTrash() error {
	entries, err := os.ReadDir(s.path("trash"))
	if err != nil {
		return fmt.Errorf("empty trash: %w", err)
	}
	var all error
	for _, e := range entries {
		all = errors.Join(all, effect.RemoveAll(s.path("trash", e.Name())))
	}
	return all
}

// owner is whose VM this is; empty before the first request.
func (s *spool) owner() (string, error) {
	data, err := readBounded(s.path("owner"), maxResult)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("read owner: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

func (s *spool) setOwner(owner string) error {
	return s.room.use(func() error { return s.disk.write(s.path("owner"), []byte(owner+"\n")) })
}

// seen is the digest of what was last read from pipe_in.
func (s *spool) seen() string {
	data, err := readBounded(s.path("seen"), maxResult)
	if err != nil {
		return "" // then it is looked at once more, which repeats an answer
	}
	return strings.TrimSpace(string(data))
}

func (s *spool) setSeen(digest string) error {
	return s.room.use(func() error { return s.disk.write(s.path("seen"), []byte(digest+"\n")) })
}

// setAside keeps a stale request, and says where.
func (s *spool) setAside(l letter) (string, error) {
	path := s.path("aside", time.Now().UTC().Format("20060102T150405Z")+"-"+l.digest[:12])
	if err := s.disk.write(path, l.data); err != nil {
		return "", fmt.Errorf("set request aside: %w", err)
	}
	_, err := pruneOldest(s.path("aside"), maxAside)
	return path, err
}

// readJSON reads a file of at most limit bytes into v.
func readJSON(path string, limit int64, v any) error {
	data, err := readBounded(path, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	return nil
}
