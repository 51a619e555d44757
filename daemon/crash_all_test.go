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
)
