package control

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/logging"
	"osbuilder/pipe"
)

// WriteJobs writes jobs for people: one a line, aligned.
func WriteJobs(w io.Writer, jobs []Job, now time.Time) error {
	return (&Table{Out: w, Now: now}).Write(jobs)
}

// A Table is what WriteJobs writes, page by page: of a million jobs none but
// the page's are held. A column that was wide once stays so.
type Table struct {
	Out io.Writer
	Now time.Time

	widths []int
}

var header = []string{"ID", "NAME", "STATE", "PRIORITY", "ATTEMPT", "AGE", ""}

// Write adds jobs.
func (t *Table) Write(jobs []Job) error {
	var rows [][]string
	if t.widths == nil {
		t.widths = make([]int, len(header))
		rows = append(rows, header)
	}
	for _, j := range jobs {
		rows = append(rows, []string{
			string(j.ID), plain(j.Name), string(j.State), fmt.Sprint(j.Priority), attempt(j), age(j.Created, t.Now), plain(remark(j)),
		})
	}
	last := len(header) - 1
	for _, row := range rows {
		for i, cell := range row[:last] {
			t.widths[i] = max(t.widths[i], utf8.RuneCountInString(cell))
		}
	}
	var b strings.Builder
	for _, row := range rows {
		for i, cell := range row[:last] {
			b.WriteString(cell)
			b.WriteString(strings.Repeat(" ", t.widths[i]-utf8.RuneCountInString(cell)+2))
		}
		b.WriteString(row[last])
		b.WriteByte('\n')
	}
	_, err := io.WriteString(t.Out, b.String())
	return err
}

func attempt(j Job) string {
	if j.Attempt == 0 {
		return "-"
	}
	return fmt.Sprint(j.Attempt)
}

// remark is the one thing most worth knowing of a job.
func remark(j Job) string {
	switch {
	case j.State.Terminal() && j.Reason != "":
		return j.Reason
	case j.State.Terminal():
		return "output/" + j.Output
	case !j.CancelAsked.IsZero() && j.State != job.Collecting:
		return "is being cancelled"
	case j.Why != "":
		return "waits for " + j.Why
	case j.State == job.Collecting:
		return j.Status + ", on the way to output/"
	case j.Builder != "":
		return "on " + j.Builder
	}
	return ""
}

// WriteJob writes a job for people: what is known, then the whole story.
func WriteJob(w io.Writer, j Job, now time.Time) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(key, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", key, plain(fmt.Sprintf(format, args...)))
	}
	line("job", "%s", j.ID)
	line("name", "%s, dropped as %s", j.Name, j.Drop)
	line("state", "%s", state(j, now))
	if !j.State.Terminal() {
		line("priority", "%d", j.Priority)
	}
	if j.Why != "" {
		line("waits for", "%s", j.Why)
	}
	if j.RetryOf != "" {
		line("does again", "%s", j.RetryOf)
	}
	if !j.CancelAsked.IsZero() {
		line("cancel", "asked for at %s", stamp(j.CancelAsked))
	}
	if j.Status != "" {
		line("outcome", "%s", outcome(j))
	}
	for _, a := range j.Artifacts {
		line("artifact", "%s, %s, sha256 %s", a.Name, pipe.Size(a.Size), a.SHA256)
	}
	if j.Output != "" {
		line("output", "output/%s", j.Output)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	fmt.Fprintln(t, "TIME (UTC)\tSTATE\tEVENT\tATTEMPT\tREASON")
	for _, s := range j.History {
		n := "-"
		if s.Attempt > 0 {
			n = fmt.Sprint(s.Attempt)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", stamp(s.Time), s.State, s.Event, n, plain(s.Reason+folded(s)))
	}
	return t.Flush()
}

// folded says how many steps one stands for.
func folded(s job.Step) string {
	if s.Folded == 0 {
		return ""
	}
	return fmt.Sprintf(" (%d times, last at %s)", s.Folded+1, stamp(s.Last))
}

func state(j Job, now time.Time) string {
	s := string(j.State)
	switch {
	case j.State == job.Running && !j.Started.IsZero():
		s += fmt.Sprintf(" on %s for %s, attempt %d", j.Builder, age(j.Started, now), j.Attempt)
	case j.State == job.Running, j.State == job.Sending:
		s += fmt.Sprintf(", on %s, attempt %d", j.Builder, j.Attempt)
	case j.State == job.Queued:
		s += " for " + age(j.Updated, now)
	}
	return s
}

func outcome(j Job) string {
	s := j.Status
	if j.ExitCode != nil && *j.ExitCode != 0 {
		s += fmt.Sprintf(" with exit code %d", *j.ExitCode)
	}
	if j.Duration > 0 {
		s += " after " + (time.Duration(j.Duration) * time.Millisecond).Round(time.Millisecond).String()
	}
	if j.Reason != "" {
		s += ": " + j.Reason
	}
	return s
}

// stamp is a time to the second. The history's own has more.
func stamp(t time.Time) string { return t.UTC().Format(time.DateTime) }

// age says how long ago something was, roughly.
func age(from, now time.Time) string {
	d := max(now.Sub(from), 0)
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%02dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
}

// plain makes one line of what a VM or a job may have written, that a terminal
// can show and that stays in its column.
func plain(s string) string { return logging.Clean(strings.Join(strings.Fields(s), " ")) }
