package model

// sidecarSteps are those of the dispatcher's goroutine, and of publishing.
func (m model) sidecarSteps(s state, next func(step, state)) {
	do := func(what, of string, n state) { next(step{who: "sidecar", what: what, of: of}, n) }
	if !s.sidecar.up {
		n := s
		n.sidecar = sidecar{up: true, read: s.saved.read, again: s.saved.again}
		for j := range n.log {
			n.log[j].cut(s.saved.marks[j])
		}
		do("starts, and cuts its logs to the checkpoint", "", n)
		return
	}
	n := s
	c := &n.sidecar
	switch c.doing {
	case idle:
		m.idleSteps(s, do)
	case syncing:
		for j := range n.log {
			n.log[j].synced = n.log[j].n
		}
		c.doing = storing
		if m.without.checkpointFirst {
			c.doing, c.then = c.then, idle
		}
		do("syncs the logs", "", n)
	case storing:
		n.saved.read, n.saved.again = c.read, c.again
		for j := range n.log {
			n.saved.marks[j] = n.log[j].mark
		}
		c.doing, c.then = c.then, idle
		if m.without.checkpointFirst {
			c.doing, c.then = syncing, s.sidecar.then
		}
		n.forget()
		do("stores the checkpoint", "", n)
	case claiming, recordNow:
		r := &n.record[c.job]
		r.stage, r.attempt, r.result = claimed, r.attempt+1, open
		c.doing = idle
		do("records the claim", refOf(int(c.job), r.attempt).String(), n)
	case sendNow:
		n.send(request{kind: job, ref: refOf(int(c.job), s.record[c.job].attempt+1)})
		c.doing = recordNow
		do("begins to send", c.waiting.String(), n)
	case finishing:
		e := c.event
		n.record[e.ref.job()].end(e.status)
		c.doing = idle
		c.dealt()
		do("records the end", e.ref.String(), n)
	case greeting:
		e := c.event
		for j := range n.record {
			r := &n.record[j]
			switch here := e.n&(1<<refOf(j, max(1, r.attempt))) != 0; {
			case r.stage == claimed && here:
				r.stage = running
				do("records that the VM has", refOf(j, r.attempt).String(), n)
				return
			case r.stage == running && !here:
				c.missing[j] = true
			}
		}
		c.dealt()
		c.checkpoint(m, idle)
		do("has dealt with hello", "", n)
	case skipping:
		c.read, c.doing = max(c.read, c.skip), idle
		c.skip = 0
		do("goes on behind what is no event", "", n)
	case asking:
		n.send(request{kind: repeat, from: c.again.from})
		c.doing = idle
		do("begins to send", c.waiting.String(), n)
	}
}

// checkpoint begins one; then comes what is to be done after.
func (c *sidecar) checkpoint(m model, then doing) {
	c.doing, c.then = syncing, then
	if m.without.checkpointFirst {
		c.doing = storing
	}
}

// ask notes that the VM has to tell everything again.
func (c *sidecar) ask(from uint8) {
	c.again = again{wanted: true, from: from}
	c.waiting = request{} // its answer may be among what can't be read
}

// incomplete reports that something before this event is missing, and that the
// VM is going to tell both again: then the event is not for now.
func (c *sidecar) incomplete(j int, in uint8) bool {
	g := &c.gap[j]
	if g.final != 0 && g.final != in || !c.again.wanted && g.asked {
		return false
	}
	g.in = in
	if !c.again.wanted {
		g.asked = true
		c.ask(in)
	}
	return true
}

// repeatsNow takes the answer to the wish.
func (c *sidecar) repeatsNow(in uint8) {
	if !c.again.wanted || in == c.again.from {
		return
	}
	c.again = again{}
	for j := range c.gap {
		if g := &c.gap[j]; g.in == in {
			g.final = in
			if !c.again.wanted {
				c.ask(in)
			}
		}
	}
}

// at and dealt are the beginning and the end of what takes an event several
// steps. Meanwhile a reset may take the event out of pipe_out.
func (c *sidecar) at(e event) { c.event, c.advance = e, true }

func (c *sidecar) dealt() {
	if c.advance {
		c.read++
	}
	c.event, c.advance = event{}, false
}

