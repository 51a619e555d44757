// Package room watches the disks that must not fill up: when one nearly has,
// no job is begun until there is room again.
//
// The disk under Docker's volumes is also the one that the VM's data disk
// grows on. When it is full, QEMU stops the VM, and everything in it stands
// still. Nobody can look at it from inside; the sidecar's own volume lies on
// it as a rule, so that is what is looked at.
package room

import (
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/disk"
	"osbuilder/pipe"
)

// every is how often the disks are looked at, at most: a look is asked for
// with each event of a build.
const every = 2 * time.Second

// A Place is a folder on a disk that must not fill up.
type Place struct {
	Path string
	Hint string // what to do when it has
}

// A Guard watches places. It is safe for concurrent use.
type Guard struct {
	Least  int64 // bytes that must be free for a job to begin; 0: none
	Places []Place
	Log    *zap.Logger
	Now    func() time.Time

	mu   sync.Mutex
	next time.Time // not looked at before
	low  string    // the place that lacks room
	why  string
}

// Lacks says what jobs wait for, with figures; "" if they need not. It says the
// same until there is room: each change would be one of every waiting job.
func (g *Guard) Lacks() string {
	if g.Least <= 0 {
		return ""
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if now := g.Now(); !now.Before(g.next) {
		g.next = now.Add(every)
		g.look()
	}
	return g.why
}

func (g *Guard) look() {
	for _, p := range g.Places {
		free, err := disk.Free(p.Path)
		if err != nil && g.low == p.Path {
			return // it had no room when it was last seen
		}
		if err != nil {
			continue // who writes there has to tell
		}
		// Once it was too little, some more is wanted: else jobs would begin
		// and stop with every file that comes and goes.
		least := g.Least
		if g.low == p.Path {
			least += least / 10
		}
		if free >= least {
			continue
		}
		if g.low == p.Path {
			return
		}
		g.low = p.Path
		g.why = fmt.Sprintf("room in %s: %s are free, and jobs begin above %s (MIN_FREE)", p.Path, pipe.Size(free), pipe.Size(g.Least))
		g.Log.Warn("no job is begun until there is room", zap.String("for", g.why), zap.String("hint", p.Hint))
		return
	}
	if g.low != "" {
		g.Log.Info("there is room again, jobs are begun", zap.String("folder", g.low))
		g.low, g.why = "", ""
	}
}
