// Package inbox turns what is dropped into the jobs folder into jobs: each
// drop once, whole, whatever is killed meanwhile.
//
// A drop is taken when it has stood still for a while, a file that was moved in
// at once. It is copied to the state folder and synced, then recorded with its
// key, then moved to .taken/ID/NAME. Stopped between any two of these, the next
// start goes on: a drop whose key is on record is moved, not taken again. Where
// it can't be moved it stays, and its key says that it was taken.
package inbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// Names in the jobs folder that are ours.
const (
	takenDir    = ".taken"   // of drops that became jobs, below their IDs
	rejectedDir = "rejected" // of drops that can't be jobs
)

// A Store keeps the records.
type Store interface {
	// CreateAll records jobs, all or none. It fails if there is one of the ID
	// or the drop key of any of them.
	CreateAll(ctx context.Context, jobs []job.Job) ([]job.Job, error)
	Get(ctx context.Context, id job.ID) (job.Job, error)
	// FindDrop returns the job that was made from the drop with that key.
	FindDrop(ctx context.Context, key string) (job.ID, error)
}

// Config is what an Inbox needs. A zero duration or function has a default.
type Config struct {
	Dir   string // the folder that users put jobs into
	State string // below it the copies go to jobs/ID/source

	Settle       time.Duration // a file that stood still so long is whole
	SettleFolder time.Duration // a folder, and all in it; five times Settle
	Rescan       time.Duration // the folder is read so often at least; 10 s
	JobTimeout   time.Duration // of every job
	Keep         time.Duration // copies of a drop, and its job's log, are kept so long after the end; 0: for ever

	// Classify says by which recipe a drop of that name is built.
	Classify func(drop string, isDir bool) (job.Recipe, error)
	// Check says what is wrong with a drop. An [fs.PathError] means that it
	// could not be read; any other error, that it can't be a job.
	Check func(recipe job.Recipe, path string) error
	// Prepare completes a job from the copy of its drop in the folder source.
	// Its errors mean what Check's mean.
	Prepare func(j *job.Job, source string) error
	// NotFound is what the store's errors wrap where there is no such record.
	NotFound error

	Now    func() time.Time // for IDs and records
	Random func() uint64    // for IDs
}

// An Inbox takes drops. Make it with New.
type Inbox struct {
	cfg   Config
	store Store
	log   *zap.Logger

	// Run's alone:
	drops map[string]*drop  // what lies in the folder, by name
	said  map[string]string // what was last said about the folder itself
	mute  int               // drops of which was said less than could be, in this scan
	spoke int               // and those that had their line

	deaf bool              // tests: no events come, as on some network file systems
	step func(name string) // tests: called after each step

	keepEvery time.Duration // tests: see the constant

	copying sync.RWMutex // held by whoever copies the source of an ended job
}

// A drop is what is known of one name in the folder.
type drop struct {
	stamp stamp
	first time.Time // it is waited for since then
	since time.Time // it stood still since then, as far as was seen
	look  time.Time // not looked at before
	done  bool      // with this stamp all is done, only it could not be moved
	id    job.ID    // of the job that it became with this stamp, if it became one
	no    *refusal  // why it became none with this stamp, where that is known
	said  string    // the last thing said about it
}

