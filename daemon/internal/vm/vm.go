// Package vm is the sidecar's side of a builder VM: it keeps one SSH
// connection to it, follows the events that the runner writes, writes
// requests, and downloads files.
//
// It knows nothing of jobs. What it reads goes to a [Sink].
package vm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"osbuilder/daemon/internal/console"
	"osbuilder/pipe"

	"go.uber.org/zap"
	"golang.org/x/crypto/ssh"
)

// Config says which VM it is and how to reach it.
type Config struct {
	Name     string // of the builder; goes to the Sink and into every log line
	Addr     string // host:port of its SSH server
	User     string
	Signer   ssh.Signer          // the only way we log in
	HostKeys ssh.HostKeyCallback // accepts the VM's pinned ed25519 key and no other
	Dir      string              // of the pipe in the VM; [pipe.Dir] when empty
	Run      string              // of the VM's notes of its boot; /run/osbuilder when empty
	Console  console.Console     // what can be seen of the VM from outside
	// Dial connects; nil is TCP. It gives up when ctx ends, after Timings.Dial at the latest.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// RekeyAfter is after how many bytes the link agrees on new keys; 0 is what
	// the SSH library takes for its cipher, a gigabyte or more.
	RekeyAfter uint64
	Timings    Timings
}

// Timings bound and pace everything that the package does. A zero field takes
// the default that stands beside it.
type Timings struct {
	Dial           time.Duration // 10 s; for TCP
	Handshake      time.Duration // 30 s; for SSH's greeting, keys and login, and again for SFTP: a VM without KVM is slow
	Call           time.Duration // 60 s; one SFTP call; a VM that is paused answers none
	Keepalive      time.Duration // 15 s; between questions whether the link lives
	KeepaliveReply time.Duration // 30 s; for the answer
	Stall          time.Duration // 60 s; a download in which no byte comes
	Busy           time.Duration // 10 ms; between reads while events come
	Idle           time.Duration // 300 ms without an event: rest until the watcher wakes us
	Poll           time.Duration // 2 s; reads at rest, in case that a wake-up was lost
	RetryMin       time.Duration // 500 ms; before the first new attempt to connect
	RetryMax       time.Duration // 15 s; the longest wait between attempts
	RetryHostKey   time.Duration // 60 s; between attempts when the host key is wrong: waiting won't mend it
	Held           time.Duration // 30 s; a link that was up so long starts over at RetryMin
	Remind         time.Duration // 1 min; until the first line about a rung that goes on failing; the next ones come ever more seldom
}

func (t Timings) withDefaults() Timings {
	for _, d := range []struct {
		field *time.Duration
		value time.Duration
	}{
		{&t.Dial, 10 * time.Second},
		{&t.Handshake, 30 * time.Second},
		{&t.Call, time.Minute},
		{&t.Keepalive, 15 * time.Second},
		{&t.KeepaliveReply, 30 * time.Second},
		{&t.Stall, time.Minute},
		{&t.Busy, 10 * time.Millisecond},
		{&t.Idle, 300 * time.Millisecond},
		{&t.Poll, 2 * time.Second},
		{&t.RetryMin, 500 * time.Millisecond},
		{&t.RetryMax, 15 * time.Second},
		{&t.RetryHostKey, time.Minute},
		{&t.Held, 30 * time.Second},
		{&t.Remind, time.Minute},
	} {
		if *d.field == 0 {
			*d.field = d.value
		}
	}
	return t
}

// A Sink takes what happens at a builder. Its methods are called one at a
// time; an error from any of them ends [Builder.Run].
type Sink interface {
	// Position returns where reading shall go on. The zero value means the
	// start of the current generation. Asked after each connect.
	Position(ctx context.Context, builder string) (pipe.Position, error)
	// Up says that the link is there: Send and Copy work, events follow.
	Up(ctx context.Context, builder string) error
	// Entries hands over events in their order. It returns when they are
	// taken; until then nothing more is read.
	Entries(ctx context.Context, builder string, entries []pipe.Entry) error
	// CaughtUp says that all is handed over that the VM had said when the link
	// came up, or when it began the generation that is read now.
	CaughtUp(ctx context.Context, builder string) error
	// Damaged says that events from place on can't be read, and why: wraps
	// ErrDamaged or ErrGone. Reading goes on behind them; only the runner, if it
	// is asked to repeat, can make good what is missing. It is called again for
	// each further place, and for the same one after a new link.
	Damaged(ctx context.Context, builder string, place pipe.Position, reason error) error
	// Down says that there is no link, and why. It is called when a link
	// died, when the first attempt to connect didn't succeed, and again each
	// time when another rung is the one that fails, so not always after Up.
	Down(ctx context.Context, builder string, reason error) error
}

