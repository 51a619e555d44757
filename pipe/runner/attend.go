package runner

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// An attendant sees one job through: it starts its unit, follows its output,
// collects its files and records its outcome. All that it knows is on disk,
// so the attendant of the next runner goes on where this one was killed. The
// fields don't change.
type attendant struct {
	r    *Runner
	job  *job // to name it to the owner; nothing in it is read here but record
	rec  record
	path paths
	slot int
	ran  *marker
	told int64 // where the output goes on
	// limit is where the output ends, whatever the file holds.
	limit int64
}

// attendant is made by the owner.
func (r *Runner) attendant(j *job, slot int) *attendant {
	limit := r.cfg.MaxOutput
	if j.outcome != nil {
		limit = j.outcome.Finished.LogLength
	}
	return &attendant{
		r: r, job: j, rec: j.record, path: r.cfg.paths(j.ref()), slot: slot, ran: j.ran, told: j.told.log, limit: limit,
	}
}

// Bounds of what an attendant waits for.
const (
	// aliveEvery is how often a unit that says nothing is looked after. Its
	// end is noticed by itself; this is for one that died without a result.
	aliveEvery = 5 * time.Second
	// leaveWithin is how long a unit may take to be gone after its result,
	// beyond the grace, after which what is left is killed.
	leaveWithin = 10 * time.Second
	// enforceEvery is how often a unit that should be gone is looked at.
	enforceEvery = 2 * time.Second
	// killWithin is how long processes that were killed may take.
	killWithin = 10 * time.Second
)

// run brings the job from where it stands to its outcome.
func (a *attendant) run(ctx context.Context) error {
	if a.ran == nil {
		err := a.start(ctx)
		if errors.Is(err, errDismissed) {
			return a.settle(ctx, neverRan)
		}
		var failed *startError
		if errors.As(err, &failed) {
			return a.settle(ctx, outcome{Finished: pipe.Finished{
				Status: pipe.StatusInterrupted, Reason: failed.Error(),
			}})
		}
		if err != nil {
			return err
		}
	}
	result, ok, err := a.follow(ctx)
	if err != nil {
		return err
	}
	noted := ok
	if !ok {
		result, ok, err = a.remembered(ctx)
		if err != nil {
			return err
		}
	}
	if !ok {
		return a.lost(ctx)
	}
	o := outcome{Started: true, Finished: result.finished(*a.ran, a.timeout()), diskFull: result.DiskFull}
	if !noted && o.Finished.Status == pipe.StatusFailed && o.Finished.Reason == "" {
		// What stopped the hook may have stopped the job, and kept its own words out of its log.
		o.Finished.Reason = "as it ended nothing could be written down: there was no space left on the VM's data disk, or the VM was too busy; " +
			"the end of its output may be missing"
	}
	if err := a.bounded(&o.Finished); err != nil {
		return err
	}
	a.cancelled(&o.Finished, &result)
	if err := a.empty(ctx); err != nil {
		return err
	}
	if err := a.lock(); err != nil {
		return err
	}
	if o.Finished.Status == pipe.StatusSucceeded {
		c := collector{cfg: a.r.cfg, disk: a.r.spool.disk, path: a.path, builder: a.r.user}
		if c.maker, err = a.r.cfg.slotUser(a.ran.Slot); err != nil {
			return err
		}
		o.Artifacts, err = c.collect(ctx)
		var refused *refusal
		switch {
		case errors.As(err, &refused):
			o.Artifacts = nil
			o.Finished.Status, o.Finished.Reason = pipe.StatusFailed, refused.Error()
		case err != nil:
			return err
		}
	}
	if err := a.settle(ctx, o); err != nil {
		return err // systemd is asked again
	}
	if result.ServiceResult != "success" && a.ran.Boot == a.r.cfg.Boot {
		a.forget(ctx)
	}
	return nil
}

