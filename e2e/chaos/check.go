package chaos

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxAttempts is how often a job is tried at most: daemon/internal/job has it.
const maxAttempts = 3

// An Observed is what came of a plan.
type Observed struct {
	Jobs       []Seen // in the order of the plan
	Executions []Execution
	Faults     []Injected
	Half       []string // what was visible in output/ without being whole
	Inbox      []string // what is left in jobs/
}

// Seen is one job from outside.
type Seen struct {
	Job            Job
	Dropped, Ended time.Time // Ended is zero where no outcome came
	Outcomes       []Outcome
}

// An Outcome is a folder in output/.
type Outcome struct {
	ID       string
	Status   string
	ExitCode *int
	Reason   string
	Attempts int
	Log      string            // build.log
	Files    map[string]string // artifacts: their names and SHA-256, as they lie there
	Told     map[string]string // the same, as result.json has it
}

// An Execution is what a job said of itself inside the VM.
type Execution struct {
	Job     string
	Attempt int
	Boot    string // of the VM
}

// Injected is a fault that happened.
type Injected struct {
	Break     Break
	From, To  time.Time     // the same where it is done in a moment
	Recovered time.Duration // from To to the next sign of progress; 0 where none was seen
}

// A Wrong is a kind of violation.
type Wrong string

// What can be wrong.
const (
	NoOutcome          Wrong = "no outcome"
	SeveralOutcomes    Wrong = "several outcomes"
	WrongOutcome       Wrong = "wrong outcome"
	ExecutedTwice      Wrong = "an attempt executed twice"
	NotExecuted        Wrong = "an outcome without an execution"
	UnexplainedAttempt Wrong = "an attempt that no fault explains"
	LogDiffers         Wrong = "build.log differs"
	UnexplainedCut     Wrong = "a cut that no fault explains"
	ImageDamaged       Wrong = "image damaged"
	InputsDamaged      Wrong = "inputs damaged"
	HalfVisible        Wrong = "half an outcome visible"
	LeftInInbox        Wrong = "left in the inbox"
)

// A Violation is a promise that was not kept.
type Violation struct {
	Wrong Wrong
	Job   string
	Text  string
}

func (v Violation) String() string { return fmt.Sprintf("%s: %s: %s", v.Job, v.Wrong, v.Text) }

// A Report is what Check found.
type Report struct {
	Violations []Violation

	Outcomes   map[string]int // by status
	DiskFull   int            // failed because the VM's disk had been filled
	Attempts   int
	Executions int
	Repeated   int // executions beyond the first of an attempt
	Lines      int // that the last attempts of all jobs should have
	Found      int // and that were found, in their places
	Cuts       int // marked
	LostBytes  int // at the cuts of last attempts
	Images     int // whole
	ImageBytes int64
	Folders    int // whose inputs arrived whole
}

func (r *Report) violate(job string, wrong Wrong, format string, args ...any) {
	r.Violations = append(r.Violations, Violation{wrong, job, fmt.Sprintf(format, args...)})
}

// Check holds what was observed against what is promised.
func Check(o Observed) Report {
	r := Report{Outcomes: make(map[string]int)}
	times := make(map[Execution]int)
	for _, e := range o.Executions {
		e.Boot = ""
		times[e]++
	}
	for _, s := range o.Jobs {
		checkJob(&r, o, s, times)
	}
	for _, n := range times {
		r.Executions += n
	}
	for _, what := range o.Half {
		r.violate("output/", HalfVisible, "%s", what)
	}
	for _, what := range o.Inbox {
		r.violate("jobs/", LeftInInbox, "%s", what)
	}
	return r
}

