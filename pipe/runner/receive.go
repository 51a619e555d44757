package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// maxJobs bounds what is kept for somebody to acknowledge, so that hello,
// which names them all, stays one line.
const maxJobs = 5000

// receive deals with what lay in pipe_in: it is answered, in every case but
// that of nothing written.
func (r *Runner) receive(ctx context.Context, l letter) {
	if l.problem != "" {
		r.answer(ctx, pipe.Header{}, &pipe.Refused{
			Reason:  pipe.ReasonMalformed,
			Message: fmt.Sprintf("%s can't be read: %s", r.cfg.pipeIn(), l.problem),
		})
		return
	}
	if len(bytes.TrimSpace(l.data)) == 0 || l.late && l.digest == r.spool.seen() {
		return
	}
	req, err := pipe.Parse(l.data)
	var header pipe.Header
	if req.Header != nil {
		header = *req.Header
	}
	switch {
	case err != nil:
		r.answer(ctx, header, malformed(err))
	case req.Header != nil:
		later, refused := r.obey(ctx, l, header, req.Body)
		if later {
			return
		}
		r.answer(ctx, header, refused)
	case l.late:
		r.answer(ctx, header, r.stale(l))
	default:
		r.anonymous(ctx, l)
	}
	r.dealt(ctx, l)
}

// dealt notes a request that was answered. After the answer: a runner that
// dies in between looks at it again, and every request bears that.
func (r *Runner) dealt(ctx context.Context, l letter) {
	if err := r.spool.setSeen(l.digest); err != nil {
		r.logf("note what was read: %v", err)
	}
	r.takeUp(ctx)
}

// malformed says what is wrong with a request that is none.
func malformed(err error) *pipe.Refused {
	if errors.Is(err, pipe.ErrVersion) {
		return &pipe.Refused{
			Reason:  pipe.ReasonVersion,
			Message: fmt.Sprintf("%v: update the older side", err),
		}
	}
	return &pipe.Refused{
		Reason:  pipe.ReasonMalformed,
		Message: fmt.Sprintf("%v: write it whole to a file of its own and rename that over pipe_in", err),
		// Cut on the way, perhaps; a header that doesn't parse stays as it is.
		Retryable: errors.Is(err, pipe.ErrDigest),
	}
}

// obey carries out a request with a header, and returns why not. It reports
// true if the answer comes later.
func (r *Runner) obey(ctx context.Context, l letter, h pipe.Header, body []byte) (bool, *pipe.Refused) {
	if h.Kind == pipe.KindTakeOver || r.owner == "" {
		if err := r.own(h.Owner); err != nil {
			return false, r.unable(err)
		}
	}
	if refused := r.foreign(h); refused != nil {
		return false, refused
	}
	if h.Consumed != nil && h.Kind != pipe.KindConsume && h.Kind != pipe.KindRepeat {
		if err := r.consume(*h.Consumed, punchLeast); err != nil {
			r.logf("%v", err)
		}
	}
	switch h.Kind {
	case pipe.KindCancel:
		return false, r.cancel(pipe.JobRef{Job: h.Job, Attempt: h.Attempt})
	case pipe.KindConsume:
		return false, r.unless(r.consume(*h.Consumed, 0))
	case pipe.KindRepeat:
		return false, r.unless(r.repeat(ctx, *h.Consumed))
	case pipe.KindJob:
		later, refused := r.accept(ctx, l, h, body)
		if !later && refused == nil {
			r.supersede(h.Job, h.Attempt)
		}
		return later, refused
	case pipe.KindAcknowledge:
		if refused := r.acknowledge(pipe.JobRef{Job: h.Job, Attempt: h.Attempt}); refused != nil {
			return false, refused
		}
		r.supersede(h.Job, h.Attempt)
		return false, nil
	default: // take-over, which is done; Parse passes no other
		return false, nil
	}
}

// foreign refuses what somebody else than the owner wrote.
func (r *Runner) foreign(h pipe.Header) *pipe.Refused {
	if h.Owner == r.owner {
		return nil
	}
	return &pipe.Refused{
		Reason:  pipe.ReasonOwner,
		Message: fmt.Sprintf("this VM is owned by %s: use a VM of your own, or take it over on purpose", r.owner),
		OwnedBy: r.owner,
	}
}

// own makes owner the owner of this VM.
func (r *Runner) own(owner string) error {
	if owner == r.owner {
		return nil
	}
	if err := r.spool.setOwner(owner); err != nil {
		return err
	}
	if r.owner == "" {
		r.logf("this VM is now owned by %s", owner)
	} else {
		r.logf("this VM is now owned by %s, no longer by %s", owner, r.owner)
	}
	r.owner = owner
	return nil
}

