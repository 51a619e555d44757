package job

import "osbuilder/pipe"

// A Mark is how far a job's build.log is known to be on disk. File and Stream
// differ once output was lost with a VM, or once an attempt followed another:
// the file then has lines that say so.
type Mark struct {
	File    int64 `json:"file"`    // length of build.log, bytes
	Attempt int   `json:"attempt"` // whose output is being appended
	Stream  int64 `json:"stream"`  // offset in that attempt's output up to which it was appended
}

// A Checkpoint is what the sidecar has taken from one builder: everything
// before Position has taken effect and is on disk.
type Checkpoint struct {
	Position pipe.Position `json:"position"`
	Hello    *pipe.Hello   `json:"hello,omitempty"` // the last one before Position
	Logs     map[ID]Mark   `json:"logs,omitempty"`  // of the jobs this builder has
}
