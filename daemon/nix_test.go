package main

import (
	"testing"
	"time"

	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe/runner"
)

// The VM's Nix breaks while the sidecar and the runner live: the next job waits
// for it, says why, and is built when it works again. What ran goes on.
func TestNixBreaksAndIsMended(t *testing.T) {
	s := newSidecar(t)
	nix := vmtest.NewNix(t)
	s.run.Stop()
	s.run = vmtest.NewRunner(t, s.vm, func(c *runner.Config) {
		c.NixSocket, c.NixEvery = nix.Socket, 20*time.Millisecond
	})
	stop := s.start()
	defer stop()
	s.drop("before.sh", "echo image >\"$OUT/before.iso\"\n")
	if status, _, _ := s.outcome("before"); status != "succeeded" {
		t.Fatalf("status %s", status)
	}
	hellos := func() int { return s.logs.FilterMessage("builder says hello").Len() }
	before := hellos()
	nix.Stop()
	s.until("word of it", func() bool { return hellos() > before })
	s.drop("after.sh", "echo image >\"$OUT/after.iso\"\n")
	s.untilWaits("after", "vm builds nothing: Nix is broken: nobody listens for it: ")
	nix.Start()
	if status, log, _ := s.outcome("after"); status != "succeeded" {
		t.Errorf("status %s, log %s", status, log)
	}
}