// A Builder is one VM. Run keeps the link; Send, Copy and Upload may be called
// at any time from any goroutine.
type Builder struct {
	cfg  Config
	sink Sink
	log  *zap.Logger

	sending chan struct{} // holds a token while a request is on its way

	mu    sync.Mutex // guards what follows
	link  *link      // nil: down
	cause error      // why it is down

	seen seen // Run's alone
}

// New returns a Builder that does nothing before Run.
func New(cfg Config, sink Sink, log *zap.Logger) *Builder {
	if cfg.Dir == "" {
		cfg.Dir = pipe.Dir
	}
	if cfg.Run == "" {
		cfg.Run = runDir
	}
	cfg.Timings = cfg.Timings.withDefaults()
	return &Builder{
		cfg: cfg, sink: sink,
		log:     log.Named("vm").With(zap.String("builder", cfg.Name)),
		sending: make(chan struct{}, 1),
	}
}

// Name returns the builder's name.
func (b *Builder) Name() string { return b.cfg.Name }

// sinkError marks an error that the Sink returned, which ends Run.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

// Run connects, follows the events, and connects again, until ctx ends, which
// is no error, or the Sink returns one.
func (b *Builder) Run(ctx context.Context) error {
	pace := newPacer(b.cfg.Timings)
	trouble := reporter{log: b.log, builder: b.cfg.Name, first: b.cfg.Timings.Remind, console: b.cfg.Console}
	for {
		held, err := b.session(ctx, &trouble)
		var fatal *sinkError
		if !errors.As(err, &fatal) && ctx.Err() == nil && trouble.failed(err, held > 0, time.Now()) {
			if err := b.sink.Down(ctx, b.cfg.Name, err); err != nil {
				fatal = &sinkError{fmt.Errorf("down: %w", err)}
			}
		}
		if fatal != nil && (ctx.Err() == nil || !errors.Is(fatal, ctx.Err())) {
			return fmt.Errorf("follow builder %s: %w", b.cfg.Name, fatal.err)
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // to be stopped is no error, whatever it was that stopping broke on the link
		}
		timer := time.NewTimer(pace.after(held, err))
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// session climbs the ladder and follows the events until the link dies. It
// returns how long the link was up, 0 if it never was, and why it isn't any
// more. Every goroutine of the link has ended when it returns.
func (b *Builder) session(ctx context.Context, trouble *reporter) (time.Duration, error) {
	l, err := dial(ctx, b.cfg)
	if err != nil {
		err = outside(b.cfg.Console, err)
		b.down(err)
		return 0, err
	}
	defer l.shut()
	f := follower{
		link: l, sink: b.sink, builder: b.cfg.Name, dir: b.cfg.Dir, t: b.cfg.Timings,
		log: b.log, noted: map[string]bool{}, seen: &b.seen,
	}
	var current *generation
	if err = dataDisk(ctx, l, b.cfg.Run); err == nil {
		current, err = f.open(ctx)
	}
	if err != nil {
		if errors.Is(err, ErrDown) {
			err = &RungError{RungSSH, err} // it broke before it was of use
		}
		b.down(err)
		return 0, err
	}
	b.clean(ctx, l)
	position, err := b.sink.Position(ctx, b.cfg.Name)
	if err != nil {
		return 0, &sinkError{fmt.Errorf("position: %w", err)}
	}
	since := time.Now()
	b.up(l)
	trouble.up(current, position)
	if err := b.sink.Up(ctx, b.cfg.Name); err != nil {
		b.down(err)
		return 0, &sinkError{fmt.Errorf("up: %w", err)}
	}
	w := watch(ctx, l, b.cfg.Dir, b.log)
	err = f.run(ctx, current, position, w)
	w.stop(l)
	l.close(err)
	cause := l.reason()
	if why := stopped(b.cfg.Console); why != nil && errors.Is(err, ErrDown) {
		err = seenOutside(why, err)
		cause = err
	}
	b.down(cause)
	return max(time.Since(since), 1), err
}

func (b *Builder) up(l *link) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.link, b.cause = l, nil
}

func (b *Builder) down(cause error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.link, b.cause = nil, cause
}

// connected returns the link, or an error that says why there is none.
func (b *Builder) connected() (*link, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.link == nil {
		if b.cause == nil {
			return nil, ErrDown
		}
		return nil, fmt.Errorf("%w: %w", ErrDown, b.cause)
	}
	return b.link, nil
}
