package inbox

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"

	"osbuilder/daemon/internal/hint"
)

// A watcher wakes the inbox when something happens in the folder. Its events
// are hints: what they say is not used, and without any the rescan remains.
type watcher struct {
	fs      *fsnotify.Watcher // nil: deaf
	broken  error             // why it is deaf
	dir     string
	watched os.FileInfo // the folder as it was when the watch began; nil: none
	log     *zap.Logger
}

func (b *Inbox) newWatcher() *watcher {
	if b.deaf {
		return &watcher{log: b.log}
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return &watcher{log: b.log, broken: hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify instances: sysctl fs.inotify.max_user_instances")}
	}
	return &watcher{fs: w, log: b.log}
}

func (w *watcher) events() <-chan fsnotify.Event {
	if w.fs == nil {
		return nil
	}
	return w.fs.Events
}

func (w *watcher) errors() <-chan error {
	if w.fs == nil {
		return nil
	}
	return w.fs.Errors
}

func (w *watcher) close() {
	if w.fs != nil {
		_ = w.fs.Close() // there is nothing that it could still lose
	}
}

// note takes from an event whether the folder itself went away.
func (w *watcher) note(e fsnotify.Event) {
	if e.Name == w.dir && (e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename)) {
		w.watched = nil
	}
}

// lost tells of a fault of the watch: of an overflow, as a rule. A look at
// everything makes good for it, and one follows.
func (w *watcher) lost(err error) {
	w.log.Debug("events were lost", zap.Error(err))
}

// gather takes events for a while. It reports whether ctx still lasts.
func (w *watcher) gather(ctx context.Context, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case e := <-w.events():
			w.note(e)
		case err := <-w.errors():
			w.lost(err)
		}
	}
}

// watch sees to it that the folder that is at dir now is watched: it may have
// been removed, or another put in its place.
func (w *watcher) watch(dir string) error {
	if w.fs == nil {
		return w.broken
	}
	w.dir = dir
	now, err := os.Stat(dir)
	if err != nil {
		w.watched = nil
		return err
	}
	if w.watched != nil && os.SameFile(w.watched, now) {
		return nil
	}
	_ = w.fs.Remove(dir) // of the folder that was there; as a rule it ended by itself
	w.watched = nil
	if err := w.fs.Add(dir); err != nil {
		return hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify watches: sysctl fs.inotify.max_user_watches")
	}
	w.watched = now
	return nil
}
