// Osbuilder takes jobs from a folder, has builder VMs run them, and puts the
// images that come out into another folder.
package main

import (
	"context"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	os.Exit(start(os.Args[1:], os.Stdout, os.Stderr))
}

// start runs the program and returns its exit code.
func start(args []string, stdout, stderr io.Writer) int {
	ctx, cancel := untilSignal(context.Background())
	defer cancel()
	return explain(stderr, command(args, stdout, stderr).ExecuteContext(ctx))
}

// untilSignal returns a context that the first SIGTERM or SIGINT ends, so that
// the program stops in order. The second one ends the program at once.
func untilSignal(parent context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2) // none is lost while the other is seen to
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	go func() {
		<-signals
		cancel()
		<-signals
		os.Exit(exitAtOnce)
	}()
	return ctx, cancel
}
