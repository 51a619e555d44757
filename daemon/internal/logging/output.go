package logging

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	// maxQueued bounds the bytes that wait for standard output.
	maxQueued = 4 << 20
	// flushTime is how long Run waits at its end for a reader that stalls. It
	// must fit into the container's grace period together with all the rest.
	flushTime = 3 * time.Second
)

// An Output takes lines at any time, at once, and writes them in order from
// one goroutine. While its reader stalls and its queue is full, it drops lines
// and says later how many.
type Output struct {
	w      io.Writer
	notice func(dropped int) []byte
	wake   chan struct{} // holds one token when there may be something to write

	mu      sync.Mutex // guards what follows
	queue   []byte     // whole lines
	dropped int        // since the last line that was taken
}

func newOutput(w io.Writer) *Output {
	return &Output{w: w, wake: make(chan struct{}, 1)}
}

// Write takes one or more whole lines. It never blocks on the reader and never
// fails.
func (o *Output) Write(lines []byte) (int, error) {
	o.mu.Lock()
	if len(o.queue)+len(lines) > maxQueued {
		o.dropped++
	} else {
		o.tell()
		o.queue = append(o.queue, lines...)
	}
	o.mu.Unlock()
	select {
	case o.wake <- struct{}{}:
	default:
	}
	return len(lines), nil
}

// tell puts the count of dropped lines in their place in the order. The caller
// holds mu.
func (o *Output) tell() {
	if o.dropped > 0 {
		o.queue = append(o.queue, o.notice(o.dropped)...)
		o.dropped = 0
	}
}

// Sync does nothing: Run flushes when it ends.
func (o *Output) Sync() error { return nil }

// Run writes lines until ctx is over, then what is still queued, and returns.
// It should be the last part to stop. If the reader stalls at the end, Run
// waits for a bounded time and gives the rest up; that write is then stuck
// until the process ends.
func (o *Output) Run(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- o.write(ctx.Done()) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	timer := time.NewTimer(flushTime)
	defer timer.Stop()
	select {
	case err := <-done:
		return err
	case <-timer.C:
		return fmt.Errorf("write log: its reader has not taken anything for %v", flushTime)
	}
}

// write returns when stop is closed and the queue is empty.
func (o *Output) write(stop <-chan struct{}) error {
	var batch []byte
	for {
		stopped := false
		select {
		case <-o.wake:
		case <-stop:
			stopped = true
		}
		for {
			o.mu.Lock()
			if len(o.queue) == 0 {
				o.tell()
			}
			batch, o.queue = o.queue, batch[:0]
			o.mu.Unlock()
			if len(batch) == 0 {
				break
			}
			if _, err := o.w.Write(batch); err != nil {
				return fmt.Errorf("write log: %w", err)
			}
		}
		if stopped {
			return nil
		}
	}
}
