package runner

import "context"

// A Runner is one life of the VM's half.
type Runner struct{ cfg Config }

// New returns a runner that has not started.
func New(cfg Config) *Runner { return &Runner{cfg: cfg} }

// Run makes the layout and waits for the end.
func (r *Runner) Run(ctx context.Context) error {
	cfg, err := r.cfg.withDefaults()
	if err != nil {
		return err
	}
	user, err := lookup(cfg.PipeUser)
	if err != nil {
		return err
	}
	if err := cfg.makeData(user); err != nil {
		return err
	}
	if err := cfg.makePipe(user); err != nil {
		return err
	}
	<-ctx.Done()
	return nil
}
