package runner

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"osbuilder/pipe"
)

// keepAnonymous is how many finished anonymous jobs are kept: nobody
// acknowledges them.
const keepAnonymous = 20

// inOrder lists the jobs in the order of their acceptance.
func (r *Runner) inOrder() []*job {
	all := make([]*job, 0, len(r.jobs))
	for _, j := range r.jobs {
		all = append(all, j)
	}
	slices.SortFunc(all, func(a, b *job) int { return cmp.Compare(a.Order, b.Order) })
	return all
}

// takeUp starts a goroutine for each job that wants one and can have it.
func (r *Runner) takeUp(ctx context.Context) {
	all := r.inOrder()
	// First those that have their slots: an older one that waits would be given the slot of one that runs.
	for _, j := range all {
		if !j.attended && j.outcome == nil && j.ran != nil {
			r.attend(ctx, j, j.ran.Slot)
		}
	}
	for _, j := range all {
		switch {
		case j.attended:
		case j.outcome != nil:
			r.takeUpEnded(ctx, j)
		case j.wish != nil:
			r.dismiss(ctx, j)
		default:
			if slot := r.freeSlot(); slot > 0 {
				r.attend(ctx, j, slot)
			}
		}
	}
}

// freeSlot returns the first slot without a job; 0 if all are busy.
func (r *Runner) freeSlot() int {
	for slot := 1; slot <= r.cfg.Slots; slot++ {
		if r.slots[slot] == nil {
			return slot
		}
	}
	return 0
}

// takeUpEnded says what was not yet said of a job that has ended. Output is
// repeated for one at a time.
func (r *Runner) takeUpEnded(ctx context.Context, j *job) {
	if j.told.finished {
		return
	}
	if j.told.log < j.outcome.Finished.LogLength {
		if r.replays {
			return
		}
		r.replays, j.attended = true, true
		a := r.attendant(j, 0)
		r.work.Go(func() {
			err := a.replay(ctx)
			r.leave(ctx, j, func() { r.replays = false }, err)
		})
		return
	}
	if err := r.tell(j); err != nil {
		r.logf("%v", err)
		r.later()
	}
}

// attend gives a job its goroutine and its slot, whose user nobody else is
// until the job's files are collected.
func (r *Runner) attend(ctx context.Context, j *job, slot int) {
	r.slots[slot] = j
	j.attended = true
	a := r.attendant(j, slot)
	r.work.Go(func() {
		err := a.run(ctx)
		r.leave(ctx, j, func() {
			if r.slots[slot] == j {
				delete(r.slots, slot)
			}
		}, err)
	})
}

// leave ends a goroutine's time with a job.
func (r *Runner) leave(ctx context.Context, j *job, free func(), err error) {
	if ctx.Err() != nil {
		return // the next runner goes on
	}
	_ = r.call(ctx, func() error {
		free()
		j.attended = false
		if err != nil && !errors.Is(err, errForgotten) {
			// It is taken up again from what is on disk. A disk that stays
			// full is reported once.
			if j.trouble != err.Error() {
				j.trouble = err.Error()
				r.logf("job %s: %v", folder(j.ref()), err)
			}
			r.later()
			return nil
		}
		r.pruneAnonymous()
		r.takeUp(ctx)
		return nil
	})
}

// pruneAnonymous forgets the oldest anonymous jobs that are finished.
func (r *Runner) pruneAnonymous() {
	var done []*job
	for _, j := range r.inOrder() {
		if j.Anonymous && j.told.finished && !j.attended {
			done = append(done, j)
		}
	}
	for _, j := range done[:max(0, len(done)-keepAnonymous)] {
		if err := r.remove(j); err != nil {
			r.logf("%v", err)
		}
	}
}

// tell says what is known of a job and not yet said in this generation. Of
// its output it says nothing: that is the attendant's.
func (r *Runner) tell(j *job) error {
	event := func(t pipe.Type) pipe.Event { return pipe.Event{Type: t, Job: j.Job, Attempt: j.Attempt} }
	if !j.told.accepted {
		e := event(pipe.TypeAccepted)
		e.Accepted = &pipe.Accepted{Request: jobKey(j.ref())}
		if err := r.say(e, true); err != nil {
			return err
		}
		j.told.accepted = true
	}
	if j.started && !j.told.started {
		e := event(pipe.TypeStarted)
		e.Started = &pipe.Started{Name: j.Name, Slot: j.ran.Slot, Unit: unitName(j.ref()), User: j.ran.User}
		if err := r.say(e, false); err != nil {
			return err
		}
		j.told.started = true
	}
	if j.outcome == nil || j.told.finished || j.told.log < j.outcome.Finished.LogLength {
		return nil
	}
	if err := r.tellArtifacts(j); err != nil {
		return err
	}
	e := event(pipe.TypeFinished)
	e.Finished = &j.outcome.Finished
	if err := r.say(e, true); err != nil {
		return err
	}
	j.told.finished = true
	r.logf("job %s %s", folder(j.ref()), describe(j.outcome.Finished))
	return nil
}

func (r *Runner) tellArtifacts(j *job) error {
	if j.told.artifacts >= len(j.outcome.Artifacts) {
		return nil
	}
	for _, a := range j.outcome.Artifacts[j.told.artifacts:] {
		e := pipe.Event{Type: pipe.TypeArtifact, Job: j.Job, Attempt: j.Attempt, Artifact: &a}
		if err := r.say(e, false); err != nil {
			return err
		}
		j.told.artifacts++
	}
	return r.out.sync() // once for all of them, and before "finished"
}

// describe puts an outcome in words, for the log.
func describe(f pipe.Finished) string {
	s := string(f.Status)
	switch {
	case f.ExitCode != nil && *f.ExitCode != 0:
		s += fmt.Sprintf(" with exit code %d", *f.ExitCode)
	case f.Signal != "":
		s += " by " + f.Signal
	}
	if f.Reason != "" {
		s += ": " + f.Reason
	}
	return s
}

// unitName is the name of a job's unit, without a suffix.
func unitName(ref pipe.JobRef) string { return "job-" + folder(ref) }

// errRewound: the output has to be told from another place on, because a new
// generation began.
var errRewound = errors.New("output goes on elsewhere")

// tellOutput says a piece of a job's output. It returns where the next one
// begins: with errRewound not behind this one.
func (r *Runner) tellOutput(ctx context.Context, j *job, offset int64, data []byte) (int64, error) {
	if r.jobs[j.ref()] != j {
		return 0, errForgotten
	}
	if err := r.tell(j); err != nil { // what comes before any output
		return j.told.log, err
	}
	if offset != j.told.log {
		return j.told.log, errRewound
	}
	err := r.say(pipe.Event{
		Type: pipe.TypeLog, Job: j.Job, Attempt: j.Attempt,
		Log: &pipe.Log{Offset: offset, Data: data},
	}, false)
	if errors.Is(err, errPipeLost) {
		if err := r.mend(ctx); err != nil {
			return j.told.log, err
		}
		return j.told.log, errRewound
	}
	if err != nil {
		return j.told.log, err
	}
	j.told.log += int64(len(data))
	return j.told.log, nil
}

// errForgotten: the job was acknowledged or pruned meanwhile.
var errForgotten = errors.New("the job was forgotten")
