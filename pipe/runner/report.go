package runner

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// report reads what the job left at $REPORT, if it left anything. Its folder
// is locked, so nobody changes it any more; all the same it is root that
// opens a path in a folder that a job could write to.
func (a *attendant) report() (pipe.Report, error) {
	path := a.path.report()
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	maker, err := a.r.cfg.slotUser(a.ran.Slot)
	switch {
	case err != nil:
		return nil, err
	case st.Mode&unix.S_IFMT != unix.S_IFREG, st.Nlink != 1, int(st.Uid) != maker.uid:
		return nil, fmt.Errorf("%s is no regular file of the job's own", path)
	case st.Size > pipe.MaxReport:
		return nil, fmt.Errorf("%s has %d bytes, at most %d are taken", path, st.Size, pipe.MaxReport)
	}
	data, err := io.ReadAll(io.LimitReader(f, pipe.MaxReport+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(data) == 0 {
		return nil, errors.New("it is empty: was there no space left on the VM's data disk?")
	}
	return pipe.ParseReport(data)
}