// bounded makes f a failure if the output is longer than it may be. What is
// beyond that is never told.
func (a *attendant) bounded(f *pipe.Finished) error {
	t, err := openTail(a)
	if err != nil {
		return err
	}
	defer t.close()
	over, err := t.excess()
	if err != nil {
		return err
	}
	if over {
		f.Status = pipe.StatusFailed
		f.Reason = fmt.Sprintf("it was killed because it wrote more than %d bytes of output: write less, or to a file in $OUT", a.r.cfg.MaxOutput)
	}
	return nil
}

// lost ends a job that left no result.
func (a *attendant) lost(ctx context.Context) error {
	o := outcome{Started: true, Finished: pipe.Finished{
		Status: pipe.StatusInterrupted,
		Reason: "it left no result: its unit died, or the runner did as it started it",
	}}
	switch {
	case a.ran.Slot < 1:
		o.Finished.Reason = "the runner or the VM stopped as it was about to be started"
	case a.ran.Boot != a.r.cfg.Boot:
		if err := dropZeros(a.path.log(), a.told); err != nil {
			return err
		}
		o.Finished.Reason = "the VM stopped while it ran; the end of its output may be missing"
	}
	if err := a.bounded(&o.Finished); err != nil {
		return err
	}
	a.cancelled(&o.Finished, nil)
	return a.settle(ctx, o)
}

// startError: the unit could not be started, and nothing of it runs.
type startError struct{ err error }

func (e *startError) Error() string { return fmt.Sprintf("it could not be started: %v", e.err) }
func (e *startError) Unwrap() error { return e.err }

// errDismissed: the job was cancelled before its marker was made.
var errDismissed = errors.New("cancelled before it ran")

