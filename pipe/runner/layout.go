package runner

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe/effect"
)

// makeDir makes a folder with exactly that owner and mode.
func makeDir(path string, owner account, group int, mode fs.FileMode) error {
	err := effect.MkdirAll(path, 0o700)
	if errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("make layout: %s is no folder: move it away", path)
	}
	if err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("make layout: %s is no folder: move it away", path)
	}
	if err := effect.Chown(path, owner.uid, group); err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	if err := effect.Chmod(path, mode); err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	return nil
}

// makeData makes the folders on the data disk.
func (c Config) makeData(sftp account) error {
	root := self()
	for _, d := range []struct {
		path  string
		group int
		mode  fs.FileMode
	}{
		{c.Data, root.gid, 0o755},
		{c.spool(), root.gid, 0o700},
		{c.jobsDir(), root.gid, 0o711}, // a slot's user reaches its own folder, and lists none
		{c.artifactsDir(), sftp.gid, 0o750},
	} {
		if err := makeDir(d.path, root, d.group, d.mode); err != nil {
			return err
		}
	}
	return nil
}

// makePipe makes the folder of the pipe and an empty pipe_in. The folder is
// sticky and the runner's: its group may make files there and rename its own
// over its own pipe_in, but neither remove nor replace pipe_out.
func (c Config) makePipe(sftp account) error {
	if err := makeDir(c.Pipe, self(), sftp.gid, 0o770|fs.ModeSticky); err != nil {
		return err
	}
	if err := c.moveFolder(c.pipeIn()); err != nil {
		return err
	}
	f, err := effect.OpenFile(c.pipeIn(), os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o660)
	if errors.Is(err, fs.ErrExist) {
		return nil // somebody's request, perhaps
	}
	if err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	defer f.Close()
	if err := f.Chown(sftp.uid, sftp.gid); err != nil {
		return fmt.Errorf("make layout: %w", err)
	}
	if err := f.Chmod(0o660); err != nil { // whatever the umask is
		return fmt.Errorf("make layout: %w", err)
	}
	return nil
}

// moveFolder gives a folder that somebody put in a file's place another name,
// since no file can be renamed over it. What is in it stays.
func (c Config) moveFolder(path string) error {
	info, err := os.Lstat(path)
	if err != nil || !info.IsDir() {
		return nil //nolint:nilerr // what is missing or can't be looked at is made next, or that fails
	}
	aside := path + ".folder-" + strconv.FormatInt(time.Now().UnixNano(), 36)
	if err := effect.Rename(path, aside); err != nil {
		return fmt.Errorf("make layout: %s is a folder: %w", path, err)
	}
	fmt.Fprintf(c.Log, "%s was a folder, which is now %s\n", path, aside)
	return nil
}
