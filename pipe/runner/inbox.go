package runner

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// A letter is what was found in pipe_in.
type letter struct {
	data    []byte
	digest  string // of data
	problem string // why it could not be read; then there is no data
	// late: found by looking, at start or after notices were lost, so it may
	// be old.
	late bool
	file fileID
}

// A fileID tells one write from the next.
type fileID struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// An inbox hands on each request that is written to pipe_in.
type inbox struct {
	cfg    Config
	layout func() error                // makes the folder and pipe_in
	lost   func(context.Context) error // the folder was gone and is there again
	ready  func()                      // called when each write is noticed from now on
	out    chan<- letter
	logf   func(format string, args ...any)

	last      fileID // what was handed on last
	digest    string
	leaseless bool // said once that leases don't work here
}

// recheck is how often pipe_in is looked at while a writer keeps it open.
// Its close is noticed by itself; this is for one that was missed.
const recheck = time.Second

// remake is how often a folder that can't be watched is tried again.
const remake = time.Second

// errLost: the folder that was watched is no longer the one at its path.
var errLost = errors.New("the folder was removed, moved or unmounted")

// run watches until ctx is done. Nothing else ends it: what fails is tried
// again.
func (in *inbox) run(ctx context.Context) {
	said := ""
	for again := false; ctx.Err() == nil; again = true {
		err := in.watch(ctx, again)
		if ctx.Err() != nil {
			return
		}
		if err.Error() == said {
			if !pause(ctx, remake) {
				return
			}
			continue // it was said, and a second ago
		}
		said = err.Error()
		in.logf("watching %s ended, it is made and watched again: %v", in.cfg.Pipe, err)
		if !errors.Is(err, errLost) && !pause(ctx, remake) {
			return
		}
	}
}

func (in *inbox) watch(ctx context.Context, again bool) error {
	if err := in.layout(); err != nil {
		return err
	}
	w, err := newWatcher(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	if _, err := w.add(in.cfg.Pipe, unix.IN_ONLYDIR|unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MODIFY|unix.IN_CLOSE_WRITE|
		unix.IN_DELETE_SELF|unix.IN_MOVE_SELF); err != nil {
		return err
	}
	if again {
		if err := in.lost(ctx); err != nil {
			return err
		}
	}
	// Watch first, then look: nothing falls in between.
	busy, late := in.look(ctx, true), true
	in.ready()
	modified := false
	for {
		timeout := time.Duration(0)
		if busy {
			timeout = recheck
		}
		notices, err := w.read(timeout)
		if err != nil {
			return err
		}
		if len(notices) == 0 && busy {
			busy = in.look(ctx, late)
		}
		for _, n := range notices {
			switch {
			case n.mask&unix.IN_Q_OVERFLOW != 0:
				in.logf("notices of %s were lost: it is looked at", in.cfg.Pipe)
				busy, late = in.look(ctx, true), true
			case n.mask&(unix.IN_IGNORED|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_UNMOUNT) != 0:
				return errLost
			case n.name != pipe.In:
			case n.mask&unix.IN_ISDIR != 0:
				busy, late = in.look(ctx, false), false // which refuses it
				if err := in.layout(); err != nil {
					return err
				}
			case n.mask&unix.IN_MODIFY != 0:
				modified = true
			case n.mask&unix.IN_MOVED_TO != 0, n.mask&unix.IN_CLOSE_WRITE != 0 && (modified || busy):
				modified = false
				busy, late = in.look(ctx, false), false
			}
		}
	}
}

// look hands on what lies in pipe_in, and reports whether a writer still has
// it open.
func (in *inbox) look(ctx context.Context, late bool) (busy bool) {
	l, err := in.open()
	switch {
	case errors.Is(err, unix.EAGAIN):
		return true
	case errors.Is(err, fs.ErrNotExist):
		return false
	case err != nil:
		l.problem = err.Error()
	}
	// Several renames may be noticed after the last of them.
	if l.problem == "" && l.file == in.last && l.digest == in.digest {
		return false
	}
	in.last, in.digest = l.file, l.digest
	l.late = late
	select {
	case in.out <- l:
	case <-ctx.Done():
	}
	return false
}

// open reads pipe_in; EAGAIN while a writer has it open. It is the runner,
// root, that opens what somebody else put there: so no link is followed, no
// pipe or device waited for, and no second name of a foreign file taken.
func (in *inbox) open() (letter, error) {
	fd, err := unix.Open(in.cfg.pipeIn(), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ELOOP) {
		return letter{}, errors.New("it is a symbolic link; a request is a regular file")
	}
	if err != nil {
		return letter{}, fmt.Errorf("open: %w", err)
	}
	f := os.NewFile(uintptr(fd), in.cfg.pipeIn())
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return letter{}, fmt.Errorf("open: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return letter{}, errors.New("it is no regular file")
	}
	if st.Nlink > 1 {
		return letter{}, errors.New("it has a second name; write a file of your own and rename it")
	}
	leased, err := in.lease(fd)
	if err != nil {
		return letter{}, err
	}
	data, err := io.ReadAll(io.LimitReader(f, pipe.MaxRequest+1))
	if err != nil {
		return letter{}, fmt.Errorf("read: %w", err)
	}
	before := identify(st)
	if err := unix.Fstat(fd, &st); err != nil {
		return letter{}, fmt.Errorf("read: %w", err)
	}
	if !leased && identify(st) != before {
		return letter{}, unix.EAGAIN
	}
	sum := sha256.Sum256(data)
	return letter{data: data, digest: hex.EncodeToString(sum[:]), file: identify(st)}, nil
}

// lease keeps writers waiting until the file is closed; the kernel refuses it
// with EAGAIN while a writer has the file open. Some file systems have no
// leases: then the file counts as still when it did not change while it was
// read.
func (in *inbox) lease(fd int) (bool, error) {
	_, err := unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
	if err == nil {
		return true, nil
	}
	if errors.Is(err, unix.EAGAIN) {
		return false, unix.EAGAIN
	}
	if !in.leaseless {
		in.leaseless = true
		in.logf("no lease on %s, so a slow writer may be read too early: %v", in.cfg.pipeIn(), err)
	}
	return false, nil
}

func identify(st unix.Stat_t) fileID {
	return fileID{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}
}