// end records how an attempt ended, if it is the one of the record.
func (r *record) end(how status) {
	switch {
	case how == interrupted && r.wish:
		r.stage, r.result = collecting, cancelled
	case how == interrupted && r.attempt < attempts:
		r.stage = queued
	default:
		r.stage, r.result = collecting, how
	}
}

func (s *state) send(q request) {
	s.sidecar.waiting, s.sending = q, q
}

// begin writes that an attempt begins, unless it did.
func (l *log) begin(attempt uint8) {
	if attempt <= l.mark.attempt {
		return
	}
	if l.mark.attempt > 0 {
		l.add(begins | line(attempt))
	}
	l.mark.attempt, l.mark.stream = attempt, 0
}

func (l *log) add(text line) {
	if int(l.n) == len(l.text) {
		panic("more lines than the model has room for")
	}
	l.text[l.n] = text
	l.n++
	l.mark.file = l.n
}

// cut makes the log as long as the checkpoint says.
func (l *log) cut(to mark) {
	short := l.n < to.file
	l.mark = to
	l.n = min(l.n, to.file)
	l.synced = min(l.n, l.synced)
	clear(l.text[l.n:])
	l.mark.file = l.n
	if short {
		l.add(lost)
	}
}

func (m model) idleSteps(s state, do func(what, of string, n state)) {
	if s.sidecar.read < s.out.n {
		m.readStep(s, do)
	} else if !s.sidecar.caughtUp {
		m.caughtUp(s, do)
	}
	if s.sidecar.read != s.saved.read || s.sidecar.again != s.saved.again {
		n := s
		n.sidecar.checkpoint(m, idle)
		do("begins a checkpoint", "", n)
	}
	if q := s.sidecar.waiting; q.kind != none && s.unanswerable() {
		n := s
		n.sidecar.waiting = request{}
		do("has waited long enough for the answer", q.String(), n)
	}
	m.sendStep(s, do)
	for j, r := range s.record {
		if r.stage != collecting {
			continue
		}
		n := s
		if r.output == open {
			n.record[j].output = r.result
			do("puts into output/ the outcome", jobNames[j], n)
		} else {
			n.record[j].stage = ended
			n.record[j].acked = r.attempt == 0 || r.acked // without an attempt there is nobody to tell
			do("records as published", jobNames[j], n)
		}
	}
}

// unanswerable: the request that is waited for is nowhere any more, and all was
// read. An impatient sidecar is a fault of its own, and to write again while
// no runner is there changes nothing.
func (s *state) unanswerable() bool {
	q := s.sidecar.waiting
	onItsWay := s.sending == q || s.pipeIn == q && s.notice || s.runner.letter == q || s.sidecar.read < s.out.n
	return s.runner.up && !onItsWay
}

// caughtUp ends the attempts that the VM has not, when all was read that it
// has to say.
func (m model) caughtUp(s state, do func(what, of string, n state)) {
	n := s
	if !s.sidecar.again.wanted {
		for j, missing := range s.sidecar.missing {
			if missing && s.record[j].stage == running {
				n.record[j].end(interrupted)
				n.sidecar.missing[j] = false
				do("records that the VM no longer knows", refOf(j, s.record[j].attempt).String(), n)
				return
			}
		}
	}
	n.sidecar.caughtUp = true
	do("has caught up", "", n)
}

// sendStep is what the dispatcher would write now. It writes one at a time.
func (m model) sendStep(s state, do func(what, of string, n state)) {
	if s.sidecar.waiting.kind != none || s.sending.kind != none {
		return
	}
	send := func(q request) {
		n := s
		n.send(q)
		do("begins to send", q.String(), n)
	}
	if s.sidecar.again.wanted {
		n := s
		n.sidecar.checkpoint(m, asking)
		do("begins a checkpoint, to ask for a repetition", "", n)
		return
	}
	for j, r := range s.record {
		if r.wish && r.stage == running && !s.sidecar.cancelled[j] {
			send(request{kind: cancel, ref: refOf(j, r.attempt)})
			return
		}
	}
	for j, r := range s.record {
		if !r.acked && r.attempt > 0 && (r.stage == ended || m.without.ackEarly && r.stage == collecting) {
			send(request{kind: acknowledge, ref: refOf(j, r.attempt)})
			return
		}
	}
	busy := false
	for j, r := range s.record {
		if r.stage == claimed {
			send(request{kind: job, ref: refOf(j, r.attempt)})
			return
		}
		busy = busy || r.stage == running
	}
	for j, r := range s.record {
		if r.stage != queued || busy {
			continue
		}
		n := s
		n.log[j].begin(r.attempt + 1)
		n.sidecar.job = uint8(j)
		if m.without.sendFirst {
			n.sidecar.checkpoint(m, sendNow)
		} else {
			n.sidecar.checkpoint(m, claiming)
		}
		do("begins in the log", refOf(j, r.attempt+1).String(), n)
		return
	}
}

