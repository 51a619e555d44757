//go:build !long

package main

import "time"

// What of TestStopped is part of make test.
const (
	everything = false
	pairs      = 60
	again      = 20
	sampling   = 2 * time.Second // of each kind that is chosen at random: where they take longer, it is fewer rounds
	atOnce     = 4               // rounds at a time: other tests run beside them
)
