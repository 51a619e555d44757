package nixlog

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Bounds of what is kept for an explanation.
const (
	keepLines = 50  // the last ones of each derivation
	keepDrvs  = 200 // derivations whose lines are kept
	keepText  = 200 // lines that were neither an event nor a builder's
)

// A Log takes the lines of one Nix command, hands plain ones to its sink, and
// remembers what an explanation needs. It is not for several goroutines.
type Log struct {
	sink func(line string)
	now  func() time.Time

	// Interval is the least time between two lines of progress; Silence the
	// time without any line after which there is one all the same.
	Interval, Silence time.Duration
	// Doing is what a command does of which nothing is heard: "evaluating".
	Doing string

	activities map[uint64]*activity
	totals     map[int]*count // by activity type, of those that stopped
	building   []uint64       // in order of start
	last       string         // derivation of the build that ended last

	errors   []Error
	warnings []string
	text     []string
	logs     map[string][]string // derivation → its last lines
	order    []string            // derivations of logs, oldest first
	plan     Plan
	listing  *[]string // where the paths of the list being read go

	said     string    // last line of progress
	saidAt   time.Time // when
	quietAt  time.Time // when the last line of any kind was given out
	realised bool      // numbers have come
}

// A Plan is what Nix said it will do.
type Plan struct {
	Build              []string // derivations
	Fetch              []string // store paths
	Download, Unpacked string   // sizes, in Nix's words; empty if it said none
}

type activity struct {
	kind     int
	name     string // derivation of a build
	drv      string
	started  time.Time
	phase    string
	count    count
	expected map[int]int64
}

// A count is that of result 105.
type count struct{ done, expected, running, failed int64 }

// New makes a Log. The sink gets lines without end of line.
func New(sink func(line string), now func() time.Time) *Log {
	t := now()
	return &Log{
		sink: sink, now: now,
		Interval: 5 * time.Second, Silence: time.Minute, Doing: "at work",
		activities: map[uint64]*activity{},
		totals:     map[int]*count{},
		logs:       map[string][]string{},
		saidAt:     t, quietAt: t,
	}
}

// Line takes one line of Nix's standard error.
func (l *Log) Line(line []byte) {
	e, ok := parse(line)
	if !ok {
		if s := Plain(string(line)); s != "" {
			l.text = keep(l.text, s, keepText)
			l.say(s)
		}
		return
	}
	switch e.Action {
	case "start":
		l.start(e)
	case "stop":
		l.stop(e.ID)
	case "result":
		l.result(e)
	case "msg":
		l.message(e)
	}
}

func keep(lines []string, line string, most int) []string {
	if len(lines) >= most {
		lines = slices.Delete(lines, 0, len(lines)-most+1)
	}
	return append(lines, line)
}

func (l *Log) say(line string) {
	l.quietAt = l.now()
	l.sink(line)
}

func (l *Log) start(e event) {
	a := &activity{kind: e.Type, started: l.now(), expected: map[int]int64{}}
	l.activities[e.ID] = a
	if e.Type == Build {
		a.drv = e.text(0)
		a.name = DrvName(a.drv)
		l.building = append(l.building, e.ID)
		line := "building " + a.name
		if machine := e.text(1); machine != "" {
			line += " on " + Plain(machine)
		}
		l.say(Plain(line))
		return
	}
	// What has a count of its own is in the progress; a file that evaluation
	// fetches by itself has not.
	if text := Plain(e.Text); text != "" && e.Level <= levelInfo && e.Type != CopyPath && e.Type != Substitute {
		l.say(text)
	}
}

func (l *Log) stop(id uint64) {
	a, ok := l.activities[id]
	if !ok {
		return
	}
	delete(l.activities, id)
	if a.kind == Build {
		l.last = a.drv
		l.building = slices.DeleteFunc(l.building, func(b uint64) bool { return b == id })
	}
	total := l.total(a.kind)
	total.done += a.count.done
	total.failed += a.count.failed
	// What has stopped awaits nothing any more: what it has done counts as
	// what was to be done.
	total.expected += a.count.done
}

func (l *Log) total(kind int) *count {
	if l.totals[kind] == nil {
		l.totals[kind] = &count{}
	}
	return l.totals[kind]
}

func (l *Log) result(e event) {
	a := l.activities[e.ID]
	switch e.Type {
	case LogLine:
		l.builderLine(a, e.text(0))
	case SetPhase:
		if a != nil {
			a.phase = e.text(0)
		}
	case Progress:
		if a == nil {
			return
		}
		done, ok1 := e.number(0)
		expected, ok2 := e.number(1)
		running, _ := e.number(2)
		failed, _ := e.number(3)
		if ok1 && ok2 {
			a.count = count{done, expected, running, failed}
		}
		l.realised = true
	case SetExpected:
		kind, ok1 := e.number(0)
		n, ok2 := e.number(1)
		if a != nil && ok1 && ok2 {
			a.expected[int(kind)] = n
		}
	}
}

// builderLine is a line of a derivation's own log.
func (l *Log) builderLine(a *activity, text string) {
	line := Plain(text)
	if a == nil || a.name == "" {
		if line != "" {
			l.text = keep(l.text, line, keepText)
			l.say(line)
		}
		return
	}
	if _, ok := l.logs[a.drv]; !ok {
		if len(l.order) >= keepDrvs {
			delete(l.logs, l.order[0])
			l.order = l.order[1:]
		}
		l.order = append(l.order, a.drv)
	}
	l.logs[a.drv] = keep(l.logs[a.drv], line, keepLines)
	if len(l.building) > 1 {
		line = Plain(a.name + "> " + line)
	}
	l.say(line)
}

