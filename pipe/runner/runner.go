package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"osbuilder/pipe"
)

// A Runner is one life of the VM's half.
type Runner struct {
	cfg   Config
	ready chan struct{}
	calls chan call
	logMu sync.Mutex // guards cfg.Log
	work  sync.WaitGroup
	trash chan struct{} // asks the janitor

	// What follows is the goroutine's in loop.
	user    account // who writes requests
	spool   *spool
	out     *out
	owner   string
	unfit   string // pipe.Hello.Unfit
	jobs    map[pipe.JobRef]*job
	order   uint64                 // of the last that was accepted
	slots   map[int]*job           // busy ones
	taking  map[pipe.JobRef]record // whose inputs are being copied
	replays bool                   // a goroutine repeats an ended job's output
	retry   <-chan time.Time       // set while something that failed waits
}

// A call is a function for the owner of the state.
type call struct {
	do   func() error
	done chan error
}

// New returns a runner that has not started.
func New(cfg Config) *Runner {
	return &Runner{
		cfg:    cfg,
		ready:  make(chan struct{}),
		calls:  make(chan call),
		trash:  make(chan struct{}, 1),
		jobs:   map[pipe.JobRef]*job{},
		slots:  map[int]*job{},
		taking: map[pipe.JobRef]record{},
	}
}

// Ready is closed once hello is written and every write to pipe_in is noticed.
func (r *Runner) Ready() <-chan struct{} { return r.ready }

// letters is how many requests may wait to be dealt with: more than anybody
// writes in the time that one takes, few enough to bound the memory.
const letters = 64

// retryAfter is when what failed is tried again.
const retryAfter = time.Second

// Run works until ctx is done, and then returns nil. The jobs go on; the next
// runner takes them up. A Runner runs once.
func (r *Runner) Run(ctx context.Context) error {
	cfg, err := r.cfg.withDefaults()
	if err != nil {
		return err
	}
	r.cfg = cfg
	if r.user, err = lookup(cfg.PipeUser); err != nil {
		return err
	}
	for slot := 1; slot <= cfg.Slots; slot++ {
		if _, err := cfg.slotUser(slot); err != nil {
			return err
		}
	}
	if err := cfg.makeData(r.user); err != nil {
		return err
	}
	if err := cfg.makePipe(r.user); err != nil {
		return err
	}
	d := disk{fault: cfg.fault}
	room := &reserve{path: cfg.spool() + "/reserve"}
	r.spool = &spool{cfg: cfg, disk: d, room: room}
	if err := r.spool.open(); err != nil {
		return err
	}
	defer r.spool.close()
	r.out = &out{cfg: cfg, disk: d, room: room, user: r.user}
	defer r.out.close()

	ctx, cancel := context.WithCancel(ctx)
	defer r.work.Wait() // before the lock is given back
	defer cancel()
	if err := r.start(ctx); err != nil {
		return err
	}
	r.loop(ctx)
	return nil
}

// start takes up what the last runner left.
func (r *Runner) start(ctx context.Context) error {
	if r.unfit = r.lookAtNix(ctx, cmp.Or(r.cfg.nixFirst, nixFirst)); r.unfit != "" {
		r.logf("%s", r.unfit)
	}
	jobs, err := r.spool.load(r.logf)
	if err != nil {
		return err
	}
	for _, j := range jobs {
		r.jobs[j.ref()] = j
		r.order = max(r.order, j.Order)
	}
	if r.owner, err = r.spool.owner(); err != nil {
		return err
	}
	if err := r.out.tidy(); err != nil {
		return err
	}
	m := r.spool.mark()
	h, err := readOut(r.cfg.pipeOut(), m)
	if err != nil {
		r.logf("a new pipe_out is begun: %v", err)
		h = history{damage: err}
	}
	resumed, lost, err := r.out.resume(h, m)
	if err != nil {
		return err
	}
	if resumed {
		for _, j := range jobs {
			j.told = h.jobs[j.ref()]
			j.told.log = max(j.told.log, j.base)
		}
		if err := r.say(pipe.Event{Type: pipe.TypeHello, Hello: r.hello()}, true); err != nil {
			return err
		}
		r.logf("runner %s goes on in generation %s with %d jobs", r.cfg.Version, r.out.gen, len(jobs))
	} else {
		if lost != nil {
			r.logf("%v: a new generation begins, in which all is told again", lost)
		}
		if err := r.renew(h, lost != nil); err != nil {
			return err
		}
	}
	r.cleanUploads(!resumed)
	r.work.Go(func() { r.janitor(ctx) })
	unfit := r.unfit
	r.work.Go(func() { r.watchNix(ctx, unfit) })
	r.sweep()
	r.takeUp(ctx)
	return nil
}

// lookEvery is how often an idle runner looks whether pipe_out is still its
// own.
const lookEvery = 10 * time.Second

// cleanEvery is how often a runner that lives long looks for old uploads.
const cleanEvery = time.Hour

