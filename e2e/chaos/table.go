package chaos

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Table tells the report to people.
func (r Report) Table(o Observed) string {
	var b strings.Builder
	row := func(what, format string, args ...any) {
		fmt.Fprintf(&b, "  %-28s %s\n", what, fmt.Sprintf(format, args...))
	}
	row("jobs", "%d", len(o.Jobs))
	for _, status := range slices.Sorted(maps.Keys(r.Outcomes)) {
		row("  "+status, "%d", r.Outcomes[status])
	}
	if r.DiskFull > 0 {
		row("  for want of room", "%d", r.DiskFull)
	}
	row("attempts", "%d", r.Attempts)
	row("executions in the VM", "%d", r.Executions)
	row("  of an attempt once more", "%d", r.Repeated)
	row("log lines expected", "%d", r.Lines)
	row("  found", "%d", r.Found)
	row("  cuts marked", "%d", r.Cuts)
	row("  bytes marked as lost", "%d", r.LostBytes)
	row("images whole", "%d, %.1f MiB", r.Images, float64(r.ImageBytes)/(1<<20))
	row("folders whole in the VM", "%d", r.Folders)
	row("promises broken", "%d", len(r.Violations))
	fmt.Fprintf(&b, "  %-20s %5s %9s %9s %9s\n", "fault", "times", "measured", "median", "max")
	for _, kind := range Breaks {
		var times []time.Duration
		n := 0
		for _, f := range o.Faults {
			if f.Break != kind {
				continue
			}
			n++
			if f.Recovered > 0 {
				times = append(times, f.Recovered)
			}
		}
		if n == 0 {
			continue
		}
		median, most := "", ""
		if len(times) > 0 {
			slices.Sort(times)
			median = fmt.Sprintf("%.1f s", times[len(times)/2].Seconds())
			most = fmt.Sprintf("%.1f s", times[len(times)-1].Seconds())
		}
		fmt.Fprintf(&b, "  %-20s %5d %9d %9s %9s\n", kind, n, len(times), median, most)
	}
	return b.String()
}