// start makes the job's folder, says on disk that it is started, and starts
// it.
func (a *attendant) start(ctx context.Context) error {
	user, err := a.r.cfg.slotUser(a.slot)
	if err != nil {
		return err
	}
	if err := a.prepare(user); err != nil {
		return err
	}
	now, err := uptime()
	if err != nil {
		return err
	}
	m := marker{Boot: a.r.cfg.Boot, Slot: a.slot, User: user.name, Uptime: now, Memory: a.r.cfg.Memory}
	data, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("start job: %w", err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if exists(a.path.cancel()) {
		return errDismissed
	}
	err = a.r.spool.disk.mark(a.path.ran(), data)
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	a.ran = &m
	// From here on it is started even if the runner is to stop: a marker
	// without a unit would count as an interruption.
	alive := false
	var unknown error
	if err == nil {
		err = a.r.cfg.Units.Start(ctx, a.spec())
		alive = err == nil
		if err != nil {
			alive, unknown = a.r.cfg.Units.Alive(ctx, a.spec())
		}
	}
	if cerr := a.r.call(ctx, func() error { return a.begun(&m, alive) }); cerr != nil {
		return cerr
	}
	if unknown != nil {
		// It may yet start. With its marker it is taken up again, and asked after until there is an answer.
		return fmt.Errorf("whether the job was started is not known: %w", errors.Join(err, unknown))
	}
	if !alive {
		return &startError{err}
	}
	return nil
}

// begun is the owner's part of start.
func (a *attendant) begun(m *marker, alive bool) error {
	a.job.ran, a.job.started = m, alive
	if err := a.r.tell(a.job); err != nil {
		a.r.later() // it is said before the output, or at the end
	}
	return nil
}

// prepare makes the job's own folder. What is there is from an attempt to
// prepare it that did not come to the marker.
func (a *attendant) prepare(user account) error {
	if err := effect.RemoveAll(a.path.own); err != nil {
		return fmt.Errorf("prepare job: %w", err)
	}
	body, err := readBounded(a.path.body(), pipe.MaxRequest)
	if err != nil {
		return fmt.Errorf("prepare job: %w", err)
	}
	if err := makeDir(a.path.own, self(), self().gid, 0o700); err != nil {
		return err
	}
	for path, mode := range map[string]fs.FileMode{
		a.path.work(): 0o755,
		a.path.out():  0o755,
		a.path.home(): 0o700,
		a.path.temp(): 0o777 | fs.ModeSticky, // it becomes /tmp
	} {
		if err := makeDir(path, user, user.gid, mode); err != nil {
			return err
		}
	}
	if err := a.r.spool.disk.writeNew(a.path.script(), body, 0o444); err != nil {
		return err
	}
	if err := effect.Chmod(a.path.script(), 0o444); err != nil { // whatever the umask is
		return fmt.Errorf("prepare job: %w", err)
	}
	if a.rec.Inputs != "" {
		if err := effect.Link(a.path.inputs(), a.path.ownInputs()); err != nil {
			return fmt.Errorf("prepare job: %w", err)
		}
	}
	if err := effect.Chown(a.path.own, user.uid, user.gid); err != nil {
		return fmt.Errorf("prepare job: %w", err)
	}
	return nil
}

func (a *attendant) timeout() time.Duration {
	// A century is as good as none, and doesn't overflow.
	return time.Duration(min(a.rec.Timeout, 100*365*24*3600)) * time.Second
}

// spec describes the job's unit.
func (a *attendant) spec() Spec {
	cfg := a.r.cfg
	user := a.ran.User
	env := []string{
		"JOB_ID=" + a.rec.Job,
		"JOB_NAME=" + printable(a.rec.Name),
		"JOB_ATTEMPT=" + strconv.Itoa(a.rec.Attempt),
		"OUT=" + a.path.out(),
		"REPORT=" + a.path.report(),
		"HOME=" + a.path.home(),
		"TMPDIR=" + a.path.temp(),
		"SHELL=" + shell(),
		"NIX_REMOTE=daemon",
		"LANG=C.UTF-8",
		"PATH=" + cfg.Path,
	}
	if a.rec.Inputs != "" {
		env = append(env, "INPUTS="+a.path.ownInputs())
	}
	if user != "" {
		env = append(env, "USER="+user, "LOGNAME="+user)
	}
	return Spec{
		Unit:    unitName(a.rec.ref()),
		User:    user,
		Script:  a.path.script(),
		Dir:     a.path.own,
		Work:    a.path.work(),
		Temp:    a.path.temp(),
		Hidden:  []string{cfg.Pipe, filepath.Join(cfg.Data, filepath.Base(cfg.Pipe)), cfg.spool(), cfg.artifactsDir()},
		Log:     a.path.log(),
		Ran:     a.path.ran(),
		Result:  a.path.result(),
		Timeout: a.timeout(),
		Grace:   cfg.Grace,
		Memory:  a.ran.Memory,
		Env:     env,
	}
}

// printable makes a name fit for an environment that allows no control
// characters.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
}