var (
	buildList = regexp.MustCompile(`^(?:this|these (\d+)) derivations? will be built:$`)
	fetchList = regexp.MustCompile(`^(?:this|these (\d+)) paths? will be fetched(?: \(([^,]+) download, ([^)]+) unpacked\))?:$`)
)

func (l *Log) message(e event) {
	text := plainText(e.Msg)
	if text == "" {
		return
	}
	if path, ok := strings.CutPrefix(text, "  /"); ok && l.listing != nil {
		*l.listing = append(*l.listing, "/"+path)
		return
	}
	l.listing = nil
	switch {
	case strings.HasPrefix(text, "error (ignored)"):
		l.sayAll(text)
	case e.Level == levelError && strings.HasPrefix(text, "warning:"), e.Level == levelWarn:
		if strings.Contains(text, "you did not specify '--add-root'") {
			return
		}
		l.warnings = keep(l.warnings, text, keepText)
		l.sayAll(text)
	case e.Level == levelError:
		// Said by the explanation, in its order.
		l.errors = append(l.errors, Error{
			Message: text,
			Cause:   plainText(e.RawMsg),
			At:      e.position(),
		})
	case e.Level > levelInfo:
	case buildList.MatchString(text):
		l.plan.Build = nil
		l.listing = &l.plan.Build
	case fetchList.MatchString(text):
		m := fetchList.FindStringSubmatch(text)
		l.plan.Fetch, l.plan.Download, l.plan.Unpacked = nil, m[2], m[3]
		l.listing = &l.plan.Fetch
	default:
		l.sayAll(text)
	}
}

func (l *Log) sayAll(text string) {
	for line := range strings.SplitSeq(text, "\n") {
		l.say(line)
	}
}

// Tick is called now and then: it gives out progress when something changed,
// and a sign of life when all is silent.
func (l *Log) Tick() {
	now := l.now()
	if now.Sub(l.saidAt) >= l.Interval {
		if line := l.Progress(); line != "" && line != l.said {
			l.said, l.saidAt = line, now
			l.say(line)
			return
		}
	}
	if now.Sub(l.quietAt) >= l.Silence {
		l.saidAt = now
		l.say(l.alive(now))
	}
}

// alive says what is being waited for.
func (l *Log) alive(now time.Time) string {
	if len(l.building) > 0 {
		if a := l.activities[l.building[0]]; a != nil {
			line := fmt.Sprintf("still building %s for %s", a.name, now.Sub(a.started).Round(time.Second))
			if a.phase != "" {
				line += ", " + a.phase
			}
			if more := len(l.building) - 1; more > 0 {
				line += fmt.Sprintf(", and %d more", more)
			}
			return Plain(line)
		}
	}
	if line := l.Progress(); line != "" {
		return "still " + l.Doing + ": " + line
	}
	return "still " + l.Doing
}

// Progress is the state in one line, empty before there is anything to count.
func (l *Log) Progress() string {
	if !l.realised {
		return ""
	}
	var parts []string
	if c := l.sum(Builds); c.expected > 0 {
		part := fmt.Sprintf("built %d of %d", c.done, c.expected)
		if c.failed > 0 {
			part += fmt.Sprintf(" (%d failed)", c.failed)
		}
		parts = append(parts, part)
	}
	if c := l.sum(CopyPaths); c.expected > 0 {
		parts = append(parts, fmt.Sprintf("fetched %d of %d paths", c.done, c.expected))
	}
	if c := l.sum(FileTransfer); c.expected > 0 {
		parts = append(parts, fmt.Sprintf("downloaded %s of %s", Bytes(c.done), Bytes(c.expected)))
	} else if c := l.sum(CopyPath); c.expected > 0 {
		parts = append(parts, fmt.Sprintf("copied %s of %s", Bytes(c.done), Bytes(c.expected)))
	}
	return strings.Join(parts, ", ")
}

// sum adds up the activities of a type, and what others said to expect of it.
func (l *Log) sum(kind int) count {
	c := *l.total(kind)
	var expected int64
	for _, a := range l.activities {
		if a.kind == kind {
			c.done += a.count.done
			c.expected += a.count.expected
			c.running += a.count.running
			c.failed += a.count.failed
		}
		expected += a.expected[kind]
	}
	c.expected = max(c.expected, expected)
	return c
}

// Errors are the messages of failure so far, in Nix's order.
func (l *Log) Errors() []Error { return l.errors }

// Warnings are the last warnings.
func (l *Log) Warnings() []string { return l.warnings }

// Text is the last of what was neither the format nor a builder's line.
func (l *Log) Text() []string { return l.text }

// Plan is what Nix said that it will build and fetch.
func (l *Log) Plan() Plan { return l.plan }

// BuildLog is the last lines of a derivation's log.
func (l *Log) BuildLog(drv string) []string { return l.logs[drv] }

// Building are the derivations that were being built at the end, or else the
// one whose build ended last: some versions end it before they say why.
func (l *Log) Building() []string {
	var drvs []string
	for _, id := range l.building {
		if a := l.activities[id]; a != nil {
			drvs = append(drvs, a.drv)
		}
	}
	if len(drvs) == 0 && l.last != "" {
		drvs = append(drvs, l.last)
	}
	return drvs
}

// Bytes is a size for people, in Nix's own unit.
func Bytes(n int64) string {
	const unit = 1 << 20
	switch {
	case n >= 1<<30:
		return strconv.FormatFloat(float64(n)/(1<<30), 'f', 2, 64) + " GiB"
	case n >= 10*unit:
		return strconv.FormatInt(n/unit, 10) + " MiB"
	default:
		return strconv.FormatFloat(float64(n)/unit, 'f', 1, 64) + " MiB"
	}
}