func checkJob(r *Report, o Observed, s Seen, times map[Execution]int) {
	name := s.Job.Name
	switch len(s.Outcomes) {
	case 0:
		r.violate(name, NoOutcome, "a %s job, dropped at %s", s.Job.Kind, s.Dropped.UTC().Format(time.TimeOnly))
		return
	case 1:
	default:
		r.violate(name, SeveralOutcomes, "%d", len(s.Outcomes))
	}
	for _, out := range s.Outcomes {
		r.Outcomes[out.Status]++
		r.Attempts += out.Attempts
		deaths := o.during(s, Break.ofVM)
		unstarted := notExecuted(out, times)
		if s.Job.Kind == Folder { // which doesn't count itself, and says something as soon as it runs
			unstarted = 0
			if strings.HasPrefix(out.Log, "[osbuilder: attempt ") {
				unstarted = 1
			}
		}
		unstarted = min(unstarted, o.during(s, func(b Break) bool { return b == KillRunner }))
		if out.Attempts > maxAttempts || out.Attempts > 1+deaths+unstarted {
			r.violate(name, UnexplainedAttempt, "%d attempts, the VM died %d times under it, and %d did not begin because the runner died (%s)",
				out.Attempts, deaths, unstarted, out.Reason)
		}
		for attempt := 1; attempt <= max(out.Attempts, maxAttempts); attempt++ {
			n := times[Execution{Job: out.ID, Attempt: attempt}]
			if n > 1 {
				r.Repeated += n - 1
				r.violate(name, ExecutedTwice, "attempt %d of %s ran %d times", attempt, out.ID, n)
			}
			if n > 0 && attempt > out.Attempts {
				r.violate(name, UnexplainedAttempt, "attempt %d of %s ran, and its outcome knows of %d", attempt, out.ID, out.Attempts)
			}
		}
		full := o.during(s, func(b Break) bool { return b == FillData }) > 0
		expected := checkStatus(r, s.Job, out, deaths, full)
		if s.Job.Kind == Folder {
			checkFolder(r, s.Job, out, deaths+unstarted, expected)
			continue
		}
		if expected && times[Execution{Job: out.ID, Attempt: out.Attempts}] == 0 {
			r.violate(name, NotExecuted, "%s after %d attempts, the last of which never ran", out.Status, out.Attempts)
		}
		checkLog(r, s.Job, out, deaths+unstarted, expected)
		checkImage(r, s.Job, out)
	}
}

// notExecuted counts the attempts before the last that did not execute. A
// runner that is killed between an attempt's marker and its unit leaves one:
// the next runner can't know that, and does not start it a second time.
func notExecuted(out Outcome, times map[Execution]int) (n int) {
	for attempt := 1; attempt < out.Attempts; attempt++ {
		if times[Execution{Job: out.ID, Attempt: attempt}] == 0 {
			n++
		}
	}
	return n
}

// during counts the faults that came between a job's drop and its outcome.
func (o Observed) during(s Seen, which func(Break) bool) int {
	n := 0
	for _, f := range o.Faults {
		if which(f.Break) && !f.To.Before(s.Dropped) && (s.Ended.IsZero() || !f.From.After(s.Ended)) {
			n++
		}
	}
	return n
}

// checkStatus reports whether the job came to the end that was planned for
// it. Another one must have a reason.
func checkStatus(r *Report, j Job, out Outcome, deaths int, full bool) bool {
	code := -1
	if out.ExitCode != nil {
		code = *out.ExitCode
	}
	switch {
	case j.Kind == Timeout && out.Status == "timeout",
		j.Kind != Timeout && j.Exit == 0 && out.Status == "succeeded",
		j.Kind != Folder && j.Exit != 0 && out.Status == "failed" && code == j.Exit,
		j.Kind == Folder && out.Status == "failed" && code == j.Exit && strings.Contains(out.Log, folderError):
		return true
	case j.Kind == Cancel && (out.Status == "cancelled" || out.Status == "timeout"):
		// Wherever it was; and a wish that was late by a VM's reset meets one that was too long.
	case out.Status == "interrupted" && out.Attempts == maxAttempts && deaths >= maxAttempts:
	case out.Status == "failed" && full && (code >= exitNotCounted && code <= exitNoImage || strings.Contains(strings.ToLower(out.Reason), "no space left")):
		r.DiskFull++
	default:
		r.violate(j.Name, WrongOutcome, "a %s job with exit %d: %s, exit code %d, reason %q, log ends %q",
			j.Kind, j.Exit, out.Status, code, out.Reason, tail(out.Log))
	}
	return false
}

func tail(s string) string { return s[max(0, len(s)-200):] }

// The sidecar's own lines in build.log; see daemon/internal/buildlog.
var (
	notePattern    = regexp.MustCompile(`^\[osbuilder: (.*)\]\n$`)
	attemptPattern = regexp.MustCompile(`^attempt ([0-9]+) begins, attempt ([0-9]+) did not end$`)
	lostPattern    = regexp.MustCompile(`^([0-9]+) bytes of output were lost with the VM$`)
)