// follow tells the output until the unit's result is there. Without one, and
// without processes, it reports false: the job was interrupted.
func (a *attendant) follow(ctx context.Context) (Result, bool, error) {
	if a.ran.Slot < 1 {
		return Result{}, false, nil // its marker was cut
	}
	if a.ran.Boot != a.r.cfg.Boot {
		return a.result() // nothing outlives its boot
	}
	w, err := newWatcher(ctx)
	if err != nil {
		return Result{}, false, err
	}
	defer w.close()
	if _, err := w.add(a.path.log(), unix.IN_MODIFY); err != nil {
		return Result{}, false, err
	}
	if _, err := w.add(a.path.spool, unix.IN_MOVED_TO|unix.IN_ONLYDIR); err != nil {
		return Result{}, false, err
	}
	t, err := openTail(a)
	if err != nil {
		return Result{}, false, err
	}
	defer t.close()
	looked, stopped, killed := time.Time{}, false, false
	due, err := a.due()
	if err != nil {
		return Result{}, false, err
	}
	for {
		if result, ok, err := a.result(); ok || err != nil {
			return result, ok, err
		}
		// The wish appears in the folder that is watched.
		if !stopped && exists(a.path.cancel()) {
			if err := a.r.cfg.Units.Stop(ctx, a.spec()); err != nil {
				return Result{}, false, err
			}
			stopped = true
			if end := time.Now().Add(a.r.cfg.Grace); due.IsZero() || end.Before(due) {
				due = end
			}
		}
		if !due.IsZero() && time.Now().After(due) {
			if err := a.r.cfg.Units.Enforce(ctx, a.spec()); err != nil {
				return Result{}, false, err
			}
			due = time.Now().Add(enforceEvery)
		}
		if over, err := t.excess(); err != nil {
			return Result{}, false, err
		} else if over && !killed {
			// Without a grace, in which it would write on.
			if err := a.r.cfg.Units.Kill(ctx, a.spec()); err != nil {
				return Result{}, false, err
			}
			killed = true
		}
		if time.Since(looked) >= aliveEvery {
			looked = time.Now()
			alive, err := a.r.cfg.Units.Alive(ctx, a.spec())
			if err != nil {
				return Result{}, false, err
			}
			if !alive {
				return a.result() // its hook may have come between the two looks
			}
			if err := a.r.call(ctx, func() error { return a.begun(a.ran, true) }); err != nil {
				return Result{}, false, err
			}
		}
		state, err := t.pump(ctx, false)
		if err != nil {
			return Result{}, false, err
		}
		if state == moreLeft {
			continue
		}
		wait := aliveEvery
		if state == lineHeld {
			wait = partialAfter
		}
		if !due.IsZero() {
			wait = min(wait, max(time.Until(due), batch))
		}
		notices, err := w.read(wait)
		if err != nil {
			if ctx.Err() != nil {
				err = context.Cause(ctx)
			}
			return Result{}, false, err
		}
		// What was written meanwhile is one wake-up, not one for each line.
		if !urgent(notices) && !pause(ctx, batch) {
			return Result{}, false, context.Cause(ctx)
		}
	}
}

// due is when a job that has a time limit is gone at the latest, or is made
// to be; zero for others.
func (a *attendant) due() (time.Time, error) {
	if a.timeout() == 0 {
		return time.Time{}, nil
	}
	now, err := uptime()
	if err != nil {
		return time.Time{}, err
	}
	return time.Now().Add(time.Duration(a.ran.Uptime-now) + a.timeout() + a.r.cfg.Grace), nil
}

// urgent reports whether the stop hook's file, or the wish that the job end,
// is among what was noticed.
func urgent(notices []notice) bool {
	return slices.ContainsFunc(notices, func(n notice) bool { return n.name == resultName || n.name == cancelName })
}

// result reads what the stop hook left. One that makes no sense is none.
func (a *attendant) result() (Result, bool, error) {
	data, err := readBounded(a.path.result(), maxResult)
	if errors.Is(err, fs.ErrNotExist) {
		return Result{}, false, nil
	}
	if err != nil {
		return Result{}, false, fmt.Errorf("read result: %w", err)
	}
	result, err := parseResult(data)
	return result, err == nil, nil
}

// remembered is the result of a unit whose stop hook could not leave it.
func (a *attendant) remembered(ctx context.Context) (Result, bool, error) {
	if a.ran.Slot < 1 || a.ran.Boot != a.r.cfg.Boot {
		return Result{}, false, nil // its marker was cut, or it died with the VM
	}
	r, ok, err := a.r.cfg.Units.Remembered(ctx, a.spec())
	if err != nil || !ok {
		return Result{}, false, err
	}
	a.r.logf("job %s: its stop hook left no result; systemd remembers %s (%s %s)", folder(a.rec.ref()), r.ServiceResult, r.ExitCode, r.ExitStatus)
	// What the hook would have done first.
	return r, true, syncFileSystem(a.path.spool)
}

// forget gives up what systemd kept of a unit that failed. If that doesn't
// work, it is forgotten at the VM's next boot.
func (a *attendant) forget(ctx context.Context) {
	if err := a.r.cfg.Units.Forget(ctx, a.spec()); err != nil {
		a.r.logf("job %s: %v", folder(a.rec.ref()), err)
	}
}

