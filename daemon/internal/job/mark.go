package job

// A Mark is how far a job's build.log is known to be on disk. The two numbers
// differ once output was lost with a VM: the file then has a line that says
// so, and lacks what was lost.
type Mark struct {
	File   int64 `json:"file"`   // length of build.log, bytes
	Stream int64 `json:"stream"` // offset in the job's output up to which it was appended
}
