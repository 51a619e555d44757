package scripts

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"osbuilder/internal/testenv"
)

// terminal returns the two ends of one.
func terminal(t *testing.T) (user, program *os.File) {
	t.Helper()
	user, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		testenv.Lacks(t, "there are no terminals here: %v", err)
	}
	t.Cleanup(func() { _ = user.Close() })
	err = unix.IoctlSetPointerInt(int(user.Fd()), unix.TIOCSPTLCK, 0)
	n, err2 := unix.IoctlGetUint32(int(user.Fd()), unix.TIOCGPTN)
	if err = errors.Join(err, err2); err == nil {
		program, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	return user, program
}

// answer runs a script on a terminal, and answers its questions.
func (f *folder) answer(script, answers string) (said string, err error) {
	f.t.Helper()
	user, program := terminal(f.t)
	if _, err := user.WriteString(answers); err != nil {
		f.t.Fatal(err)
	}
	cmd := exec.CommandContext(f.t.Context(), f.bash, "scripts/"+script)
	cmd.Dir = f.root
	cmd.Env = append([]string{"PATH=" + f.path, "FAKE=" + f.fake, "HOME=" + f.fake}, f.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = program, program, program
	err = errors.Join(cmd.Start(), program.Close())
	if err != nil {
		f.t.Fatal(err)
	}
	text, readErr := io.ReadAll(user)
	if readErr != nil && !errors.Is(readErr, unix.EIO) { // the other end is closed
		f.t.Error(readErr)
	}
	return string(text), cmd.Wait()
}

// What is removed is what was taken, rejected and delivered, whatever anyone called it, and nothing else.
func TestCleanRemovesOddNames(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write(filepath.Join(f.root, ".env"), "JOBS_DIR='./my jobs'\nOUTPUT_DIR='./my output'\n")
	odd := []string{"x\ndaemon", "x\n\ndaemon\ny", "-rf", " ", "$(rm -rf daemon)", "*", "'\"", "\xff"}
	gone, stays := []string{"my output/.partial/1/result.json"}, []string{"daemon/main.go", "my jobs/waits.nix", "my output/mine/too/x", "my output/x\ndaemon/too"}
	for _, name := range odd {
		gone = append(gone, "my jobs/rejected/"+name+"/y", "my jobs/.taken/"+name+"/y")
	}
	for _, name := range []string{"hello", "x\ndaemon"} {
		gone = append(gone, "my output/"+name+"/1/result.json", "my output/"+name+"/2\ndaemon/result.json")
	}
	for _, name := range append(gone, stays...) {
		path := filepath.Join(f.root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("1", filepath.Join(f.root, "my output", "hello", "latest")); err != nil {
		t.Fatal(err)
	}
	said, err := f.answer("clean.sh", "y\ny\n")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make clean", said, "Delete the images in ./my output and the jobs that were taken or rejected, too? [y/N]", "Removed.")
	for _, name := range stays {
		if _, err := os.Lstat(filepath.Join(f.root, name)); err != nil {
			t.Error(err)
		}
	}
	for _, name := range append(gone, "my jobs/rejected", "my jobs/.taken", "my output/hello") {
		if _, err := os.Lstat(filepath.Join(f.root, name)); err == nil {
			t.Errorf("left: %q", name)
		}
	}
}