// empty waits until no process of the job is left, and ends those that stay.
func (a *attendant) empty(ctx context.Context) error {
	if a.ran.Boot != a.r.cfg.Boot {
		return nil
	}
	within := max(a.r.cfg.Grace, hookWithin) + leaveWithin
	gone, err := a.gone(ctx, within)
	if gone || err != nil {
		return err
	}
	a.r.logf("job %s: processes are left %s after its end: they are killed", folder(a.rec.ref()), within)
	if err := a.r.cfg.Units.Kill(ctx, a.spec()); err != nil {
		return err
	}
	gone, err = a.gone(ctx, killWithin)
	if err == nil && !gone {
		err = fmt.Errorf("processes of %s live %s after SIGKILL: look at the VM's kernel log", unitName(a.rec.ref()), killWithin)
	}
	return err
}

func (a *attendant) gone(ctx context.Context, within time.Duration) (bool, error) {
	for deadline, wait := time.Now().Add(within), 10*time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		alive, err := a.r.cfg.Units.Alive(ctx, a.spec())
		if err != nil || !alive {
			return !alive, err
		}
		if time.Now().After(deadline) {
			return false, nil
		}
		if !pause(ctx, wait) {
			return false, context.Cause(ctx)
		}
	}
}

// lock takes the job's folder from the slot's user: its next job must not
// find it.
func (a *attendant) lock() error {
	err := errors.Join(effect.Chown(a.path.own, self().uid, self().gid), effect.Chmod(a.path.own, 0o700))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("lock the job's folder: %w", err)
	}
	return nil
}

// settle tells the rest of the output, records the outcome and has it told.
func (a *attendant) settle(ctx context.Context, o outcome) error {
	if err := a.lock(); err != nil {
		return err
	}
	if a.ran != nil {
		var err error
		if o.Finished.Report, err = a.report(); err != nil {
			a.r.logf("job %s: its report is dropped: %v", folder(a.rec.ref()), err)
			// It would have told why.
			if o.Finished.Status == pipe.StatusFailed && o.Finished.Reason == "" {
				o.Finished.Reason = fmt.Sprintf("its report is dropped: %v", err)
			}
		}
	}
	// A report tells more, and one that tells of a full disk has what to do.
	if o.diskFull && o.Finished.Status == pipe.StatusFailed && o.Finished.Reason == "" && o.Finished.Report == nil {
		o.Finished.Reason = "it may have failed because there was no space left on the VM's data disk as it ended; the end of its output may be missing"
	}
	length, err := a.drain(ctx)
	if err != nil {
		return err
	}
	o.Finished.LogLength, o.Finished.Artifacts = length, len(o.Artifacts)
	if err := a.r.spool.settle(a.rec.ref(), o); err != nil {
		return err
	}
	return a.r.call(ctx, func() error {
		a.job.outcome, a.job.started = &o, o.Started
		// If it can't be told now, takeUp tells it later.
		if err := a.r.tell(a.job); err != nil {
			a.r.logf("job %s: %v", folder(a.rec.ref()), err)
			a.r.later()
		}
		return nil
	})
}

// drain tells all output that is left, and returns its length.
func (a *attendant) drain(ctx context.Context) (int64, error) {
	t, err := openTail(a)
	if err != nil {
		return 0, err
	}
	defer t.close()
	if err := t.file.Sync(); err != nil {
		return 0, fmt.Errorf("sync output: %w", err)
	}
	for {
		state, err := t.pump(ctx, true)
		if err != nil {
			return 0, err
		}
		if state == allTold {
			return t.offset, nil
		}
	}
}

// replay repeats the output of a job whose outcome is on record.
func (a *attendant) replay(ctx context.Context) error {
	length, err := a.drain(ctx)
	if err != nil {
		return err
	}
	return a.r.call(ctx, func() error {
		if a.job.told.log < length {
			return nil // a new generation began meanwhile, and wants it all
		}
		// A crash may have cut the log below what the outcome says.
		a.job.told.log = max(a.job.told.log, a.job.outcome.Finished.LogLength)
		return a.r.tell(a.job)
	})
}