// nextGeneration returns where the generation after place i begins; 0 if none does.
func (s *state) nextGeneration(i uint8) uint8 {
	for i++; i < s.out.n; i++ {
		if s.out.event[i].kind == hello && s.out.event[i].begins {
			return i
		}
	}
	return 0
}

// readStep takes the next event.
func (m model) readStep(s state, do func(what, of string, n state)) {
	n := s
	c := &n.sidecar
	e := s.out.event[c.read]
	r := &n.record[e.ref.job()]
	ours := e.kind != hello && e.kind != damaged && r.attempt == e.ref.attempt()
	underWay := ours && (r.stage == claimed || r.stage == running)
	if ours && (e.kind != accepted || e.answer == job || e.answer == acknowledge) {
		c.missing[e.ref.job()] = false
	}
	switch e.kind {
	case damaged:
		if c.skip = s.nextGeneration(c.read); c.skip == 0 {
			c.skip = s.out.n
		}
		if !c.again.wanted || c.again.from != e.in {
			c.ask(e.in)
		}
		c.checkpoint(m, skipping)
		do("meets what is no event", "", n)
		return
	case hello:
		c.at(e)
		c.doing = greeting
		do("reads hello", "", n)
		return
	case accepted:
		q := request{kind: e.answer, ref: e.ref}
		if c.waiting == q || q.kind == repeat && c.waiting.kind == repeat {
			c.waiting = request{}
		}
		switch {
		case q.kind == repeat:
			c.repeatsNow(e.in)
		case q.kind == job && ours && r.stage == claimed:
			r.stage = running
		case q.kind == acknowledge && ours && (r.stage == ended || m.without.ackEarly && r.stage == collecting):
			r.acked = true
		case q.kind == cancel && ours:
			c.cancelled[e.ref.job()] = true
		}
		c.read++
		do("reads accepted", q.String(), n)
	case logged:
		c.read++
		l := &n.log[e.ref.job()]
		switch {
		case !underWay:
		case e.n > l.mark.stream && !m.without.takeGaps && c.incomplete(e.ref.job(), e.in):
			do("leaves a line for the repetition", e.ref.String(), n)
			return
		default:
			l.take(e.ref.attempt(), e.n)
		}
		do("reads a line", e.ref.String(), n)
	case finished:
		l := &n.log[e.ref.job()]
		switch {
		case !underWay:
			c.read++
			do("reads finished, which changes nothing", e.ref.String(), n)
			return
		case e.n > l.mark.stream && !m.without.takeGaps && c.incomplete(e.ref.job(), e.in):
			c.read++
			do("leaves finished for the repetition", e.ref.String(), n)
			return
		case e.n > l.mark.stream:
			l.add(lost)
			l.mark.stream = e.n
		}
		c.at(e)
		c.checkpoint(m, finishing)
		do("reads finished", e.ref.String(), n)
	}
}

// take appends a line of an attempt, unless it is there.
func (l *log) take(attempt, at uint8) {
	if attempt < l.mark.attempt {
		return
	}
	l.begin(attempt)
	if at < l.mark.stream {
		return
	}
	if at > l.mark.stream {
		l.add(lost)
	}
	l.add(lineOf(attempt, at))
	l.mark.stream = at + 1
}

// linkSteps are those of what is under way.
func (m model) linkSteps(s state, next func(step, state)) {
	arrive := func(q request, n state) {
		n.pipeIn, n.notice = q, n.runner.up
		next(step{who: "link", what: "renames into place", of: q.String()}, n)
	}
	if s.sending.kind != none {
		n := s
		n.sending = request{}
		arrive(s.sending, n)
	}
	if s.stray.kind != none {
		n := s
		n.stray = request{}
		arrive(s.stray, n)
	}
}
