// Package pipe defines version 1 of the protocol between the sidecar and the
// runner in a builder VM. Both halves import it; neither imports the other.
//
// The protocol is two files in one directory of the VM, [Dir].
//
// # pipe_in
//
// Holds one request: always a valid Bash script. Its second line may be a
// header, a comment with one JSON object (see [Header]):
//
//	#!/usr/bin/env bash
//	#pipe {"version":1,"kind":"job","owner":"…","job":"…","attempt":1,…}
//	echo the body starts here
//
// A writer makes a temporary file, unique to it, in the same directory, syncs
// it and renames it over pipe_in. The runner acts when a file is moved to that
// name, or when a writer closes it after having written; it reads only while
// no writer has the file open. So a plain `echo 'uname -a' > pipe_in` runs
// too, as an anonymous job, without a promise of atomicity.
//
// A request with a header is answered by one "accepted" or "refused" event
// that names its [Header.Key]. The writer writes the next request when the
// last one was answered; unanswered, it writes the same bytes again. A repeat
// is answered as the first was and never runs twice.
//
// # pipe_out
//
// Append-only JSON lines, one [Event] each, numbered within a generation: the
// life of one pipe_out, from one boot of the VM to the next. The first line
// of a generation is a "hello" that names it. At boot the runner renames the
// old file to pipe_out.GENERATION, keeps it until a request's "consumed"
// position lies beyond it, and repeats in the new file the state of every job
// that was not acknowledged.
//
// # Inputs and reports
//
// What a job needs besides its body is uploaded before the request, to the
// file [InputsFile] in the same directory, whole and by rename; the header
// carries its digest. The runner takes a copy of its own before it accepts
// the request, and removes the upload. The job finds it at $INPUTS.
//
// What a job writes to $REPORT, one JSON object, comes back in "finished".
//
// Sizes and offsets are bytes, digests are lower-case hexadecimal SHA-256,
// times are RFC 3339 in UTC.
package pipe

// Version is the protocol version that this package speaks.
const Version = 1

// Release is the version of the project, which both halves say of themselves.
const Release = "0.1.0"

// Where the two files lie in the VM.
const (
	Dir = "/nexus_bootstrap"
	In  = "pipe_in"
	Out = "pipe_out"
)

// Bounds, in bytes. What is larger is refused by its reader, so that a
// garbled file can't exhaust memory.
const (
	MaxRequest = 8 << 20  // a whole request; larger inputs are uploaded first
	MaxHeader  = 64 << 10 // the header's line
	MaxLine    = 1 << 20  // one event's line, newline included
	MaxLog     = 48 << 10 // data of one log event; six-fold escaping stays below MaxLine
	MaxInputs  = 4 << 30  // the inputs of one job
	MaxReport  = 64 << 10 // a job's report, as the job wrote it
)

// Names of uploads, in Dir.
const (
	InputsPrefix     = "inputs-"
	InputsTempPrefix = ".inputs-" // not whole yet
)

// InputsFile returns the name under which inputs of that digest are uploaded.
func InputsFile(sha256 string) string { return InputsPrefix + sha256 }