// accept spools a job, unless it is there. With inputs that takes a while, and
// it reports true.
func (r *Runner) accept(ctx context.Context, l letter, h pipe.Header, body []byte) (bool, *pipe.Refused) {
	ref := pipe.JobRef{Job: h.Job, Attempt: h.Attempt}
	if t, ok := r.spool.tombstone(ref); ok {
		if t.SHA256 == h.SHA256 && t.Inputs == h.Inputs {
			r.removeUpload(h.Inputs)
			return false, nil
		}
		return false, conflict(ref)
	}
	if j := r.jobs[ref]; j != nil {
		if j.SHA256 == h.SHA256 && j.Inputs == h.Inputs {
			r.removeUpload(h.Inputs)
			return false, nil
		}
		return false, conflict(ref)
	}
	rec := record{
		Job: h.Job, Attempt: h.Attempt, Name: h.Name, Timeout: h.Timeout, SHA256: h.SHA256, Inputs: h.Inputs,
	}
	if rec.Inputs != "" {
		return r.fetch(ctx, l, rec, h, body)
	}
	return false, r.add(rec, body, "")
}

// conflict refuses a repeat that is none.
func conflict(ref pipe.JobRef) *pipe.Refused {
	return &pipe.Refused{
		Reason:  pipe.ReasonConflict,
		Message: fmt.Sprintf("attempt %d of job %s was accepted with another script or other inputs: count the attempt up", ref.Attempt, ref.Job),
	}
}

// add spools a job that is new, with the copy of its inputs, if it has any.
func (r *Runner) add(rec record, body []byte, inputs string) *pipe.Refused {
	if len(r.jobs) >= maxJobs {
		return &pipe.Refused{
			Reason:    pipe.ReasonDisk,
			Message:   fmt.Sprintf("%d jobs lie in the VM already: those that are finished make room when they are acknowledged", len(r.jobs)),
			Retryable: true,
		}
	}
	// A job must not live on what is kept for acknowledgements.
	if err := r.spool.room.fill(); err != nil {
		return r.unable(err)
	}
	if r.spool.room.spent {
		return r.unable(fmt.Errorf("spool job %s: %w", folder(rec.ref()), unix.ENOSPC))
	}
	rec.Order, rec.Accepted = r.order+1, time.Now().UTC()
	if err := r.spool.accept(rec, body, inputs); err != nil {
		return r.unable(err)
	}
	r.order++
	r.jobs[rec.ref()] = &job{record: rec}
	return nil
}

// unless refuses what met an error.
func (r *Runner) unless(err error) *pipe.Refused {
	if err == nil {
		return nil
	}
	return r.unable(err)
}

// unable says that a request could not be stored.
func (r *Runner) unable(err error) *pipe.Refused {
	if !full(err) {
		return &pipe.Refused{Reason: pipe.ReasonInternal, Message: err.Error(), Retryable: true}
	}
	free, ferr := r.cfg.free(r.cfg.Data)
	if ferr != nil {
		r.logf("%v", ferr)
	}
	if r.spool.room.spent {
		free = max(0, free-reserveSize) // what was given back is for answers
	}
	return &pipe.Refused{
		Reason: pipe.ReasonDisk,
		Message: fmt.Sprintf("no room on the VM's data disk, %s are free: %v; it is tried again by itself, jobs that end make room, "+
			"and a larger DISK_SIZE counts from the VM's next start", pipe.Size(free), err),
		Retryable: true,
	}
}

// acknowledge forgets a job whose outcome is on record elsewhere.
func (r *Runner) acknowledge(ref pipe.JobRef) *pipe.Refused {
	j := r.jobs[ref]
	if j == nil {
		return nil // done before, or its disk is gone
	}
	if j.outcome == nil {
		return &pipe.Refused{
			Reason:  pipe.ReasonConflict,
			Message: fmt.Sprintf("attempt %d of job %s has not finished", ref.Attempt, ref.Job),
		}
	}
	// The tombstone first: the job must never be unknown.
	if err := r.spool.bury(j.record); err != nil {
		return r.unable(err)
	}
	if err := r.remove(j); err != nil {
		return r.unable(err)
	}
	return nil
}

