package vmtest

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"osbuilder/pipe/runner" //nolint:depguard // the VM of these tests is the other half itself
)

// A Runner is the real runner, over a server's directory. Jobs run as plain
// processes of the test's user; bash and util-linux must be there.
type Runner struct {
	t    testing.TB
	cfg  runner.Config
	stop func()
}

// NewRunner starts a runner on s and returns when it says hello. change, if
// not nil, alters its configuration.
func NewRunner(t testing.TB, s *Server, change func(*runner.Config)) *Runner {
	t.Helper()
	data := filepath.Join(t.TempDir(), "data")
	r := &Runner{t: t, cfg: runner.Config{
		Pipe: s.Dir(), Data: data, Units: runner.ProcessUnits{},
		Store: filepath.Join(data, "no-store"), GCRoots: filepath.Join(data, "no-roots"),
		Image: "vmtest-1", Version: "vmtest", Boot: "boot", Log: t.Output(),
	}}
	if change != nil {
		change(&r.cfg)
	}
	r.Start()
	return r
}

// Start starts the runner, after Stop.
func (r *Runner) Start() {
	r.t.Helper()
	run := runner.New(r.cfg)
	// Not the test's own context: it ends before Cleanup, and the end has its order.
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- run.Run(ctx) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				r.t.Errorf("runner: %v", err)
			}
		case <-time.After(patience):
			r.t.Error("the runner doesn't end")
		}
	})
	r.t.Cleanup(r.stop)
	select {
	case <-run.Ready():
	case <-time.After(patience):
		r.t.Fatal("the runner isn't ready")
	}
}

// Stop ends the runner. As in the VM, its jobs go on.
func (r *Runner) Stop() { r.stop() }

// Reboot ends the runner and starts one that believes the VM was booted anew:
// another generation begins. Jobs that run are not killed; cut the server's
// connections too for the whole picture.
func (r *Runner) Reboot() {
	r.t.Helper()
	r.Stop()
	r.cfg.Boot += "+"
	r.Start()
}

// Data returns the runner's folder on the data disk.
func (r *Runner) Data() string { return r.cfg.Data }

// Remove removes all that the runner knows, as a new data disk would.
func (r *Runner) Remove() {
	r.t.Helper()
	for _, dir := range []string{r.cfg.Data, r.cfg.Pipe} {
		if err := os.RemoveAll(dir); err != nil {
			r.t.Fatal(err)
		}
	}
}
