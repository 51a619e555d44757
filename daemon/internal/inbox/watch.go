package inbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/zap"

	"osbuilder/daemon/internal/hint"
)

// A watcher wakes the inbox when something happens in the folder. What it
// says are hints: without any the rescan remains.
type watcher struct {
	changes *fsnotify.Watcher // nil: deaf
	wholes  *wholes           // nil: deaf
	broken  error             // why it is deaf
	watched os.FileInfo       // the folder as it was when the watch began
	log     *zap.Logger
}

func (b *Inbox) newWatcher() *watcher {
	w := &watcher{log: b.log}
	if b.deaf {
		return w
	}
	changes, err := fsnotify.NewWatcher()
	if err == nil {
		if w.wholes, err = newWholes(b.log); err != nil {
			_ = changes.Close() // nothing is watched yet
		}
	}
	if err != nil {
		w.broken = hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify instances: sysctl fs.inotify.max_user_instances")
		return w
	}
	w.changes = changes
	return w
}

// read hands out notes until the watcher is closed.
func (w *watcher) read() {
	if w.wholes != nil {
		w.wholes.read()
	}
}

func (w *watcher) close() {
	if w.changes != nil {
		_ = w.changes.Close() // there is nothing that it could still lose
		w.wholes.close()
	}
}

// events, errors and notes are channels to be woken by; of a deaf one, such as
// nothing comes from.
func (w *watcher) events() <-chan fsnotify.Event {
	if w.changes == nil {
		return nil
	}
	return w.changes.Events
}

func (w *watcher) errors() <-chan error {
	if w.changes == nil {
		return nil
	}
	return w.changes.Errors
}

func (w *watcher) notes() <-chan note {
	if w.wholes == nil {
		return nil
	}
	return w.wholes.notes
}

// change takes from an event whether the folder itself went away.
func (w *watcher) change(e fsnotify.Event, dir string) {
	if e.Name == dir && e.Has(fsnotify.Remove|fsnotify.Rename) {
		w.watched = nil
	}
}

// lost is told of events that did not come. A look at everything makes good
// for it, and one follows.
func (w *watcher) lost(err error) { w.log.Debug("events were lost", zap.Error(err)) }

// note takes what concerns files that are whole.
func (w *watcher) note(n note) {
	if w.wholes.note(n) {
		w.watched = nil
	}
}

// takeWhole returns the names of files that were moved in since it was last
// asked.
func (w *watcher) takeWhole() map[string]bool {
	if w.wholes == nil {
		return nil
	}
	return w.wholes.take()
}

// gather takes events for a while. It reports whether ctx still lasts.
func (w *watcher) gather(ctx context.Context, dir string, d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case e := <-w.events():
			w.change(e, dir)
		case err := <-w.errors():
			w.lost(err)
		case n := <-w.notes():
			w.note(n)
		}
	}
}

// watch sees to it that the folder that is at dir now is watched: it may have
// been removed, or another put in its place.
func (w *watcher) watch(dir string) error {
	if w.changes == nil {
		return w.broken
	}
	now, err := os.Stat(dir)
	if err != nil {
		w.watched = nil
		return err
	}
	if w.watched != nil && os.SameFile(w.watched, now) {
		return nil
	}
	w.watched = nil
	_ = w.changes.Remove(dir) // the folder that was there; as a rule its watch ended by itself
	if err := errors.Join(w.changes.Add(dir), w.wholes.watch(dir)); err != nil {
		return hint.With(fmt.Errorf("watch jobs folder: %w", err),
			"The host may be out of inotify watches: sysctl fs.inotify.max_user_watches")
	}
	w.watched = now
	return nil
}
