package model

// The protocol, with the programs as they are: the writer is the sidecar's
// dispatcher, build log and store; the runner is package runner.

const (
	jobs     = 2
	attempts = 2 // of a job, at most; the sidecar's own limit is larger
	events   = 16
)

// A ref names one attempt of a job.
type ref uint8

func refOf(job int, attempt uint8) ref { return ref(job*attempts + int(attempt) - 1) }

func (r ref) job() int       { return int(r) / attempts }
func (r ref) attempt() uint8 { return uint8(r)%attempts + 1 }
func (r ref) String() string { return refNames[r] }

var (
	refNames = [jobs * attempts]string{"A/1", "A/2", "B/1", "B/2"}
	jobNames = [jobs]string{"A", "B"}
)

// on says where something lies.
type on uint8

const (
	absent  on = iota
	cached     // written; a reset may take it
	adopted    // the same, but a runner started anew goes by it
	synced     // stays
)

// A status is how an attempt or a job ended.
type status uint8

const (
	open status = iota
	succeeded
	interrupted
	cancelled
	terminated // by the runner, because of a cancel: of a unit only
)

// A request lies in pipe_in, or is on its way there.
type request struct {
	kind kind
	ref  ref
	from uint8 // repeat: in which generation the reader lost its place
}

type kind uint8

const (
	none kind = iota
	job
	acknowledge
	cancel
	repeat
)

func (q request) String() string {
	switch q.kind {
	case job:
		return "job " + q.ref.String()
	case acknowledge:
		return "acknowledge " + q.ref.String()
	case cancel:
		return "cancel " + q.ref.String()
	case repeat:
		return "repeat"
	default:
		return "nothing"
	}
}

// An event lies in pipe_out.
type event struct {
	kind   told
	ref    ref
	answer kind   // to which kind of request, of an accepted one
	status status // of a finished one
	n      uint8  // hello: which attempts are there; log: the line; finished: lines in all
	begins bool   // a hello that begins a generation
	in     uint8  // which generation
}

type told uint8

const (
	hello told = iota + 1
	accepted
	logged
	finished
	damaged // what somebody else left of events
)

// state is everything: what lies on the disks, what the programs know, what
// is under way, and what may yet fail.
type state struct {
	// The sidecar's disk. Its records are synced with each write.
	record [jobs]record
	log    [jobs]log
	saved  checkpoint
	// The sidecar's memory.
	sidecar sidecar
	// Under way.
	sending request // by a Send that has not returned
	stray   request // of a link that is gone: it may still arrive
	pipeIn  request
	notice  bool // inotify has a word of it for the runner
	// The VM's disk.
	attempt  [jobs * attempts]attempt
	seen     request
	repeated uint8 // the generation that was last told again
	out      pipeOut
	// The runner's memory, but for that of attempts.
	runner runner

	left   faults // that may still happen
	resets bool   // the VM was reset at least once
}

// A record is the sidecar's of one job.
type record struct {
	stage   stage
	attempt uint8
	result  status
	wish    bool // the user wants it cancelled
	output  status
	acked   bool
}

type stage uint8

const (
	queued stage = iota
	claimed
	running
	collecting
	ended
)

// A log is build.log: what is in it, in lines, and how many of them are synced.
type log struct {
	text      [8]line
	n, synced uint8
	mark      mark
}

// A line is one of an attempt's output, or one of the sidecar's own.
type line uint8

const (
	begins line = 0x40 // | attempt
	lost   line = 0x80
)

func lineOf(attempt, n uint8) line { return line(attempt<<4 | n) }

// A mark says how far a log is.
type mark struct {
	file, attempt, stream uint8
}

// A checkpoint is stored in one write.
type checkpoint struct {
	read  uint8
	marks [jobs]mark
	again again
}

// again is the wish that the VM tell everything again.
type again struct {
	wanted bool
	from   uint8 // the generation that can't be read
}

// A gap is where the events about a job go on without what was before.
type gap struct {
	in    uint8 // the generation in which one was left for a repetition
	asked bool  // on this job's account
	final uint8 // was told again in, and lacked it, too
}

// A sidecar does one thing at a time, and each takes steps.
type sidecar struct {
	up        bool
	doing     doing
	then      doing // after a checkpoint
	job       uint8
	read      uint8 // the next event
	event     event // that it is at
	advance   bool  // to the next, when it has dealt with this one
	waiting   request
	again     again
	skip      uint8      // behind the damage, where reading goes on
	cancelled [jobs]bool // the VM was told
	gap       [jobs]gap
	missing   [jobs]bool // hello did not list it, and nothing was said of it since
	caughtUp  bool       // all was read at least once
}