// New returns an Inbox; Run makes it work.
func New(cfg Config, s Store, log *zap.Logger) *Inbox {
	if cfg.SettleFolder == 0 {
		cfg.SettleFolder = 5 * cfg.Settle
	}
	if cfg.Rescan == 0 {
		cfg.Rescan = 10 * time.Second
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Random == nil {
		cfg.Random = rand.Uint64
	}
	return &Inbox{cfg: cfg, store: s, log: log, drops: make(map[string]*drop), said: make(map[string]string), keepEvery: keepEvery}
}

func (b *Inbox) did(step string) {
	if b.step != nil {
		b.step(step)
	}
}

// Run takes drops until ctx ends and sends the ID of each job that it
// recorded. An ID can come twice, and for a job that is known from before: one
// that was recorded but not yet begun when the daemon stopped.
func (b *Inbox) Run(ctx context.Context, taken chan<- job.ID) error {
	if err := b.sweep(ctx); err != nil {
		return fmt.Errorf("clean up the inbox's copies: %w", err)
	}
	w := b.newWatcher()
	var reading sync.WaitGroup
	reading.Go(w.read)
	reading.Go(func() { b.keep(ctx) })
	defer reading.Wait()
	defer w.close()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		woken := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		case e := <-w.events():
			w.change(e, b.cfg.Dir)
			woken = true
		case err := <-w.errors():
			w.lost(err)
		case n := <-w.notes():
			w.note(n)
			woken = true
		}
		// Who writes a file makes many events: one look is for all.
		if woken && !w.gather(ctx, b.cfg.Dir, b.gap()) {
			return ctx.Err()
		}
		// First the watch, then the scan: what comes between the two is seen.
		switch err := w.watch(b.cfg.Dir); {
		case err == nil:
			delete(b.said, "watch")
		case !errors.Is(err, fs.ErrNotExist): // of a folder that isn't there the scan tells
			b.say("watch", "jobs folder can't be watched, it is read every so often only", err)
		}
		timer.Reset(b.scan(ctx, w.takeWhole(), taken))
	}
}

// gap is for how long events are gathered before a look.
func (b *Inbox) gap() time.Duration {
	return min(max(b.cfg.Settle/10, time.Millisecond), 200*time.Millisecond)
}

// Bounds of how many drops, and bytes in them, are taken at a time.
const (
	maxBatch      = 256
	maxBatchBytes = 256 << 20
)

// scan looks at everything in the folder, takes what stands still, and returns
// when to do so again. whole names the files that are known to be.
func (b *Inbox) scan(ctx context.Context, whole map[string]bool, taken chan<- job.ID) time.Duration {
	entries, err := b.entries()
	if err != nil {
		b.say("read", "jobs folder can't be read, trying again", err)
		return b.cfg.Rescan
	}
	if _, failing := b.said["read"]; failing {
		delete(b.said, "read")
		b.log.Info("jobs folder is there again")
	}
	b.mute, b.spoke = 0, 0
	next := time.Now().Add(b.cfg.Rescan)
	soon := func(due time.Time) {
		if !due.IsZero() && due.Before(next) {
			next = due
		}
	}
	var batch []*candidate
	var bytes int64
	flush := func() {
		b.take(ctx, batch, taken)
		for _, c := range batch {
			soon(b.settled(ctx, c))
		}
		batch, bytes = nil, 0
	}
	there := make(map[string]bool, len(entries))
	for _, e := range entries {
		if ctx.Err() != nil {
			return 0
		}
		if ignored(e.Name()) {
			continue
		}
		there[e.Name()] = true
		c, due := b.look(e.Name(), whole[e.Name()])
		soon(due)
		if c == nil {
			continue
		}
		batch, bytes = append(batch, c), bytes+c.stamp.size
		if len(batch) == maxBatch || bytes >= maxBatchBytes {
			flush()
		}
	}
	if len(batch) > 0 {
		flush()
	}
	for name := range b.drops {
		if !there[name] {
			delete(b.drops, name)
		}
	}
	if b.mute > 0 {
		b.log.Warn("more drops wait", zap.Int("drops", b.mute), zap.String("folder", b.cfg.Dir))
	}
	return max(time.Until(next), time.Millisecond)
}

// entries reads the folder.
func (b *Inbox) entries() ([]os.DirEntry, error) {
	if info, err := os.Stat(b.cfg.Dir); err == nil && removed(info) {
		return nil, hint.With(fmt.Errorf("%s was removed on the host, perhaps made anew, and the container still has the old one", b.cfg.Dir),
			"See that the folder is there, then: docker compose up -d --force-recreate init sidecar")
	}
	entries, err := os.ReadDir(b.cfg.Dir)
	if err != nil {
		return nil, hint.With(err, "Make the folder and give it to PUID:PGID: `docker compose up init` does both.")
	}
	return entries, nil
}

