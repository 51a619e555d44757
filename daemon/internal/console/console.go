// Package console reads what the containers of a VM leave for the sidecar,
// which has no access to Docker: how it is with the VM from outside, and the
// end of its serial console. It lies in a small volume in memory, so that a
// full disk doesn't silence it:
//
//	image            vmimage: what it does, one line
//	BUILDER/state    the VM's container: one line
//	BUILDER/console  the VM's serial console since QEMU started, or its end
//
// A line is a word, a space, and text for people. Who writes there is not
// trusted: whatever lies there is bounded, cleaned, and never waited for.
package console

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/logging"
)

const (
	maxRead  = 64 << 10 // bytes of the console's end that are looked at
	maxLines = 20       // of a tail
	maxLine  = 240      // bytes of such a line
	maxNote  = 1000     // bytes of what a container says of itself
)

// A Folder is where all that lies; "" is none, of which nothing is known.
type Folder string

// Of returns what concerns one builder.
func (f Folder) Of(builder string) Console {
	if f == "" {
		return Console{}
	}
	dir := filepath.Join(string(f), builder)
	return Console{builder: builder, image: filepath.Join(string(f), "image"), state: filepath.Join(dir, "state"), console: filepath.Join(dir, "console")}
}

// A Console is what is known of one builder's VM from outside. Of the zero
// value that is nothing.
type Console struct{ builder, image, state, console string }

// Tail returns the last lines of the VM's console, safe to be shown; none if
// there are none.
func (c Console) Tail() []string {
	lines := c.lines()
	return lines[max(0, len(lines)-maxLines):]
}

// lines returns the lines at the console's end that have something in them.
func (c Console) lines() []string {
	if c.console == "" {
		return nil
	}
	text, err := read(c.console, true)
	if err != nil {
		return nil // not there yet, or not to be relied on
	}
	var lines []string
	for line := range bytes.SplitSeq(text, []byte("\n")) {
		line = bytes.TrimRight(line, "\r")
		line = line[bytes.LastIndexByte(line, '\r')+1:] // what was written over is not seen on a console either
		shown := strings.TrimSpace(logging.Clean(string(line)))
		if len(shown) > maxLine {
			shown = strings.ToValidUTF8(shown[:maxLine], "") + "…"
		}
		if shown != "" {
			lines = append(lines, shown)
		}
	}
	return lines
}

// note returns the word and the text of a file of one line.
func note(path string) (word, text string) {
	if path == "" {
		return "", ""
	}
	line, err := read(path, false)
	if err != nil {
		return "", ""
	}
	line, _, _ = bytes.Cut(line, []byte("\n"))
	shown := strings.TrimSpace(logging.Clean(string(line)))
	word, text, _ = strings.Cut(shown, " ")
	return word, text
}

// read returns the first or the last bytes of a file, without ever waiting for
// them.
func read(path string, end bool) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: it is no regular file", path)
	}
	if !end {
		return io.ReadAll(io.LimitReader(f, maxNote))
	}
	from := max(0, info.Size()-maxRead)
	text, err := io.ReadAll(io.NewSectionReader(f, from, maxRead))
	if err != nil {
		return nil, err
	}
	if from > 0 { // the line that is cut off
		_, text, _ = bytes.Cut(text, []byte("\n"))
	}
	return text, nil
}
