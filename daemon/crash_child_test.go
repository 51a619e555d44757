package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/logging"
	"osbuilder/daemon/internal/vm"
	"osbuilder/pipe/effect"
	"osbuilder/pipe/runner"
)

// asMortal makes the test's own binary one of the two halves, as a process
// that stops itself with SIGKILL before the effect whose number it is told.
const asMortal = "be-mortal"

// A mortal is what such a process is told.
type mortal struct {
	Role   string // sidecar or runner
	StopAt int64  // counted from 1; 0: never
	Dir    string // of the round
	Pipe   string
	Boot   string
	Addr   string
	Host   string // the server's public key
	Key    []byte
}

func (m mortal) path(name string) string { return filepath.Join(m.Dir, name) }

// run is the process.
func (m mortal) run() (err error) {
	trace, err := os.OpenFile(m.path(m.Role+".trace"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	var effects atomic.Int64
	effect.Hook(func(op, object string) {
		n := effects.Add(1)
		fmt.Fprintf(trace, "%d %s %s\n", n, op, object)
		if n == m.StopAt {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // nothing follows
		}
	})
	ctx, cancel := untilSignal(context.Background()) //nolint:forbidigo // this is a program of its own
	defer cancel()
	if m.Role == "runner" {
		return m.runner(ctx)
	}
	return m.sidecar(ctx)
}

func (m mortal) runner(ctx context.Context) error {
	r := runner.New(runner.Config{
		Pipe: m.Pipe, Data: m.path("data"), Units: runner.ProcessUnits{}, Store: m.path("no-store"), GCRoots: m.path("no-roots"),
		Image: "crash-1", Version: "crash", Boot: m.Boot, Log: os.Stderr, Path: m.path("bin") + ":/usr/local/bin:/usr/bin:/bin",
	})
	go func() {
		select {
		case <-r.Ready():
			fmt.Fprintln(os.Stdout, "ready")
		case <-ctx.Done():
		}
	}()
	return r.Run(ctx)
}

func (m mortal) sidecar(ctx context.Context) (err error) {
	signer, err := ssh.ParsePrivateKey(m.Key)
	if err != nil {
		return err
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey([]byte(m.Host))
	if err != nil {
		return err
	}
	answerTimeout, syncEvery, retryAfter, consumeEvery = 2*time.Second, 50*time.Millisecond, 20*time.Millisecond, 4<<10
	cfg := config.Config{
		Settle: 5 * time.Millisecond, Rescan: 100 * time.Millisecond, JobTimeout: 10 * time.Minute,
		Paths: config.Paths{
			Jobs: m.path("jobs"), Output: m.path("output"), State: m.path("state"), Health: m.path("health"), Control: m.path("control"),
		},
	}
	cfg.Format, cfg.System, cfg.Nixpkgs = "iso", "x86_64-linux", "nixos-26.05"
	link := vm.Config{
		Name: "vm", Addr: m.Addr, User: "builder", Signer: signer, HostKeys: ssh.FixedHostKey(host), Dir: m.Pipe,
		Timings: vm.Timings{
			RetryMin: 5 * time.Millisecond, RetryMax: 20 * time.Millisecond, Idle: time.Millisecond, Poll: 10 * time.Millisecond, Busy: time.Millisecond,
		},
	}
	log, output, err := logging.New(logging.Options{Format: logging.Console, Level: "debug"}, os.Stderr)
	if err != nil {
		return err
	}
	written, stopWriting := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- output.Run(written) }()
	defer func() {
		stopWriting()
		err = errors.Join(err, <-ended)
	}()
	return serve(ctx, cfg, []vm.Config{link}, log)
}

// beMortal runs the process that standard input tells it to be.
func beMortal() int {
	var m mortal
	if err := json.NewDecoder(bufio.NewReader(os.Stdin)).Decode(&m); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return explain(os.Stderr, m.run())
}