// checkLog holds build.log against what the job's attempts say, byte for byte.
// A piece may be missing where a line says how long it was, and an attempt
// may break off where a line says that the next one begins; both only if the
// VM died, or an attempt did not begin: cuts counts these.
func checkLog(r *Report, j Job, out Outcome, cuts int, expected bool) {
	v := logReader{want: j.Output(1), attempt: 1}
	for line := range strings.Lines(out.Log) {
		note := notePattern.FindStringSubmatch(line)
		if note == nil {
			if v.take(line); v.wrong != "" {
				break
			}
			continue
		}
		v.cuts++
		if m := lostPattern.FindStringSubmatch(note[1]); m != nil {
			v.lose(m[1])
		} else if m := attemptPattern.FindStringSubmatch(note[1]); m != nil {
			v.begin(j, m[1], m[2])
		} else {
			v.wrong = "it says " + strings.TrimSpace(line)
		}
		if v.wrong != "" {
			break
		}
	}
	if v.wrong == "" && v.attempt != out.Attempts && v.at > 0 {
		v.wrong = fmt.Sprintf("its last attempt is %d", v.attempt)
	}
	if v.wrong == "" && expected && v.at != len(v.want) {
		v.wrong = fmt.Sprintf("its last attempt ends after %d of %d bytes", v.at, len(v.want))
	}
	if expected {
		r.Lines += j.Lines
		r.Found += v.lines
	}
	r.Cuts += v.cuts
	r.LostBytes += v.lost
	// What could not be written to a full disk is missing, and Bash says so in its place.
	if v.wrong != "" && (expected || !strings.Contains(v.wrongAt, "No space left")) {
		r.violate(j.Name, LogDiffers, "%s, attempt %d: %s", out.ID, v.attempt, v.wrong)
	}
	if v.cuts > 0 && cuts == 0 {
		r.violate(j.Name, UnexplainedCut, "%d, though the VM never died under it", v.cuts)
	}
}

// A logReader walks through a build.log.
type logReader struct {
	attempt int
	want    string // all output of the attempt
	at      int    // up to where it was found, or marked as lost
	joined  bool   // the last line's newline may be the note's
	lines   int    // whole ones of the attempt
	cuts    int
	lost    int // bytes of the attempt that are marked as lost
	wrong   string
	wrongAt string // the line
}

// take reads a line of output, or the end of one.
func (l *logReader) take(line string) {
	rest := l.want[l.at:]
	switch {
	case strings.HasPrefix(rest, line) && !l.joined:
		l.at += len(line)
		if strings.HasSuffix(line, "\n") {
			l.lines++
		}
	case strings.HasPrefix(rest, strings.TrimSuffix(line, "\n")) && !l.joined:
		// Only a note may follow: where a line broke off it has a newline before it.
		l.at += len(line) - 1
		l.joined = true
	default:
		next, _, _ := strings.Cut(rest, "\n")
		l.wrong = fmt.Sprintf("after %d of %d bytes comes %q, not %q", l.at, len(l.want), strings.TrimSpace(line), next)
		l.wrongAt = line
	}
}

// lose goes over a piece that is marked as lost.
func (l *logReader) lose(bytes string) {
	n, err := strconv.Atoi(bytes)
	if err != nil || l.at+n > len(l.want) {
		l.wrong = fmt.Sprintf("%s bytes are said to be lost after %d of %d", bytes, l.at, len(l.want))
		return
	}
	l.at += n
	l.lost += n
	l.joined = false
}

// begin goes on with the next attempt.
func (l *logReader) begin(j Job, next, last string) {
	n, _ := strconv.Atoi(next)
	m, _ := strconv.Atoi(last)
	if m != l.attempt && l.at > 0 || n <= m {
		l.wrong = fmt.Sprintf("attempt %d is said to follow %d, in attempt %d", n, m, l.attempt)
		return
	}
	*l = logReader{attempt: n, want: j.Output(n), cuts: l.cuts}
}

// checkFolder wants an error that names what was dropped. Nix does not run what
// could count itself.
func checkFolder(r *Report, j Job, out Outcome, cuts int, expected bool) {
	switch whole := strings.Contains(out.Log, folderError+hexSum(j.data(""))); {
	case expected && whole:
		r.Folders++
	case expected:
		r.violate(j.Name, InputsDamaged, "of %s: the log ends %q", out.ID, tail(out.Log))
	}
	if strings.Contains(out.Log, "[osbuilder: ") && cuts == 0 {
		r.violate(j.Name, UnexplainedCut, "though the VM never died under it")
	}
	if len(out.Files) > 0 {
		r.violate(j.Name, ImageDamaged, "of %s there is %v, and it failed", out.ID, out.Files)
	}
}

// checkImage wants what the job made, if it succeeded, and nothing else.
func checkImage(r *Report, j Job, out Outcome) {
	want := map[string]string{}
	if j.Size > 0 && out.Status == "succeeded" {
		want[imageName] = j.ImageDigest(out.ID)
	}
	for what, got := range map[string]map[string]string{"lie there": out.Files, "are on record": out.Told} {
		if len(got) != len(want) || len(want) > 0 && got[imageName] != want[imageName] {
			r.violate(j.Name, ImageDamaged, "of %s %v %s, it made %v", out.ID, got, what, want)
			return
		}
	}
	if len(want) > 0 {
		r.Images++
		r.ImageBytes += j.Size
	}
}

// has reports whether there is a violation of one of the kinds.
func (r Report) has(kinds ...Wrong) bool {
	return slices.ContainsFunc(r.Violations, func(v Violation) bool { return slices.Contains(kinds, v.Wrong) })
}
