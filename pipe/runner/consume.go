package runner

import (
	"context"
	"errors"

	"osbuilder/pipe"
)

// punchLeast is how much at once is freed of pipe_out for a request that only
// mentions what was read, in bytes: each time costs two syncs.
const punchLeast = 1 << 20

// consume frees what a reader has stored: the files of older generations, and
// the blocks of this one below its place if they come to least bytes.
func (r *Runner) consume(p pipe.Position, least int64) error {
	if p.Generation == r.out.gen && p.Offset > r.out.size {
		r.logf("nothing is freed: generation %s was read up to %d, it says, and has %d bytes", p.Generation, p.Offset, r.out.size)
		return nil
	}
	known, err := r.out.freeOld(p.Generation)
	if err != nil {
		return err
	}
	if !known {
		if r.out.strange != p.Generation {
			r.out.strange = p.Generation
			r.logf("nothing is freed: generation %s was read up to %d, it says, and is not known here", p.Generation, p.Offset)
		}
		return nil
	}
	if p.Generation != r.out.gen || r.out.noHoles || r.out.torn {
		return nil
	}
	from, to := r.out.freeable(p.Offset)
	if to-max(from, r.out.freed) < max(least, 1) {
		return nil
	}
	// Nothing is freed of a file that is not what was written.
	if err := r.out.intact(); err != nil {
		if errors.Is(err, errPipeLost) {
			return nil // the answer mends it
		}
		return err
	}
	// What the mark says was told has to be in the file, or nobody is told.
	if err := r.out.sync(); err != nil {
		return err
	}
	if err := r.spool.setMark(r.mark(to)); err != nil {
		return err
	}
	return r.out.punch(from, to)
}

// mark is what pipe_out says up to its end.
func (r *Runner) mark(freed int64) mark {
	m := mark{Generation: r.out.gen, Freed: freed, Offset: r.out.size, Seq: r.out.seq}
	for _, j := range r.inOrder() {
		t := j.told
		m.Jobs = append(m.Jobs, markedJob{
			JobRef: j.ref(), Accepted: t.accepted, Started: t.started, Finished: t.finished, Log: t.log, Artifacts: t.artifacts,
		})
	}
	return m
}

// repeat begins a generation that tells all again, once for each place where
// a reader lost the thread.
func (r *Runner) repeat(ctx context.Context, p pipe.Position) error {
	if p == r.spool.repeated() {
		return nil
	}
	switch err := r.out.intact(); {
	case err == nil:
		r.logf("generation %s can't be read on from %d: a new one begins, in which all is told again", p.Generation, p.Offset)
		if err := r.renew(history{gen: r.out.gen, end: r.out.size, size: r.out.size}, true); err != nil {
			return err
		}
	case errors.Is(err, errPipeLost):
		if err := r.mend(ctx); err != nil {
			return err
		}
	default:
		return err
	}
	// Last: a runner that dies before tells it all once more when it is asked
	// again.
	return r.spool.setRepeated(p)
}