// loop owns all state until ctx is done.
func (r *Runner) loop(ctx context.Context) {
	post := make(chan letter, letters)
	box := &inbox{
		cfg:    r.cfg,
		layout: func() error { return r.cfg.makePipe(r.user) },
		lost:   func(ctx context.Context) error { return r.call(ctx, func() error { return r.mend(ctx) }) },
		ready:  sync.OnceFunc(func() { close(r.ready) }),
		out:    post,
		logf:   r.logf,
	}
	r.work.Go(func() { box.run(ctx) })
	// Whoever reads a pipe_out that was cut or replaced never gets to write
	// the request whose answer would show it.
	look := time.NewTicker(cmp.Or(r.cfg.look, lookEvery))
	defer look.Stop()
	clean := time.NewTicker(cmp.Or(r.cfg.clean, cleanEvery))
	defer clean.Stop()
	said := ""
	for {
		select {
		case <-look.C:
			err := r.mend(ctx)
			if err != nil && err.Error() != said { // once
				r.logf("%v", err)
			}
			said = fmt.Sprint(err)
		case <-clean.C:
			r.cleanUploads(false)
		case <-ctx.Done():
			r.logf("the runner stops; %d running jobs go on", len(r.slots))
			return
		case c := <-r.calls:
			c.done <- c.do()
		case l := <-post:
			r.receive(ctx, l)
		case <-r.retry:
			r.retry = nil
			r.again(ctx)
		}
	}
}

// call has the owner do something, and returns its error, or ctx's.
func (r *Runner) call(ctx context.Context, do func() error) error {
	c := call{do: do, done: make(chan error, 1)}
	select {
	case r.calls <- c:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	select {
	case err := <-c.done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// logf writes one fact.
func (r *Runner) logf(format string, args ...any) {
	r.logMu.Lock()
	defer r.logMu.Unlock()
	fmt.Fprintf(r.cfg.Log, format+"\n", args...)
}

// janitor removes what was forgotten, which may take long.
func (r *Runner) janitor(ctx context.Context) {
	for {
		if err := r.spool.emptyTrash(); err != nil {
			r.logf("%v", err)
		}
		select {
		case <-r.trash:
		case <-ctx.Done():
			return
		}
	}
}

// sweep wakes the janitor.
func (r *Runner) sweep() {
	select {
	case r.trash <- struct{}{}:
	default:
	}
}

// again tries what failed before.
func (r *Runner) again(ctx context.Context) {
	if r.spool.room.spent {
		if err := r.spool.room.fill(); err != nil || r.spool.room.spent {
			r.later()
		}
	}
	if err := r.mend(ctx); err != nil {
		r.logf("%v", err)
		r.later()
		return
	}
	r.takeUp(ctx)
}

// later has again called soon.
func (r *Runner) later() {
	if r.retry == nil {
		r.retry = time.After(retryAfter)
	}
}

// say appends an event; with sync it lasts.
func (r *Runner) say(e pipe.Event, sync bool) error {
	write := func() error { return r.out.append(e) }
	if e.Type != pipe.TypeLog && e.Type != pipe.TypeProgress {
		// Output alone must not use up the reserve.
		write = func() error { return r.spool.room.use(func() error { return r.out.append(e) }) }
	}
	err := write()
	if r.spool.room.spent {
		r.later()
	}
	if err != nil {
		r.later()
		return err
	}
	if sync {
		return r.out.sync()
	}
	return nil
}

// hello describes the VM.
func (r *Runner) hello() *pipe.Hello {
	free, err := freeBytes(r.cfg.Data)
	if err != nil {
		r.logf("%v", err)
	}
	h := &pipe.Hello{
		Generation: r.out.gen,
		Protocol:   pipe.Version,
		Runner:     r.cfg.Version,
		Image:      r.cfg.Image,
		Owner:      r.owner,
		Slots:      r.cfg.Slots,
		Systems:    r.systems(),
		Free:       free,
		Unfit:      r.unfit,
	}
	for _, j := range r.inOrder() {
		h.Jobs = append(h.Jobs, j.ref())
	}
	return h
}

// mend begins a generation if pipe_out was lost.
func (r *Runner) mend(ctx context.Context) error {
	err := r.out.intact()
	if !errors.Is(err, errPipeLost) {
		return err
	}
	if err := r.cfg.makePipe(r.user); err != nil {
		return err
	}
	r.logf("%v: a new generation begins, in which all is told again", err)
	h, err := readOut(r.cfg.pipeOut(), r.spool.mark())
	if err != nil {
		r.logf("%v", err)
		h = history{}
	}
	if err := r.renew(h, true); err != nil {
		return err
	}
	r.takeUp(ctx)
	return nil
}

// renew begins a generation after the file whose history is h, and repeats
// in it the state of every job. Output goes on where h leaves off, since what
// was told is in the files of the generations before; with again, which is
// for files that are not to be relied on, it is told from its beginning.
func (r *Runner) renew(h history, again bool) error {
	for _, j := range r.jobs {
		base := max(j.base, h.jobs[j.ref()].log)
		if again {
			base = 0
		}
		// Before the file: a runner that dies in between tells too much in the
		// one that is there, never too little in the next.
		if base != j.base {
			if err := r.spool.setBase(j.ref(), base); err != nil {
				return err
			}
			j.base = base
		}
		j.told = told{log: base}
	}
	if err := r.out.begin(h, *r.hello()); err != nil {
		return err
	}
	r.logf("runner %s begins generation %s with %d jobs", r.cfg.Version, r.out.gen, len(r.jobs))
	for _, j := range r.inOrder() {
		if err := r.tell(j); err != nil {
			return err
		}
	}
	return nil
}