// look sees whether a drop stands still. If it has for long enough, it comes
// back; else when to look again, or zero: with the next scan.
func (b *Inbox) look(name string, whole bool) (*candidate, time.Time) {
	now := time.Now()
	d := b.drops[name]
	if d != nil && now.Before(d.look) {
		return nil, d.look
	}
	s, err := stampOf(filepath.Join(b.cfg.Dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		delete(b.drops, name)
		return nil, time.Time{}
	}
	if d == nil {
		d = &drop{first: now, since: now}
		b.drops[name] = d
	}
	if err != nil {
		b.wait(d, name, b.explain(err, name, 0))
		return nil, time.Time{}
	}
	if s != d.stamp || s.lock != "" {
		if d.id != "" && s.same(d.stamp) {
			// Whoever gave it another owner wants it moved, not built again.
			d.stamp = s
			return &candidate{name: name, stamp: s, drop: d, job: job.Job{ID: d.id}, recorded: true, begun: true}, time.Time{}
		}
		if d.done || d.id != "" {
			*d = drop{first: now} // another drop
		}
		*d = drop{stamp: s, first: d.first, since: now, said: d.said}
	}
	if whole && s.kind.IsRegular() {
		d.since = time.Time{}
	}
	if d.done {
		return nil, time.Time{}
	}
	settle := b.settle(s)
	if still := now.Sub(d.since); still < settle || s.lock != "" {
		b.patience(d, name, s.unrest())
		due := d.since.Add(settle)
		if s.kind.IsDir() {
			// A whole tree is not read anew for each event beside it.
			d.look = now.Add(min(b.cfg.Settle, settle-still))
			due = d.look
		}
		return nil, due
	}
	c := &candidate{name: name, stamp: s, drop: d}
	switch { // one of which all is known is only moved
	case d.id != "":
		c.job, c.recorded, c.begun = job.Job{ID: d.id}, true, true
	case d.no != nil:
		c.err = d.no
	}
	return c, time.Time{}
}

// settle is for how long a drop has to stand still.
func (b *Inbox) settle(s stamp) time.Duration {
	if s.kind.IsDir() {
		return b.cfg.SettleFolder
	}
	return b.cfg.Settle
}

// unrest says why a drop that was waited for long is not still.
func (s stamp) unrest() error {
	switch s.lock {
	case "":
		return hint.With(errors.New("it changes all the time"), "It is taken when it has stood still.")
	case ".git":
		return hint.With(errors.New("git clone is at work in it, or was broken off: it has a .git and no files yet"),
			"It is taken when the files are there. If git is not running any more, remove the folder and clone it again.")
	}
	return hint.With(fmt.Errorf("git is at work in it: %s is there", quote(s.lock)), "If git is not running there any more, remove that file.")
}

// patience says of a drop that is not taken why, once a minute has passed.
func (b *Inbox) patience(d *drop, name string, err error) {
	if time.Since(d.first) >= max(time.Minute, 2*b.settle(d.stamp)) {
		b.wait(d, name, err)
	}
}

// settled deals with what became of a drop that stood still. It returns when
// to look again, or zero: with the next scan.
func (b *Inbox) settled(ctx context.Context, c *candidate) time.Time {
	err := c.err
	var refused *refusal
	if errors.As(err, &refused) {
		err = b.reject(c.name, c.stamp, refused)
	}
	var stays *stuck
	switch {
	case err == nil, b.gone(c.name):
		delete(b.drops, c.name)
	case ctx.Err() != nil:
	case errors.Is(err, errChanged):
		*c.drop = drop{first: c.drop.first, said: c.drop.said}
		return time.Now()
	case errors.Is(err, errOpen):
		b.patience(c.drop, c.name, hint.With(err, "It is taken when that program closes it."))
		c.drop.look = time.Now().Add(b.settle(c.stamp))
		return c.drop.look
	case errors.As(err, &stays) && stays.again:
		if c.recorded {
			c.drop.id = c.job.ID
		}
		c.drop.no = refused
		b.sayTrying(c.drop, c.name, stays.what, stays.err)
		c.drop.look = time.Now().Add(b.cfg.Rescan)
	case errors.As(err, &stays):
		c.drop.done = true
		if c.recorded {
			c.drop.id = c.job.ID
		}
		if text := stays.Error(); c.drop.said != text {
			c.drop.said = text
			b.log.Warn(stays.what, b.about(c.name, stays.err)...)
		}
	default:
		b.wait(c.drop, c.name, b.explain(err, c.name, c.stamp.size))
		c.drop.look = time.Now().Add(b.cfg.Rescan)
	}
	return time.Time{}
}

func (b *Inbox) gone(name string) bool {
	_, err := os.Lstat(filepath.Join(b.cfg.Dir, name))
	return errors.Is(err, fs.ErrNotExist)
}

// maxSaid bounds how many drops a scan says that they wait: ten thousand can
// wait for the same.
const maxSaid = 20

// wait says, once, why a drop is not taken yet.
func (b *Inbox) wait(d *drop, name string, err error) {
	const what = "drop waits, trying again"
	b.sayTrying(d, name, what, err)
}

func (b *Inbox) sayTrying(d *drop, name, what string, err error) {
	// Each try has an ID of its own, which makes no news.
	text := anyID.ReplaceAllString(err.Error(), "ID")
	// Nor does it that other programs write and remove files meanwhile.
	var full *disk.NoRoom
	if errors.As(err, &full) {
		text = "no room in " + full.Path
	}
	if d.said == text {
		return
	}
	d.said = text
	if b.spoke++; b.spoke > maxSaid {
		b.mute++
		return
	}
	b.log.Warn(what, b.about(name, err)...)
}

var anyID = regexp.MustCompile(`[0-9]{8}-[0-9]{6}-[0-9a-z]{6}`)

// say tells of a fault of the folder itself, once until it changes.
func (b *Inbox) say(about, message string, err error) {
	if text := err.Error(); b.said[about] != text {
		b.said[about] = text
		b.log.Warn(message, b.about("", err)...)
	}
}

// about returns what a line says about an error. Names are quoted by the
// encoder, so that none can break a line.
func (b *Inbox) about(name string, err error) []zap.Field {
	fields := []zap.Field{zap.String("folder", b.cfg.Dir), zap.Error(err)}
	if name != "" {
		fields[0] = zap.String("drop", name)
	}
	if hints := hint.Of(err); len(hints) > 0 {
		fields = append(fields, zap.String("hint", strings.Join(hints, " ")))
	}
	return fields
}

// explain adds what to do about the errors that users can mend. need is how
// many bytes the drop has.
func (b *Inbox) explain(err error, name string, need int64) error {
	var full *disk.NoRoom
	switch {
	case disk.Full(err) && !errors.As(err, &full):
		free, _ := disk.Free(b.cfg.State)
		err = fmt.Errorf("%w: %w", &disk.NoRoom{Path: b.cfg.State, Need: need, Free: free}, err)
		fallthrough
	case disk.Full(err):
		return hint.With(err, "Make room on the disk of Docker's volumes. The drop is taken by itself then.")
	case errors.Is(err, fs.ErrPermission):
		return hint.With(err, fmt.Sprintf("The daemon runs as user %d, group %d and must be able to read the drop. On the host, in the jobs folder: chmod -R a+rX %s",
			os.Geteuid(), os.Getegid(), shellQuote(name)))
	}
	return err
}

// sweep removes copies whose job was never recorded: their drops still lie in
// the folder.
func (b *Inbox) sweep(ctx context.Context) error {
	jobs := filepath.Join(b.cfg.State, "jobs")
	if err := disk.MkdirAll(jobs, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(jobs)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		path := filepath.Join(jobs, e.Name())
		if strings.HasPrefix(e.Name(), newPrefix) {
			if err := effect.RemoveAll(path); err != nil {
				return err
			}
			continue
		}
		marker := filepath.Join(path, unrecorded)
		if _, err := os.Lstat(marker); err != nil || !pipe.ValidID(e.Name()) {
			continue
		}
		switch _, err := b.store.Get(ctx, job.ID(e.Name())); {
		case err == nil:
			err = effect.Remove(marker)
			if err != nil {
				return err
			}
		case errors.Is(err, b.cfg.NotFound):
			if err := effect.RemoveAll(path); err != nil {
				return err
			}
		default:
			return fmt.Errorf("look for job %s: %w", e.Name(), err)
		}
	}
	return nil
}
