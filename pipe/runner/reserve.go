package runner

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"osbuilder/pipe/effect"
)

// reserveSize is what is kept back, in bytes: enough for the answers and
// tombstones of some thousand acknowledgements.
const reserveSize = 4 << 20

// A reserve is a file whose blocks are given back when the disk is full, so
// that a request that frees room can still be carried out and answered.
type reserve struct {
	path  string
	spent bool // given back, and not filled since
	kept  bool // filled
}

// fill allocates the blocks. On a full disk they come with a later call.
func (r *reserve) fill() error {
	if r.kept {
		return nil
	}
	f, err := effect.OpenFile(r.path, os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("keep a reserve: %w", err)
	}
	defer f.Close()
	effect.Before("allocate", r.path)
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	switch {
	case errors.Is(err, unix.EOPNOTSUPP):
	case full(err):
		r.spent = true
		return f.Truncate(0) // not half of it
	case err != nil:
		return fmt.Errorf("keep a reserve: %w", err)
	}
	r.spent, r.kept = false, true
	return nil
}

// use does what must work on a full disk too: if it fails for want of room,
// the reserve is given back and it is done once more.
func (r *reserve) use(do func() error) error {
	err := do()
	if !full(err) {
		return err
	}
	if terr := effect.Truncate(r.path, 0); terr != nil {
		return errors.Join(err, terr)
	}
	r.spent, r.kept = true, false
	return do()
}

// full reports whether err is for want of room.
func full(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}