// supersede forgets the attempts before one that was accepted or
// acknowledged: who wrote that has their outcomes on record, and will never
// ask for them.
func (r *Runner) supersede(id string, attempt int) {
	for ref, j := range r.jobs {
		if ref.Job != id || ref.Attempt >= attempt || j.outcome == nil {
			continue
		}
		if refused := r.acknowledge(ref); refused != nil {
			r.logf("forget attempt %d of job %s: %s", ref.Attempt, ref.Job, refused.Message)
		}
	}
}

// remove forgets a job.
func (r *Runner) remove(j *job) error {
	if err := r.spool.forget(j.ref()); err != nil {
		return err
	}
	delete(r.jobs, j.ref())
	r.sweep()
	return nil
}

// anonymous runs a script that came without a header: each time that it is
// written.
func (r *Runner) anonymous(ctx context.Context, l letter) {
	id, err := anonymousID()
	rec := record{Job: id, Attempt: 1, Name: "anonymous", SHA256: l.digest, Anonymous: true}
	var refused *pipe.Refused
	if err != nil {
		refused = r.unable(err)
	} else {
		refused = r.add(rec, l.data, "")
	}
	h := pipe.Header{Kind: pipe.KindJob, Job: rec.Job, Attempt: rec.Attempt}
	if refused != nil {
		h = pipe.Header{} // its writer doesn't know this name
	}
	r.answer(ctx, h, refused)
}

func anonymousID() (string, error) {
	var b [6]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("name anonymous job: %w", err)
	}
	return "anon-" + hex.EncodeToString(b[:]), nil
}

// stale sets aside a script that was written while no runner watched, or some
// time before: whether it ran nobody knows.
func (r *Runner) stale(l letter) *pipe.Refused {
	where, err := r.spool.setAside(l)
	if err != nil {
		return r.unable(err)
	}
	if err := r.clear(l); err != nil {
		r.logf("%v", err)
	}
	return &pipe.Refused{
		Reason:  pipe.ReasonStale,
		Message: fmt.Sprintf("a script without a header lay in pipe_in when the runner looked: whether it ran before is not known; it is now %s in the VM: write it again to run it", where),
	}
}

// clear puts an empty pipe_in in the place of the one that held l. One that
// was written in the meantime is put back, which the inbox notices.
func (r *Runner) clear(l letter) error {
	f, err := effect.CreateTemp(r.cfg.Pipe, ".pipe_in.*")
	if err != nil {
		return fmt.Errorf("clear pipe_in: %w", err)
	}
	defer f.Close()
	temp := f.Name()
	if err := errors.Join(f.Chown(r.user.uid, r.user.gid), f.Chmod(0o660)); err != nil {
		return errors.Join(fmt.Errorf("clear pipe_in: %w", err), effect.Remove(temp))
	}
	if err := exchange(temp, r.cfg.pipeIn()); err != nil {
		return errors.Join(fmt.Errorf("clear pipe_in: %w", err), effect.Remove(temp))
	}
	data, err := readForeign(temp, pipe.MaxRequest)
	sum := sha256.Sum256(data)
	if err != nil || hex.EncodeToString(sum[:]) != l.digest {
		if err := effect.Rename(temp, r.cfg.pipeIn()); err != nil {
			return fmt.Errorf("clear pipe_in: %w", err)
		}
		return nil
	}
	if err := effect.Remove(temp); err != nil {
		return fmt.Errorf("clear pipe_in: %w", err)
	}
	return nil
}

// answer says whether a request was taken. A header without a kind names no
// request.
func (r *Runner) answer(ctx context.Context, h pipe.Header, refused *pipe.Refused) {
	key := ""
	if h.Kind != "" {
		key = h.Key()
	}
	e := pipe.Event{Type: pipe.TypeAccepted, Job: h.Job, Attempt: h.Attempt, Accepted: &pipe.Accepted{Request: key}}
	if refused != nil {
		refused.Request = key
		e.Type, e.Accepted, e.Refused = pipe.TypeRefused, nil, refused
		r.logf("refused %q: %s: %s", key, refused.Reason, refused.Message)
	}
	err := r.say(e, true)
	if errors.Is(err, errPipeLost) {
		if err = r.mend(ctx); err == nil {
			err = r.say(e, true)
		}
	}
	if err != nil {
		// Its writer writes it again, and is answered then.
		r.logf("answer %q: %v", key, err)
		return
	}
	if j := r.jobs[pipe.JobRef{Job: h.Job, Attempt: h.Attempt}]; j != nil && refused == nil && h.Kind == pipe.KindJob {
		j.told.accepted = true
	}
}
