package vm

import (
	"bytes"
	"testing"

	"go.uber.org/zap"
)

// FuzzListen: whatever the watcher in the VM says, it wakes us at most, and
// its end is noticed.
func FuzzListen(f *testing.F) {
	f.Add([]byte("Setting up watches.\nWatches established.\nx\n"))
	f.Add([]byte("inotifywait: command not found\nx\n"))
	f.Add([]byte("\x00\xff\r\n\n"))
	f.Add(bytes.Repeat([]byte("x"), 70_000))
	f.Fuzz(func(t *testing.T, said []byte) {
		w := &watcher{wake: make(chan struct{}, 1), log: zap.NewNop(), ended: make(chan struct{})}
		w.listen(bytes.NewReader(said))
		<-w.ended
		if !w.broken.Load() || w.arm() {
			t.Error("it counts as one that will wake us")
		}
	})
}
