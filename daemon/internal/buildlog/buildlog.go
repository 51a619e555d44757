// Package buildlog keeps a job's output in a file, gapless and each byte once,
// though the events that carry it can come twice, out of a restart, or with a
// hole where a VM died.
package buildlog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// maxLine bounds what is held of a line that doesn't end, in bytes: a longer
// one is handed out in pieces.
const maxLine = 64 << 10

// Path returns where the job's log lies below the state folder.
func Path(state string, id job.ID) string {
	return filepath.Join(state, "jobs", string(id), "build.log")
}

// A Writer appends to one job's log. It is not safe for concurrent use.
//
// The file and the job's output are counted apart: the file also has lines of
// ours, where output was lost or a new attempt began.
type Writer struct {
	file *effect.File
	mark job.Mark
	line func([]byte)

	partial []byte // what was not handed out yet of the unfinished last line
	midLine bool   // the file doesn't end with a newline
	dirty   bool   // something was appended since the last sync
}

// Open opens the log of a job and cuts it to mark: what lies beyond comes
// again. Of a mark that was lost it makes a new one. Every line is handed to line once it is complete, without its
// newline, as raw bytes that are valid during the call only. After a crash,
// lines beyond the mark are handed out a second time.
func Open(state string, id job.ID, mark job.Mark, line func([]byte)) (*Writer, error) {
	path := Path(state, id)
	if err := disk.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make folder of build log: %w", err)
	}
	file, err := effect.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open build log: %w", err)
	}
	w := &Writer{file: file, mark: mark, line: line, dirty: true}
	if mark.Whole || mark.Again {
		w.mark, err = salvage(path, mark)
	}
	if err == nil {
		err = w.cut()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cut build log to its checkpoint: %w", err), file.Close())
	}
	if err := disk.SyncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(fmt.Errorf("sync folder of build log: %w", err), file.Close())
	}
	return w, nil
}

// salvage makes a mark for a file whose own was lost.
func salvage(path string, lost job.Mark) (job.Mark, error) {
	m := job.Mark{Attempt: lost.Attempt}
	data, err := os.Open(path)
	if err != nil {
		return m, err
	}
	defer data.Close()
	if lost.Whole {
		info, err := data.Stat()
		if err != nil {
			return m, err
		}
		m.File = info.Size()
		return m, nil
	}
	// A job can write that line, too. Then output of the attempt before is cut
	// off; in its own output it comes later.
	begins := fmt.Sprintf("[osbuilder: attempt %d begins, attempt ", lost.Attempt)
	lines := bufio.NewReader(data)
	for at := int64(0); ; {
		line, err := lines.ReadSlice('\n')
		at += int64(len(line))
		switch {
		case err == nil && lost.Attempt > 1 && bytes.HasPrefix(line, []byte(begins)):
			m.File = at
			return m, nil
		case errors.Is(err, io.EOF):
			return m, nil
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return m, err
		}
	}
}

// cut makes the file as long as the mark says, and takes up its last line.
func (w *Writer) cut() error {
	info, err := w.file.Stat()
	if err != nil {
		return err
	}
	want := w.mark.File
	if info.Size() > want {
		if err := w.file.Truncate(want); err != nil {
			return err
		}
	}
	w.mark.File = min(want, info.Size())
	tail := make([]byte, min(w.mark.File, maxLine))
	if _, err := w.file.ReadAt(tail, w.mark.File-int64(len(tail))); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	w.partial = bytes.Clone(tail[bytes.LastIndexByte(tail, '\n')+1:])
	w.midLine = len(w.partial) > 0
	if info.Size() < want {
		return w.note(fmt.Sprintf("%d bytes of this file were lost", want-info.Size()))
	}
	return nil
}

// Begin marks where an attempt's output begins. For an attempt that began
// already it does nothing.
func (w *Writer) Begin(attempt int) error {
	if attempt <= w.mark.Attempt {
		return nil
	}
	if w.mark.Attempt > 0 {
		if err := w.note(fmt.Sprintf("attempt %d begins, attempt %d did not end", attempt, w.mark.Attempt)); err != nil {
			return err
		}
	}
	w.mark.Attempt, w.mark.Stream = attempt, 0
	return nil
}

