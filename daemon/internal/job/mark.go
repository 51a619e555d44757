package job

import "osbuilder/pipe"

// A Mark is how far a job's build.log is known to be on disk. File and Stream
// differ once output was lost with a VM, or once an attempt followed another:
// the file then has lines that say so.
type Mark struct {
	File    int64 `json:"file"`    // length of build.log, bytes
	Attempt int   `json:"attempt"` // whose output is being appended
	Stream  int64 `json:"stream"`  // offset in that attempt's output up to which it was appended

	// Of a mark that was lost, one of the two; File and Stream are 0.
	Whole bool `json:"-"` // nothing more comes of Attempt: all that lies in the file counts
	Again bool `json:"-"` // Attempt's output comes again: what was before it counts
}

// A Checkpoint is what the sidecar has taken from one builder: everything
// before Position has taken effect and is on disk.
type Checkpoint struct {
	Position pipe.Position `json:"position"`
	Hello    *pipe.Hello   `json:"hello,omitempty"` // the last one before Position
	Logs     map[ID]Mark   `json:"logs,omitempty"`  // of the jobs this builder has
	// Repeat: a place from which on what the builder said could not be read. It
	// was not yet told again.
	Repeat *pipe.Position `json:"repeat,omitempty"`
	// Missing are jobs that run there as far as is known, that Hello does not
	// list, and that nothing was said of since. Whether they are lost shows when
	// all that the builder said is read.
	Missing []pipe.JobRef `json:"missing,omitempty"`
}
