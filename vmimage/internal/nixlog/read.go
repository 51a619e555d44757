package nixlog

import (
	"bufio"
	"errors"
	"io"
	"time"
)

// maxInput bounds a line that is read; a trace of thousands of frames is one
// line. What is longer is cut, and then no JSON any more.
const maxInput = 4 << 20

// Read takes all lines of r until its end, and ticks in between. It returns
// when r ends or fails; r is to be closed to end it early.
func (l *Log) Read(r io.Reader) error {
	lines := make(chan []byte)
	ended := make(chan error, 1)
	done := make(chan struct{})
	defer close(done)
	go func() {
		ended <- scan(r, func(line []byte) bool {
			select {
			case lines <- line:
				return true
			case <-done:
				return false
			}
		})
	}()
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	for {
		select {
		case line := <-lines:
			l.Line(line)
			// So much may come that the ticker never has its turn.
			l.Tick()
		case <-ticker.C:
			l.Tick()
		case err := <-ended:
			return err
		}
	}
}

// scan hands on each line of r, without its end and no longer than maxInput.
func scan(r io.Reader, take func([]byte) bool) error {
	in := bufio.NewReaderSize(r, 64<<10)
	var line []byte
	for {
		part, err := in.ReadSlice('\n')
		if room := maxInput - len(line); room > 0 {
			line = append(line, part[:min(room, len(part))]...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil && !errors.Is(err, io.EOF):
			return err
		}
		if len(line) > 0 && !take(line) {
			return nil
		}
		if err != nil {
			return nil //nolint:nilerr // the end of what there is to read
		}
		line = nil
	}
}
