// Package model checks the protocol itself, apart from the programs that
// speak it. Its tests hold a model of the writer, the runner, the link and
// both disks, and walk every state that the model can come to: every order of
// steps, with kills of the sidecar and of the runner, power failures on either
// side and cut links between any two of them.
//
// In each state the guarantees of docs/pipe.md must hold, and from each state
// the end must come once nothing fails any more. That the model can tell is
// shown by rules left out, one at a time: each makes it fail, with the
// shortest story that leads there. The naive loop, which has none of the
// rules, is a model of its own.
//
// # What a state is
//
// What lies on each disk, what of it is synced, and what each program knows.
// A kill takes what a program knows; a power failure, and a reset of the VM,
// also take any part of what was not synced. An effect on a disk is one step,
// so that everything can happen between two of them.
//
// # What is left out
//
// Sizes, times, names, digests and Bash. Jobs have one or two lines of output.
// Events carry what the reader acts upon. Refusals for want of room, inputs,
// anonymous scripts and further owners are tested with the programs
// themselves.
package model
