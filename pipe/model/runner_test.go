package model

// runnerSteps are those of the owner of pipe_out and of the attendants.
func (m model) runnerSteps(s state, next func(step, state)) {
	do := func(what, of string, n state) { next(step{who: "runner", what: what, of: of}, n) }
	if !s.runner.up {
		m.startRunner(s, do)
		return
	}
	m.ownerSteps(s, do)
	for r := range s.attempt {
		m.attend(s, ref(r), do)
	}
}

// startRunner goes on in pipe_out, or begins a generation after a reset.
func (m model) startRunner(s state, do func(what, of string, n state)) {
	n := s
	n.runner = runner{up: true}
	for r := range n.attempt {
		n.attempt[r].adopt(m.without.adoptUnsynced)
	}
	n.notice = n.pipeIn.kind != none && n.pipeIn != n.seen
	switch {
	case s.out.spoilt: // what it says is not to be built on
		n.generation(true)
		do("starts, finds that others changed pipe_out, and begins a generation", "", n)
		return
	case s.runner.reset:
		n.generation(false)
		do("starts in a VM that was reset, and begins a generation", "", n)
		return
	}
	n.out.add(event{kind: hello, n: n.known()})
	n.runner.unsync = true
	do("starts, and says hello", "", n)
}

// adopt takes what an earlier runner left, and syncs it.
func (a *attempt) adopt(unsynced bool) {
	for _, f := range a.files() {
		switch {
		case *f != cached:
		case unsynced:
			*f = adopted
		default:
			*f = synced
		}
	}
}

func (a *attempt) files() [6]*on {
	return [6]*on{&a.spool, &a.ran, &a.result, &a.outcome, &a.tomb, &a.wish}
}

// known says which attempts are not acknowledged.
func (s *state) known() (all uint8) {
	for r, a := range s.attempt {
		if a.spool != absent {
			all |= 1 << r
		}
	}
	return all
}

// generation begins one, in which everything is told again: output from where
// the one before leaves off, or all of it.
func (s *state) generation(all bool) {
	for r := range s.attempt {
		a := &s.attempt[r]
		a.base = max(a.base, a.toldLines)
		if all {
			a.base = 0
		}
		a.toldAccepted, a.toldFinished, a.toldLines = false, false, a.base
	}
	s.out.changed, s.out.spoilt = false, false
	s.out.gen++
	s.out.add(event{kind: hello, n: s.known(), begins: true})
	s.out.synced = s.out.n
	s.forget()
}

// ownerSteps: it syncs what it said, deals with a letter, or says something.
func (m model) ownerSteps(s state, do func(what, of string, n state)) {
	n := s
	switch {
	case s.runner.unsync:
		n.runner.unsync = false
		n.out.synced = n.out.n
		n.forget()
		do("syncs pipe_out", "", n)
		return
	case s.out.changed:
		n.generation(true)
		do("finds that others changed pipe_out, and begins a generation", "", n)
		return
	case s.runner.letter.kind != none:
		m.letterStep(s, do)
		return
	}
	for r, a := range s.attempt { // what a new generation lacks
		if a.spool != absent && !a.toldAccepted {
			n.attempt[r].toldAccepted = true
			n.out.add(event{kind: accepted, ref: ref(r), answer: job})
			n.runner.unsync = true
			do("says again: accepted", ref(r).String(), n)
			return
		}
	}
	if s.notice {
		n := s
		n.notice, n.runner.letter, n.runner.at = false, s.pipeIn, 0
		do("reads", s.pipeIn.String(), n)
	}
	for r, a := range s.attempt {
		n := s
		b := &n.attempt[r]
		switch {
		case a.spool == absent || a.ran == absent && a.outcome == absent:
		case a.toldLines < a.lines:
			n.out.add(event{kind: logged, ref: ref(r), n: a.toldLines})
			b.toldLines++
			do("tells a line", ref(r).String(), n)
		case (a.outcome == synced || a.outcome == adopted) && !a.toldFinished:
			b.toldLines = max(b.toldLines, a.length)
			b.toldFinished, b.said = true, a.status
			n.out.add(event{kind: finished, ref: ref(r), status: a.status, n: a.length})
			n.runner.unsync = true
			do("says finished", ref(r).String(), n)
		}
	}
}

// Steps of a letter.
const (
	spooling uint8 = iota
	spooled
	burying
	answering
	noting
	repeating
)

// letterStep obeys a request, answers it and notes it as seen.
func (m model) letterStep(s state, do func(what, of string, n state)) {
	n := s
	q, at := s.runner.letter, &n.runner.at
	a := &n.attempt[q.ref]
	switch *at {
	case spooling:
		m.obey(s, do)
	case spooled:
		a.spool = synced
		*at = burying
		do("syncs the spool", q.ref.String(), n)
	case burying:
		victim, found := s.victim(q)
		if !found {
			*at = answering
			m.letterStep(n, do)
			return
		}
		v := &n.attempt[victim]
		switch {
		case m.without.noTombstone || v.tomb == synced:
			// Out of sight, and last of all the record.
			*v = attempt{tomb: v.tomb, starts: v.starts, said: v.said}
			do("forgets", victim.String(), n)
		case v.tomb == cached:
			v.tomb = synced
			do("syncs the tombstone", victim.String(), n)
		default:
			v.tomb = cached
			do("writes a tombstone", victim.String(), n)
		}
	case answering:
		if q.kind == job && a.spool != absent {
			a.toldAccepted = true
		}
		n.out.add(event{kind: accepted, ref: q.ref, answer: q.kind})
		n.runner.unsync = true
		*at = noting
		if m.without.acceptUnsynced && a.spool == cached {
			*at = spooled
		}
		do("says accepted", q.String(), n)
	case repeating:
		n.repeated = q.from
		*at = answering
		do("notes what it told again", "", n)
	case noting:
		n.seen = q
		n.runner.letter, n.runner.at = request{}, 0
		do("notes as seen", q.String(), n)
	}
}

