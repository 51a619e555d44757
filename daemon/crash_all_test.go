//go:build long

package main

import (
	"math"
	"time"
)

// All of TestStopped.
const (
	everything = true
	pairs      = math.MaxInt
	again      = 500
	sampling   = 100 * time.Hour
	atOnce     = 12 // rounds at a time: they wait more than they work
)
