// Package runner is the virtual machine's half of the pipe: it watches
// pipe_in, runs what is written there as jobs, and says in pipe_out what
// becomes of them. The protocol is package pipe's; what follows is how this
// side keeps its promises.
//
// # Who owns what
//
// [Runner.Run] is one goroutine that owns every job's state and pipe_out.
// The inbox (who wrote to pipe_in) and one attendant per running job (start,
// follow the output, collect the files) are goroutines of their own; they
// change nothing but by handing a function to the owner.
//
// # What is on disk
//
// A job's state is never a field that could be wrong: it is which files
// exist in its folder of the spool. Each appears whole, synced, by rename.
//
//	DATA/spool/                      root only
//	  lock                           held by the runner that lives
//	  owner                          whose VM this is
//	  generation                     of pipe_out, and the boot it began in
//	  length                         of pipe_out, at least, and when it was written to; tells what others did
//	  consumed                       what pipe_out said where blocks of it were freed
//	  repeated                       the place for which all was told again last
//	  seen                           digest of the last pipe_in that was dealt with
//	  reserve                        blocks given back when the disk is full
//	  aside/                         requests that lay in pipe_in at boot
//	  inputs/ID-ATTEMPT.part         the same, while it is copied
//	  gone/ID-ATTEMPT                tombstone: acknowledged, never to run again
//	  jobs/ID-ATTEMPT/
//	    record                       what was accepted, and in which order
//	    body                         the script
//	    inputs                       what was uploaded for it
//	    base                         how much output earlier generations told
//	    ran                          it was started, or was about to be
//	    cancel                       it is to end
//	    log                          its output
//	    result                       how its unit ended; written by the unit's stop hook
//	    outcome                      what is said in "finished", and the artifacts
//	DATA/jobs/ID-ATTEMPT/            the job's own: work, out, tmp, home, inputs, report
//	DATA/artifacts/ID-ATTEMPT/       what it made, given to root
//
// So a runner that was killed finds out: an outcome is final; a result wants
// to be collected; a unit that is alive wants to be followed; a marker "ran"
// with none of these was interrupted; without a marker the job waits. Whatever
// it finds, "cancel" makes it the end of the job, unless that had come before.
//
// # In process
//
// Tests of the other half run the real runner, without root and without
// systemd, against a temporary folder:
//
//	r := runner.New(runner.Config{
//		Pipe:  filepath.Join(dir, "nexus_bootstrap"),
//		Data:  filepath.Join(dir, "data"),
//		Units: runner.ProcessUnits{},
//	})
//	err := r.Run(ctx) // until ctx is done; nil then
//
// Once Run has returned, [ProcessUnits.KillAll] ends the jobs that are left, so
// that the folder can be removed.
//
// [Runner.Ready] is closed once hello is written and pipe_in is watched. Paths in events
// are absolute paths below dir. Run it again with the same Config, to restart
// the runner; with another Config.Boot, to reboot the VM.
package runner