// obey is the first step of a letter.
func (m model) obey(s state, do func(what, of string, n state)) {
	n := s
	q, at := s.runner.letter, &n.runner.at
	a := &n.attempt[q.ref]
	switch {
	case q.kind == job && a.tomb == absent && a.spool == absent:
		a.spool = cached
		*at = spooled
		if m.without.acceptUnsynced {
			*at = answering
		}
		do("puts into the spool", q.ref.String(), n)
		return
	case q.kind == job, q.kind == acknowledge:
		*at = burying
	case q.kind == cancel && a.spool != absent && a.outcome == absent && a.wish != synced:
		a.wish++ // to cached
		if a.wish != cached {
			a.wish = synced
		}
		do("writes down the wish to cancel", q.ref.String(), n)
		return
	case q.kind == repeat && s.repeated != q.from:
		n.generation(!m.without.repeatRest)
		*at = repeating
		do("begins a generation, because it was asked to", "", n)
		return
	default:
		*at = answering
	}
	m.letterStep(n, do)
}

// victim is the next attempt to be forgotten because of a request: the one
// that is acknowledged, and ended ones before it.
func (s *state) victim(q request) (ref, bool) {
	for attempt := uint8(1); attempt <= q.ref.attempt(); attempt++ {
		r := refOf(q.ref.job(), attempt)
		a := s.attempt[r]
		if a.spool != absent && a.outcome != absent && (r != q.ref || q.kind == acknowledge) {
			return r, true
		}
	}
	return 0, false
}

// attend sees an attempt through.
func (m model) attend(s state, r ref, do func(what, of string, n state)) {
	a, n := s.attempt[r], s
	b := &n.attempt[r]
	if a.spool == absent || s.runner.letter == (request{kind: job, ref: r}) {
		return // not there, or not yet handed on
	}
	switch {
	case a.outcome == cached:
		b.outcome = synced
		do("syncs the outcome", r.String(), n)
	case a.outcome != absent:
	case a.ran == absent && !a.starting:
		if a.wish != absent {
			b.outcome, b.status = cached, cancelled
			do("writes the outcome cancelled", r.String(), n)
		} else if s.freeSlot(r) {
			b.starting = true
			if m.without.markLate {
				b.unit, b.starts = runs, b.starts+1
				do("starts the unit", r.String(), n)
			} else {
				b.ran = cached
				do("marks as started", r.String(), n)
			}
		}
	case a.starting && a.ran == absent: // markLate
		b.ran = cached
		do("marks as started", r.String(), n)
	case a.starting && a.ran == cached:
		b.ran = synced
		b.starting = !m.without.markLate
		do("syncs the marker", r.String(), n)
	case a.starting:
		b.starting, b.unit, b.starts = false, runs, b.starts+1
		do("starts the unit", r.String(), n)
	case a.unit == runs && a.wish != absent:
		b.unit, b.how = stopping, terminated
		do("ends the unit", r.String(), n)
	case a.result != absent && (a.unit == gone || a.old), a.old, a.unit == noUnit:
		m.settle(s, r, do)
	}
}

func (s *state) freeSlot(r ref) bool {
	for o, a := range s.attempt {
		busy := a.spool != absent && (a.starting || a.ran != absent) && a.outcome != synced && a.outcome != adopted
		if busy && ref(o) != r {
			return false
		}
	}
	return true
}

// settle syncs the output, has it told, and records the outcome.
func (m model) settle(s state, r ref, do func(what, of string, n state)) {
	a, n := s.attempt[r], s
	b := &n.attempt[r]
	if a.safe < a.lines {
		b.safe = a.lines
		do("syncs the output", r.String(), n)
		return
	}
	if a.toldLines < a.lines || !a.toldAccepted {
		return
	}
	switch {
	case a.result == absent:
		b.status = interrupted
	case a.how == terminated:
		b.status = cancelled
	default:
		b.status = a.how
	}
	b.outcome, b.length = cached, max(a.lines, a.toldLines)
	do("writes the outcome "+statusNames[b.status], r.String(), n)
}

var statusNames = [...]string{"open", "succeeded", "interrupted", "cancelled", "terminated"}

// unitSteps are those of the jobs and their stop hooks, which nobody but the
// VM can end.
func (m model) unitSteps(s state, next func(step, state)) {
	for i, a := range s.attempt {
		r, n := ref(i), s
		b := &n.attempt[r]
		do := func(what string) { next(step{who: "unit", what: what, of: r.String()}, n) }
		switch {
		case a.unit == runs && a.lines < m.lines[r.job()]:
			b.lines++
			do("writes a line")
		case a.unit == runs:
			b.unit, b.how = stopping, succeeded
			do("ends")
		case a.unit == stopping:
			b.unit = hooked
			if m.without.hookUnsynced {
				do("has its hook begin")
			} else {
				b.safe = a.lines
				do("has its hook sync the output")
			}
		case a.unit == hooked:
			b.unit, b.result = writing, cached
			do("has its hook write the result")
		case a.unit == writing:
			b.unit, b.result = gone, synced
			do("has its hook sync the result")
		}
	}
}
