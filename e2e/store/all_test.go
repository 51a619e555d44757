//go:build e2e && long

package store

const everything = true