// Lacks returns how many bytes of an attempt's output before offset the log
// doesn't have.
func (w *Writer) Lacks(attempt int, offset int64) int64 {
	switch {
	case attempt < w.mark.Attempt:
		return 0 // nothing of it is wanted any more
	case attempt > w.mark.Attempt:
		return offset
	}
	return max(0, offset-w.mark.Stream)
}

// Append adds what of l is not in the log yet. Where output is missing before
// l, a line says so. After an error nothing has changed, and the same call can
// be tried again.
func (w *Writer) Append(attempt int, l pipe.Log) error {
	if attempt < w.mark.Attempt {
		return nil
	}
	if err := w.Begin(attempt); err != nil {
		return err
	}
	end := l.Offset + int64(len(l.Data))
	if end <= w.mark.Stream {
		return nil
	}
	if l.Offset > w.mark.Stream {
		if err := w.lost(l.Offset); err != nil {
			return err
		}
	}
	if err := w.write(l.Data[w.mark.Stream-l.Offset:]); err != nil {
		return err
	}
	w.mark.Stream = end
	return nil
}

// Finish hands out the last line though it has no newline. length is that of
// the attempt's whole output: what is missing at its end is said in the log.
func (w *Writer) Finish(length int64) error {
	if length > w.mark.Stream {
		if err := w.lost(length); err != nil {
			return err
		}
	}
	w.flush()
	return nil
}

// lost says that the output up to offset did not arrive.
func (w *Writer) lost(offset int64) error {
	if err := w.note(fmt.Sprintf("%d bytes of output were lost with the VM", offset-w.mark.Stream)); err != nil {
		return err
	}
	w.mark.Stream = offset
	return nil
}

// note writes a line of ours, on a line of its own.
func (w *Writer) note(text string) error {
	text = "[osbuilder: " + text + "]\n"
	if w.midLine {
		text = "\n" + text
	}
	return w.write([]byte(text))
}

// write appends data and hands out the lines that it completes. It writes at
// an offset, so that a write that broke off is written over by the next.
func (w *Writer) write(data []byte) error {
	if len(data) == 0 {
		return nil
	}
	w.dirty = true
	if _, err := w.file.WriteAt(data, w.mark.File); err != nil {
		// Whoever reads the file meanwhile finds whole events.
		return errors.Join(fmt.Errorf("append to build log: %w", err), w.file.Truncate(w.mark.File))
	}
	w.mark.File += int64(len(data))
	w.midLine = data[len(data)-1] != '\n'
	for {
		i := bytes.IndexByte(data, '\n')
		if i < 0 {
			break
		}
		w.partial = append(w.partial, data[:i]...)
		w.emit()
		data = data[i+1:]
	}
	for len(w.partial)+len(data) > maxLine {
		n := maxLine - len(w.partial)
		w.partial = append(w.partial, data[:n]...)
		w.emit()
		data = data[n:]
	}
	w.partial = append(w.partial, data...)
	return nil
}

func (w *Writer) emit() {
	if w.line != nil {
		w.line(w.partial)
	}
	w.partial = w.partial[:0]
}

func (w *Writer) flush() {
	if len(w.partial) > 0 {
		w.emit()
	}
}

// Sync returns how far the log is on disk.
func (w *Writer) Sync() (job.Mark, error) {
	if w.dirty {
		if err := w.file.Sync(); err != nil {
			return job.Mark{}, fmt.Errorf("sync build log: %w", err)
		}
		w.dirty = false
	}
	return w.mark, nil
}

// Close hands out an unfinished last line and closes the file, without a sync.
func (w *Writer) Close() error {
	w.flush()
	if err := w.file.Close(); err != nil {
		return fmt.Errorf("close build log: %w", err)
	}
	return nil
}
