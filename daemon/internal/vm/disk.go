package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/pkg/sftp"

	"osbuilder/pipe"
)

// runDir is where the VM notes, at each boot, what it found out.
const runDir = "/run/osbuilder"

// maxNote bounds what is read of such a note, in bytes.
const maxNote = 1000

// dataDisk returns ErrNoDisk if the VM noted that it has no data disk: it is
// absent, another's, damaged or full. One that notes nothing is older than
// this, or has not come so far.
func dataDisk(ctx context.Context, l *link, dir string) error {
	name := path.Join(dir, "store")
	note, err := call(ctx, l, l.t.Call, "read "+name, func() ([]byte, error) {
		file, err := l.sftp.Open(name)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		return io.ReadAll(io.LimitReader(file, maxNote))
	})
	switch {
	case errors.Is(err, ErrDown) || ctx.Err() != nil:
		return err
	case err != nil:
		return nil //nolint:nilerr // a note that can't be read says nothing
	}
	line, _, _ := strings.Cut(string(note), "\n")
	word, why, _ := strings.Cut(line, ":")
	if word != "none" && word != "ephemeral" {
		return nil
	}
	return &RungError{RungDisk, fmt.Errorf("%w: %s", ErrNoDisk, strings.ToValidUTF8(strings.TrimSpace(why), ""))}
}

// fullBelow is how much room beside what is needed, in bytes, is none: a file
// system takes some for itself.
const fullBelow = 1 << 20

// noRoom adds to the error of a write to dir that the VM's disk is full, with
// figures, if it is. SFTP has no word for that: OpenSSH says "Failure". need is
// what was still to be written, in bytes.
func noRoom(c *sftp.Client, dir string, need int64, err error) error {
	var status *sftp.StatusError
	if !errors.As(err, &status) || status.FxCode() != sftp.ErrSSHFxFailure {
		return err
	}
	fs, statErr := c.StatVFS(dir)
	if statErr != nil {
		return err // it stays as vague as it is
	}
	free := int64(fs.Bavail * fs.Frsize)
	if free >= need+fullBelow {
		return err
	}
	return fmt.Errorf("%w: %s are needed, %s are free (%w); it is tried again by itself, jobs that end make room, "+
		"and a larger DISK_SIZE counts from the VM's next start", ErrFull, pipe.Size(need), pipe.Size(free), err)
}
