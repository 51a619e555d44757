//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"testing"
	"time"

	"osbuilder/e2e/internal/harness"
)

// BenchmarkNoOpJobs: scripts that do nothing, dropped all at once into the
// whole product, from the first outcome to the last.
//
//	make bench
func BenchmarkNoOpJobs(b *testing.B) {
	p := installation
	run := time.Now().UnixNano()
	name := func(i int) string { return fmt.Sprintf("noop-%d-%d", run, i) }
	for i := range b.N {
		p.Drop(b, name(i)+".sh", "true\n")
	}
	ended := func(most int) func() bool {
		return func() bool {
			n := 0
			for i := range b.N {
				if _, err := os.Lstat(p.Output(name(i), "latest")); err == nil {
					n++
				}
			}
			return n >= most
		}
	}
	harness.Eventually(b, harness.JobTimeout, "first outcome", ended(1))
	b.ResetTimer()
	harness.Eventually(b, time.Hour, "last outcome", ended(b.N))
	perMinute(b, b.N-1)
}

// naive is the loop that the product grew out of, in the same VM: the writer
// waits until each script has run, since the loop would lose the next.
const naive = `set -eu
d=$(mktemp -d)
mkfifo "$d/ran"
inotifywait -q -m -e moved_to --format %%f "$d" | while read -r f; do [ "$f" != pipe_in ] || bash "$d/pipe_in"; done &
trap 'kill $(jobs -p); rm -rf "$d"' EXIT
exec 3<>"$d/ran"
printf 'true; echo >%%s/ran\n' "$d" >"$d/script"
until cp "$d/script" "$d/new" && mv "$d/new" "$d/pipe_in" && read -r -t 1 <&3; do :; done
begin=$(date +%%s%%N)
for i in $(seq %d); do cp "$d/script" "$d/new"; mv "$d/new" "$d/pipe_in"; read -r <&3; done
echo $(($(date +%%s%%N) - begin))`

// BenchmarkNaiveLoop is what the same costs without a promise.
func BenchmarkNaiveLoop(b *testing.B) {
	client := installation.Connect(b)
	b.ResetTimer()
	out, err := harness.OnVM(b, client, fmt.Sprintf(naive, b.N))
	if err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	var nanoseconds int64
	if _, err := fmt.Sscan(out, &nanoseconds); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	b.ReportMetric(float64(b.N)/time.Duration(nanoseconds).Minutes(), "jobs/min")
}

func perMinute(b *testing.B, jobs int) {
	b.ReportMetric(float64(jobs)/b.Elapsed().Minutes(), "jobs/min")
}