type doing uint8

const (
	idle doing = iota
	syncing
	storing
	claiming // the record
	sendNow  // the claim's request, where the record comes after
	recordNow
	finishing
	greeting
	skipping // what can't be read
	asking   // for a repetition
)

// An attempt is what the VM has of it.
type attempt struct {
	spool, ran, result, outcome, tomb, wish on

	unit         unit
	how          status // the unit ended
	status       status // in the outcome
	length       uint8  // in the outcome
	lines, safe  uint8  // of output; how many are synced
	base         uint8
	old          bool // it was started in an earlier boot
	starting     bool // the runner is between marker and unit
	toldAccepted bool
	toldFinished bool
	toldLines    uint8

	starts uint8  // for the proof
	said   status // for the proof
}

type unit uint8

const (
	noUnit unit = iota
	runs
	stopping // its hook begins
	hooked   // and is about to write the result
	writing
	gone
)

// pipeOut is what of pipe_out's generations is not yet behind the checkpoint.
type pipeOut struct {
	event     [events]event
	n, synced uint8
	gen       uint8 // the current one
	changed   bool  // by other hands, so that the runner is going to see it
	spoilt    bool  // by other hands
	full      bool  // the model has no room for more
}

func (o *pipeOut) add(e event) {
	if o.n == events {
		o.full = true
		return
	}
	e.in = o.gen
	o.event[o.n] = e
	o.n++
}

// forget drops what nobody will read again.
func (s *state) forget() {
	k := min(s.saved.read, s.out.synced)
	if k == 0 {
		return
	}
	copy(s.out.event[:], s.out.event[k:s.out.n])
	clear(s.out.event[s.out.n-k : s.out.n])
	s.out.n -= k
	s.out.synced -= k
	s.saved.read -= k
	s.sidecar.read -= min(k, s.sidecar.read)
	s.sidecar.skip -= min(k, s.sidecar.skip)
}

// A runner owns pipe_out.
type runner struct {
	up     bool
	reset  bool // the VM was booted anew
	unsync bool // pipe_out is to be synced before anything else
	letter request
	at     uint8 // which step of the letter
}

// faults are how much may still go wrong; all bounds their sum.
type faults struct {
	all, killSidecar, killRunner, power, reset, cut, early, cancel, damage uint8
}

// rules that can be left out, to see that they are needed.
type rules struct {
	acceptUnsynced  bool // accepted is said before the spool is synced
	adoptUnsynced   bool // a runner started anew goes by what it finds, synced or not
	markLate        bool // the unit is started before the marker is there
	hookUnsynced    bool // the stop hook doesn't sync the output before the result
	noTombstone     bool // an acknowledged job is forgotten without a trace
	checkpointFirst bool // the checkpoint is stored before the logs are synced
	sendFirst       bool // the request is sent before the claim is on record
	ackEarly        bool // the VM may forget before the outcome is in output/
	takeGaps        bool // an event is taken though what was before it is going to be told again
	repeatRest      bool // what can't be read is told again only from where it was told to
}

// A model is the protocol within bounds.
type model struct {
	without rules
	jobs    int
	lines   [jobs]uint8 // of output of each job
	faults  faults
}

func (m model) system() system[state] {
	// Both halves are there, and hello was read: all that comes again with each start.
	start := state{left: m.faults, sidecar: sidecar{up: true, caughtUp: true}, runner: runner{up: true}, out: pipeOut{gen: 1}}
	for j := m.jobs; j < jobs; j++ {
		start.record[j] = record{stage: ended, acked: true}
	}
	return system[state]{start: start, steps: m.steps, wrong: m.wrong, ended: m.ended}
}

func (m model) steps(s state, next func(step, state)) {
	m.sidecarSteps(s, next)
	m.linkSteps(s, next)
	m.runnerSteps(s, next)
	m.unitSteps(s, next)
	m.faultSteps(s, next)
}

// ended: every job has its outcome, and the VM knows none any more.
func (m model) ended(s state) bool {
	for _, r := range s.record {
		if r.stage != ended || !r.acked {
			return false
		}
	}
	for _, a := range s.attempt {
		if a.spool != absent {
			return false
		}
	}
	return true
}
