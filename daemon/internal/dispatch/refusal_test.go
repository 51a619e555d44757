package dispatch

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// refusing has the VM refuse one job for as long as it is told to.
func (b *bench) refusing(id job.ID, r pipe.Refused) {
	b.set(func(m *machine) {
		m.refuses = func(h pipe.Header) *pipe.Refused {
			if h.Job != string(id) {
				return nil
			}
			return &r
		}
	})
}

// A job that the VM refuses again and again, though it is the next one, lets
// others pass, and gets its turn when the VM takes it.
func TestRefusedJobHoldsNobodyUp(t *testing.T) {
	for name, tt := range map[string]struct {
		reason pipe.Reason
		inputs bool
	}{
		"inputs":                  {pipe.ReasonInputs, true},
		"no room for its inputs":  {pipe.ReasonDisk, true},
		"no room for its request": {pipe.ReasonDisk, false},
		"cut on the way":          {pipe.ReasonMalformed, false},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			b.cfg.Inputs = writeArchive
			var large job.ID
			if tt.inputs {
				large = b.addNixOS("large", "x86_64-linux")
			} else {
				large = b.add("large")
			}
			b.refusing(large, pipe.Refused{Reason: tt.reason, Retryable: true, Message: "not now"})
			d, stop := b.run()
			defer stop()
			b.until(large, "refused", job.Job.Deferred)
			if _, err := d.Prioritize(t.Context(), large, job.MaxPriority); err != nil {
				t.Fatal(err)
			}
			for i := range 5 {
				if j := b.settled(b.add2(d, fmt.Sprint("small-", i))); j.State != job.Done {
					t.Errorf("%s", j.State)
				}
			}
			b.set(func(m *machine) { m.refuses = nil })
			if _, err := d.Retry(t.Context(), large); err != nil {
				t.Fatal(err)
			}
			if j := b.settled(large); j.State != job.Done || j.Attempt != 1 {
				t.Errorf("%s, attempt %d", j.State, j.Attempt)
			}
		})
	}
}

// Several jobs with inputs, refused one after the other for want of room: it
// is the VM that has none, and not each of them is uploaded to learn that.
func TestRefusalsInARowAreTheVMs(t *testing.T) {
	b := newBench(t)
	b.cfg.Inputs = func(j job.Job, w io.Writer) error {
		_, err := io.WriteString(w, j.Name)
		return err
	}
	b.cfg.RetryAfter, b.cfg.AnswerTimeout = time.Hour, bound
	b.set(func(m *machine) {
		m.refuses = func(pipe.Header) *pipe.Refused {
			return &pipe.Refused{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}
		}
	})
	var ids []job.ID
	for i := range 8 {
		id := b.addNixOS(fmt.Sprint("job-", i), "x86_64-linux")
		j, err := b.store.Get(t.Context(), id)
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256([]byte(j.Name))
		j.Inputs = &job.Inputs{SHA256: hex.EncodeToString(sum[:]), Size: int64(len(j.Name))}
		if _, err := b.store.Update(t.Context(), j); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, id)
	}
	d, stop := b.run()
	defer stop()
	tried, waiting := 0, 0
	b.wait("end of the tries", func() bool {
		jobs, err := d.InFlight(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		tried, waiting = 0, 0
		for _, j := range jobs {
			tried += min(j.Attempt, 1)
			if j.Deferred() {
				waiting++
			}
		}
		return waiting >= 2 && waiting == tried
	})
	// The third can have been on its way in the other slot.
	if tried > 3 {
		t.Errorf("%d jobs were tried", tried)
	}
	b.set(func(m *machine) { m.refuses = nil })
	b.skew.Store(int64(2 * time.Hour))
	for _, id := range ids {
		if j := b.settled(id); j.State != job.Done || j.Attempt != 1 {
			t.Errorf("%s, attempt %d", j.State, j.Attempt)
		}
	}
}

// However often a job is refused, its story stays short and says how often.
func TestRefusedForLong(t *testing.T) {
	b := newBench(t)
	b.cfg.RetryAfter, b.cfg.AnswerTimeout = time.Nanosecond, bound
	const refusals = 30
	b.vm.refuse = slices.Repeat([]pipe.Refused{{Reason: pipe.ReasonDisk, Retryable: true, Message: "no room"}}, refusals)
	id := b.add("hello")
	_, stop := b.run()
	defer stop()
	j := b.settled(id)
	want := []job.Event{job.Created, job.Claimed, job.Deferred, job.Claimed, job.Accepted, job.Finished, job.PublishedDone}
	if diff := cmp.Diff(want, story(j)); diff != "" {
		t.Fatalf("story (-want +got):\n%s", diff)
	}
	first, last := j.History[2].Time, j.History[2].Last
	if n := j.History[2].Folded; n != refusals-1 || !first.Before(last) || last.After(j.History[3].Time) {
		t.Errorf("refused %d times, from %s to %s", n+1, first, last)
	}
	if j.Attempt != 1 {
		t.Errorf("attempt %d", j.Attempt)
	}
}
