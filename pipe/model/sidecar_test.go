package model

// sidecarSteps are those of the dispatcher's goroutine, and of publishing.
func (m model) sidecarSteps(s state, next func(step, state)) {
	do := func(what, of string, n state) { next(step{who: "sidecar", what: what, of: of}, n) }
	if !s.sidecar.up {
		n := s
		n.sidecar = sidecar{up: true, read: s.saved.read}
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
		n.saved.read = c.read
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
		n.send(request{job, refOf(int(c.job), s.record[c.job].attempt+1)})
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
		for j, r := range s.record {
			if r.stage == running && e.n&(1<<refOf(j, r.attempt)) == 0 {
				n.record[j].end(interrupted)
				do("records that the VM no longer knows", refOf(j, r.attempt).String(), n)
				return
			}
		}
		c.dealt()
		c.doing, c.then = syncing, idle
		if m.without.checkpointFirst {
			c.doing = storing
		}
		do("has dealt with hello", "", n)
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
	}
	if s.sidecar.read != s.saved.read {
		n := s
		n.sidecar.doing, n.sidecar.then = syncing, idle
		if m.without.checkpointFirst {
			n.sidecar.doing = storing
		}
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

// unanswerable: the request that is waited for is nowhere any more, and no
// answer to it is under way. An impatient sidecar is a fault of its own.
func (s *state) unanswerable() bool {
	q := s.sidecar.waiting
	if !s.runner.up || s.sending == q || s.pipeIn == q && s.notice || s.runner.letter == q {
		return false // writing again while no runner is there changes nothing
	}
	for _, e := range s.out.event[s.sidecar.read:s.out.n] {
		if e.kind == damaged && s.lostPlace() && q.kind != repeat {
			return true // it may be there, and is not read
		}
		if e.kind == accepted && e.ref == q.ref && e.answer == q.kind {
			return false
		}
	}
	return true
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
	if s.lostPlace() {
		send(request{kind: repeat})
		return
	}
	for j, r := range s.record {
		if r.wish && r.stage == running && !s.sidecar.cancelled[j] {
			send(request{cancel, refOf(j, r.attempt)})
			return
		}
	}
	for j, r := range s.record {
		if !r.acked && r.attempt > 0 && (r.stage == ended || m.without.ackEarly && r.stage == collecting) {
			send(request{acknowledge, refOf(j, r.attempt)})
			return
		}
	}
	busy := false
	for j, r := range s.record {
		if r.stage == claimed {
			send(request{job, refOf(j, r.attempt)})
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
		n.sidecar.doing, n.sidecar.then, n.sidecar.job = syncing, claiming, uint8(j)
		if m.without.checkpointFirst {
			n.sidecar.doing = storing
		}
		if m.without.sendFirst {
			n.sidecar.then = sendNow
		}
		do("begins in the log", refOf(j, r.attempt+1).String(), n)
		return
	}
}

// lostPlace: what comes next is no event, and no later generation is there.
func (s *state) lostPlace() bool {
	at := s.sidecar.read
	return at < s.out.n && s.out.event[at].kind == damaged && s.nextGeneration() == 0
}

// nextGeneration returns where the generation after the reader's place begins; 0 if none does.
func (s *state) nextGeneration() uint8 {
	for i := s.sidecar.read + 1; i < s.out.n; i++ {
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
	ours := e.kind != hello && r.attempt == e.ref.attempt()
	switch e.kind {
	case damaged:
		if next := s.nextGeneration(); next > 0 {
			c.read = next
			do("passes over what is no event, to the next generation", "", n)
		}
		return
	case hello:
		c.at(e)
		c.doing = greeting
		do("reads hello", "", n)
		return
	case accepted:
		q := request{e.answer, e.ref}
		if c.waiting == q {
			c.waiting = request{}
		}
		switch {
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
		if l := &n.log[e.ref.job()]; ours && (r.stage == claimed || r.stage == running) {
			l.take(e.ref.attempt(), e.n)
		}
		c.read++
		do("reads a line", e.ref.String(), n)
	case finished:
		if !ours || r.stage != claimed && r.stage != running {
			c.read++
			do("reads finished, which changes nothing", e.ref.String(), n)
			return
		}
		if l := &n.log[e.ref.job()]; e.n > l.mark.stream {
			l.add(lost)
			l.mark.stream = e.n
		}
		c.at(e)
		c.doing, c.then = syncing, finishing
		if m.without.checkpointFirst {
			c.doing = storing
		}
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
