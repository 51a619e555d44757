package dispatch

import (
	"context"
	"errors"
	"io"
	"time"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// What Config.Publish wraps where the fault lies in the VM. Every other error
// is taken for one of the link or of the disk here, and tried again for ever.
var (
	// ErrGone: an artifact is not there any more. Trying again can't help.
	ErrGone = errors.New("artifact is gone")
	// ErrDamaged: an artifact came, but not as it was announced.
	ErrDamaged = errors.New("artifact is not as announced")
)

// ErrSource is what Config.Inputs wraps where a job's source is not what it
// was when the job was recorded. Trying again can't help.
var ErrSource = errors.New("the job's source is damaged")

// A Store keeps the records. Update is a compare-and-set on Job.Revision.
type Store interface {
	Get(ctx context.Context, id job.ID) (job.Job, error)
	Update(ctx context.Context, j job.Job) (job.Job, error)
	Checkpoint(ctx context.Context, builder string) (job.Checkpoint, error)
	SaveCheckpoint(ctx context.Context, builder string, c job.Checkpoint) error
}

// A Builder is one VM. All methods end with an error when the link to it
// dies under them.
type Builder interface {
	Name() string
	// Send puts a request into pipe_in.
	Send(ctx context.Context, request []byte) error
	// Upload puts a job's inputs, which write writes, into the VM. With fresh
	// what is there of them is not to be trusted.
	Upload(ctx context.Context, sha256 string, size int64, fresh bool, write func(io.Writer) error) error
	// Copy writes a file of the VM, from offset to its end, to w.
	Copy(ctx context.Context, path string, offset int64, w io.Writer) (int64, error)
}

// A Log is a job's build.log, open for appending.
type Log interface {
	// Begin marks where an attempt's output begins. Repeated, it does nothing.
	Begin(attempt int) error
	// Lacks returns how much of an attempt's output before offset it doesn't have.
	Lacks(attempt int, offset int64) int64
	// Append adds what the log doesn't have yet.
	Append(attempt int, l pipe.Log) error
	// Finish hands out an unfinished last line. length is that of the
	// attempt's whole output; the log says what of it is missing.
	Finish(length int64) error
	// Sync returns how far the log is on disk.
	Sync() (job.Mark, error)
	Close() error
}

// An Outcome is what output/ says of a job.
type Outcome struct {
	Result  pipe.Finished
	Attempt int
	Builder string
}

// Config is what a Dispatcher needs.
type Config struct {
	Owner    string // this sidecar's lasting id
	TakeOver bool   // take over a VM that another sidecar owns

	Store Store
	// Damaged is what Store.Checkpoint wraps where it can't make sense of what it
	// read. The VM then tells everything again.
	Damaged error
	// Gone is what the reason of Damaged wraps where events are not there any
	// more that were not read.
	Gone error
	// Body makes the Bash body of a job's request.
	Body func(job.Job) ([]byte, error)
	// Inputs writes what a job has besides its body, the same bytes each time;
	// job.Job.Inputs describes them.
	Inputs func(j job.Job, w io.Writer) error
	// OpenLog opens a job's build.log, cut to mark, or to what a mark that was
	// lost leaves of it.
	OpenLog func(job.Job, job.Mark) (Log, error)
	// Publish puts the outcome of a job into output/ and returns its folder
	// there. Repeated after success, it changes nothing.
	Publish func(ctx context.Context, j job.Job, from Builder) (folder string, err error)

	// Room says what is to wait for because a disk is nearly full, in words; ""
	// where there is room. Nil: there always is.
	Room func() string
	// NotFound is what the store's errors wrap where there is no such record.
	NotFound error
	// Published returns the outcome of a job that lies in output/, if it does.
	Published func(job.Job) (o Outcome, ok bool, err error)
	// Begun reports whether a job was ever given to a builder, as far as can be
	// told without its record.
	Begun func(job.Job) bool

	Log *zap.Logger
	Now func() time.Time

	AnswerTimeout time.Duration // a request unanswered for so long is written again
	SyncEvery     time.Duration // checkpoints are stored so often while events come
	ConsumeEvery  int64         // bytes of events that are stored before the VM is told, if there is no other request; 0: never
	RetryAfter    time.Duration // first pause after a publish or a request that did not work
}
