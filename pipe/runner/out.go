package runner

import (
	"crypto/rand"
	"encoding/hex"
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

// An out is pipe_out, open for appending.
type out struct {
	cfg  Config
	disk disk
	room *reserve
	user account // whose group may read it

	file   *effect.File
	length *effect.File // spool/length
	gen    pipe.Generation
	seq    uint64 // of the last event
	head   int64  // behind the first line, which is never freed
	freed  int64  // from here on, at the latest, the file is whole
	size   int64  // of the file, which nobody else writes to
	mtime  int64  // when it was last written to, in nanoseconds
	torn   bool   // its last bytes are no whole line
	blocks int64  // allocated up to here

	noHoles bool            // this file system can't free blocks
	strange pipe.Generation // of which it was said that it is not known
}

// errPipeLost: pipe_out is not the file that was written to, or not as long.
var errPipeLost = errors.New("pipe_out was removed, replaced or changed")

// A generationRecord ties a generation to the boot it began in.
type generationRecord struct {
	Generation pipe.Generation `json:"generation"`
	Boot       string          `json:"boot"`
}

// resume goes on in the file that h was read from, if it is this boot's and
// whole. If not it reports false, and what speaks against building on what
// the file says: nil at an ordinary boot and on a new disk.
func (o *out) resume(h history, m mark) (bool, error, error) {
	var rec generationRecord
	if err := readJSON(o.recordPath(), maxResult, &rec); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			if h.gen == "" && h.size == 0 {
				return false, nil, nil
			}
			return false, fmt.Errorf("%w: nothing is on record of it", errDamaged), nil
		}
		return false, nil, err
	}
	switch {
	case h.gen == "":
		return false, fmt.Errorf("%w: generation %s is not there", errDamaged, rec.Generation), nil
	case h.gen != rec.Generation:
		return false, fmt.Errorf("%w: it is of generation %s, not %s", errDamaged, h.gen, rec.Generation), nil
	case h.damage != nil:
		return false, h.damage, nil
	case rec.Boot != o.cfg.Boot:
		return false, nil, nil
	case h.zeros: // within a boot nothing is lost by itself
		return false, fmt.Errorf("%w: NUL bytes behind %d", errDamaged, h.end), nil
	}
	f, err := effect.OpenFile(o.cfg.pipeOut(), os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, nil, fmt.Errorf("open pipe_out: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, nil, errors.Join(fmt.Errorf("look at pipe_out: %w", err), f.Close())
	}
	// The note is made after each event. A runner that was killed in between
	// leaves a longer file, and that its lines count on is seen already.
	if size, mtime := o.noted(rec.Generation); st.Size < size || st.Size == size && mtime != 0 && mtime != st.Mtim.Nano() {
		return false, fmt.Errorf("%w: somebody else wrote to it or cut it", errDamaged), f.Close()
	}
	o.take(f, rec.Generation, h.seq, h.size, h.end != h.size)
	o.head = h.head
	if m.Generation == o.gen {
		o.freed = m.Freed
	}
	return true, nil, nil
}

func (o *out) take(f *effect.File, gen pipe.Generation, seq uint64, size int64, torn bool) {
	if o.file != nil {
		_ = o.file.Close()
	}
	o.file, o.gen, o.seq, o.size, o.torn, o.blocks = f, gen, seq, size, torn, size
	o.head, o.freed = size, 0
	o.note()
	o.remember()
}

// note keeps the time of the last write, by which somebody else's is told.
func (o *out) note() {
	var st unix.Stat_t
	if err := unix.Fstat(int(o.file.Fd()), &st); err == nil {
		o.mtime = st.Mtim.Nano()
	}
}

func (o *out) recordPath() string { return filepath.Join(o.cfg.spool(), "generation") }
func (o *out) lengthPath() string { return filepath.Join(o.cfg.spool(), "length") }

// begin starts a generation with hello: the old file, whose history is h,
// gets the name of its generation, and the new one appears whole.
func (o *out) begin(h history, hello pipe.Hello) error {
	gen, err := o.next(h)
	if err != nil {
		return err
	}
	record, err := json.Marshal(generationRecord{Generation: gen, Boot: o.cfg.Boot})
	if err != nil {
		return fmt.Errorf("begin generation: %w", err)
	}
	if err := o.room.use(func() error { return o.disk.write(o.recordPath(), record) }); err != nil {
		return fmt.Errorf("begin generation: %w", err)
	}
	hello.Generation = gen
	line, err := pipe.MarshalEvent(pipe.Event{Seq: 1, Time: time.Now().UTC(), Type: pipe.TypeHello, Hello: &hello})
	if err != nil {
		return fmt.Errorf("begin generation: %w", err)
	}
	f, err := o.create(filepath.Join(o.cfg.Pipe, "."+gen.File()), line)
	if err != nil {
		return fmt.Errorf("begin generation: %w", err)
	}
	if err := o.shelve(h); err != nil {
		_ = f.Close()
		return fmt.Errorf("begin generation: %w", err)
	}
	if err := effect.Rename(f.Name(), o.cfg.pipeOut()); err != nil {
		_ = f.Close()
		return fmt.Errorf("begin generation: %w", err)
	}
	o.take(f, gen, 1, int64(len(line)), false)
	return syncDir(o.cfg.Pipe)
}

