package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
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
