//go:build e2e && !long

package store

// everything that a disk can go through is part of make test-long. Without it
// one boot of each kind is tried.
const everything = false