// create makes the new file under a passing name, with its first line.
func (o *out) create(path string, line []byte) (*effect.File, error) {
	f, err := effect.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = o.room.use(func() error {
		if err := f.Truncate(0); err != nil {
			return err
		}
		if _, err := f.Write(line); err != nil {
			return err
		}
		return f.Sync()
	})
	if err == nil {
		err = f.Chown(self().uid, o.user.gid)
	}
	if err == nil {
		err = f.Chmod(0o640)
	}
	if err != nil {
		_ = f.Close()
		return nil, errors.Join(err, effect.Remove(path))
	}
	return f, nil
}

// next names the generation after all that left a trace.
func (o *out) next(h history) (pipe.Generation, error) {
	last, _ := h.gen.Number()
	var rec generationRecord
	if err := readJSON(o.recordPath(), maxResult, &rec); err == nil {
		n, _ := rec.Generation.Number()
		last = max(last, n)
	}
	old, err := o.old()
	if err != nil {
		return "", err
	}
	for _, g := range old {
		n, _ := g.Number()
		last = max(last, n)
	}
	var letters [4]byte
	if _, err := rand.Read(letters[:]); err != nil {
		return "", fmt.Errorf("name generation: %w", err)
	}
	return pipe.Generation(strconv.FormatUint(last+1, 10) + "-" + hex.EncodeToString(letters[:])), nil
}

// shelve gives pipe_out, if there is one, a second name, that of its
// generation. It loses the first when the new file is renamed over it.
func (o *out) shelve(h history) error {
	info, err := os.Lstat(o.cfg.pipeOut())
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return effect.RemoveAll(o.cfg.pipeOut()) // never ours
	}
	if h.end < h.size {
		// A reader would take zeros for events that somebody punched out.
		if err := dropZeros(o.cfg.pipeOut(), h.end); err != nil {
			return err
		}
	}
	if h.gen == "" {
		return nil // nobody could have read an event in it
	}
	old := filepath.Join(o.cfg.Pipe, h.gen.File())
	err = effect.Link(o.cfg.pipeOut(), old)
	if errors.Is(err, fs.ErrExist) {
		// From a crash right here, or put there by somebody.
		if err := effect.RemoveAll(old); err != nil {
			return err
		}
		return effect.Link(o.cfg.pipeOut(), old)
	}
	return err
}

// old lists the generations whose files are kept.
func (o *out) old() ([]pipe.Generation, error) {
	entries, err := os.ReadDir(o.cfg.Pipe)
	if err != nil {
		return nil, fmt.Errorf("list generations: %w", err)
	}
	var all []pipe.Generation
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), pipe.Out+".")
		if _, valid := pipe.Generation(name).Number(); ok && valid {
			all = append(all, pipe.Generation(name))
		}
	}
	return all, nil
}

// freeOld removes the files of generations before the one that a reader is
// at, and reports whether that one is known.
func (o *out) freeOld(g pipe.Generation) (bool, error) {
	old, err := o.old()
	if err != nil {
		return false, err
	}
	if g != o.gen && !slices.Contains(old, g) {
		return false, nil // of another VM, or long gone: says nothing about these files
	}
	limit, _ := g.Number()
	for _, g := range old {
		if n, _ := g.Number(); n < limit {
			if err := effect.RemoveAll(filepath.Join(o.cfg.Pipe, g.File())); err != nil {
				return true, fmt.Errorf("free generation %s: %w", g, err)
			}
		}
	}
	return true, nil
}

// freeable is the range of whole blocks below offset, without those that hold
// the first line: whoever begins at the start learns the generation there.
func (o *out) freeable(offset int64) (from, to int64) {
	var st unix.Stat_t
	if err := unix.Fstat(int(o.file.Fd()), &st); err != nil || st.Blksize <= 0 {
		return 0, 0
	}
	block := int64(st.Blksize) //nolint:unconvert // not on every processor
	return (o.head + block - 1) / block * block, offset / block * block
}

