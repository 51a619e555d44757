package vmtest

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Under this name the test's own binary is inotifywait: a process like any
// other, there without being installed.
const inotifywait = "inotifywait"

const established = "Watches established."

func init() {
	if len(os.Args) > 0 && filepath.Base(os.Args[0]) == inotifywait {
		os.Exit(beInotifywait(os.Args[1:]))
	}
}

// installInotifywait returns a directory for PATH.
func installInotifywait(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Symlink(self, filepath.Join(dir, inotifywait)); err != nil {
		t.Fatal(err)
	}
	return dir
}

// beInotifywait does what inotifywait of inotify-tools does with the options
// that anyone here may use: -m, -q, -e EVENTS, --format without %.
func beInotifywait(args []string) int {
	monitor, quiet, format, dir := false, false, "", ""
	mask := uint32(0)
	events := map[string]uint32{
		"modify": unix.IN_MODIFY, "create": unix.IN_CREATE, "moved_to": unix.IN_MOVED_TO,
		"close_write": unix.IN_CLOSE_WRITE, "delete": unix.IN_DELETE,
	}
	for i := 0; i < len(args); i++ {
		switch {
		case args[i] == "-m":
			monitor = true
		case args[i] == "-q":
			quiet = true
		case args[i] == "-e" && i+1 < len(args):
			i++
			for name := range strings.SplitSeq(args[i], ",") {
				mask |= events[name]
			}
		case args[i] == "--format" && i+1 < len(args):
			i++
			format = args[i]
		default:
			dir = args[i]
		}
	}
	say := func(line string) {
		if !quiet {
			fmt.Fprintln(os.Stderr, line)
		}
	}
	say("Setting up watches.")
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err == nil {
		_, err = unix.InotifyAddWatch(fd, dir, mask)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "Couldn't watch %s: %v\n", dir, err)
		return 1
	}
	say(established)
	out := bufio.NewWriter(os.Stdout)
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 1
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			// The name's length is the last of the event's four fields.
			length := int(uint32(rest[12]) | uint32(rest[13])<<8 | uint32(rest[14])<<16 | uint32(rest[15])<<24)
			rest = rest[unix.SizeofInotifyEvent+length:]
			fmt.Fprintln(out, format)
			if !monitor {
				break
			}
		}
		if out.Flush() != nil || !monitor {
			return 0
		}
	}
}