// punch gives back the blocks of a range. All offsets stay what they are.
func (o *out) punch(from, to int64) error {
	if err := o.disk.failing("punch", o.cfg.pipeOut()); err != nil {
		return err
	}
	effect.Before("punch", o.cfg.pipeOut())
	err := unix.Fallocate(int(o.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, from, to-from)
	if errors.Is(err, unix.EOPNOTSUPP) {
		o.noHoles = true
		return nil
	}
	if err != nil {
		return fmt.Errorf("free what was read of pipe_out: %w", err)
	}
	o.freed = to
	o.note()
	o.remember()
	return nil
}

// tidy removes files of generations that never began.
func (o *out) tidy() error {
	entries, err := os.ReadDir(o.cfg.Pipe)
	if err != nil {
		return fmt.Errorf("tidy up: %w", err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "."+pipe.Out+".") {
			if err := effect.RemoveAll(filepath.Join(o.cfg.Pipe, e.Name())); err != nil {
				return fmt.Errorf("tidy up: %w", err)
			}
		}
	}
	return nil
}

// intact reports errPipeLost unless pipe_out is still the file that is open,
// with all that was written and nothing else.
func (o *out) intact() error {
	if o.file == nil {
		return errPipeLost
	}
	var here, there unix.Stat_t
	if err := unix.Lstat(o.cfg.pipeOut(), &there); err != nil {
		return errPipeLost
	}
	if err := unix.Fstat(int(o.file.Fd()), &here); err != nil {
		return fmt.Errorf("look at pipe_out: %w", err)
	}
	if here.Dev != there.Dev || here.Ino != there.Ino || here.Size != o.size || here.Mtim.Nano() != o.mtime {
		return errPipeLost
	}
	return nil
}

// append writes one event. After an error it is not in the file, and can be
// tried again.
func (o *out) append(e pipe.Event) error {
	if err := o.intact(); err != nil {
		return err
	}
	e.Seq, e.Time = o.seq+1, time.Now().UTC()
	line, err := pipe.MarshalEvent(e)
	if err != nil {
		return err
	}
	if o.torn {
		// Ends what a crash or a full disk left; readers pass it over.
		line = append([]byte{'\n'}, line...)
	}
	if err := o.write(line); err != nil {
		return fmt.Errorf("append event: %w", err)
	}
	o.seq, o.torn = e.Seq, false
	o.remember()
	return nil
}

// ahead is how much is allocated at once.
const ahead = 256 << 10

// write appends data in one call. Blocks are allocated first, so that a full
// disk is met before the first byte and not in the middle of a line.
func (o *out) write(data []byte) error {
	if err := o.disk.failing("append", o.cfg.pipeOut()); err != nil {
		return err
	}
	defer o.note()
	if need := o.size + int64(len(data)); need > o.blocks {
		effect.Before("allocate", o.cfg.pipeOut())
		err := unix.Fallocate(int(o.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, o.size, int64(len(data))+ahead)
		if errors.Is(err, unix.ENOSPC) {
			effect.Before("allocate", o.cfg.pipeOut())
			err = unix.Fallocate(int(o.file.Fd()), unix.FALLOC_FL_KEEP_SIZE, o.size, int64(len(data)))
			o.blocks = need
		} else {
			o.blocks = need + ahead
		}
		if err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			o.blocks = 0
			return err
		}
	}
	n, err := o.file.Write(data) // goes on after a short write
	o.size += int64(n)
	if err != nil {
		o.torn = o.torn || n > 0
	}
	return err
}

func (o *out) sync() error {
	if err := o.file.Sync(); err != nil {
		return fmt.Errorf("sync pipe_out: %w", err)
	}
	return nil
}

// remember notes how long the file is and when it was written to, so that the
// next runner can tell that somebody else did, or cut it. It only has to hold
// within one boot, so it is not synced, and a loss of it only hides that.
func (o *out) remember() {
	if o.length == nil {
		f, err := effect.OpenFile(o.lengthPath(), os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return
		}
		o.length = f
	}
	_, _ = o.length.WriteAt(fmt.Appendf(nil, "%020d %-28s %020d\n", o.size, o.gen, o.mtime), 0)
}

// noted is what remember noted for that generation; 0 for what it did not.
func (o *out) noted(gen pipe.Generation) (size, mtime int64) {
	data, err := readBounded(o.lengthPath(), maxResult)
	if err != nil {
		return 0, 0
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 || fields[1] != string(gen) {
		return 0, 0
	}
	if size, err = strconv.ParseInt(fields[0], 10, 64); err != nil {
		return 0, 0
	}
	if len(fields) > 2 { // runners before wrote none
		if mtime, err = strconv.ParseInt(fields[2], 10, 64); err != nil {
			return size, 0
		}
	}
	return size, mtime
}

func (o *out) close() {
	for _, f := range []*effect.File{o.file, o.length} {
		if f != nil {
			_ = f.Close()
		}
	}
}
