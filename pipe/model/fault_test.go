package model

// faultSteps are all that may go wrong, as often as is left.
func (m model) faultSteps(s state, next func(step, state)) {
	if s.left.all == 0 {
		return
	}
	fault := func(left *uint8, n state, who, what, of string) {
		*left--
		n.left = s.left
		n.left.all--
		*left++
		next(step{who: who, what: what, of: of, fault: true}, n)
	}
	// What is on its way when a link goes may be lost, or arrive later.
	unlinked := func(n state, then func(n state, what string)) {
		n.sidecar.waiting = request{}
		if n.sending.kind == none {
			then(n, "")
			return
		}
		q := n.sending
		n.sending = request{}
		then(n, "; lost on the way: "+q.String())
		if n.stray.kind == none {
			n.stray = q
			then(n, "; still on the way: "+q.String())
		}
	}
	if s.left.killSidecar > 0 && s.sidecar.up {
		n := s
		n.sidecar = sidecar{}
		unlinked(n, func(n state, what string) { fault(&s.left.killSidecar, n, "fault", "the sidecar is killed"+what, "") })
	}
	if s.left.power > 0 {
		n := s
		n.sidecar = sidecar{}
		unlinked(n, func(n state, what string) {
			n.shorten(0, func(n state) {
				fault(&s.left.power, n, "fault", "the sidecar's machine loses its power"+what, "")
			})
		})
	}
	if s.left.cut > 0 && s.sidecar.up && (s.sending.kind != none || s.sidecar.waiting.kind != none) {
		unlinked(s, func(n state, what string) { fault(&s.left.cut, n, "fault", "the link is cut"+what, "") })
	}
	if s.left.early > 0 && s.sidecar.up && s.sidecar.doing == idle && s.sidecar.waiting.kind != none {
		n := s
		n.sidecar.waiting = request{}
		fault(&s.left.early, n, "sidecar", "waits no longer for the answer", s.sidecar.waiting.String())
	}
	if s.left.killRunner > 0 && s.runner.up {
		n := s
		n.killRunner()
		fault(&s.left.killRunner, n, "fault", "the runner is killed", "")
	}
	if s.left.reset > 0 {
		s.reset(func(n state) { fault(&s.left.reset, n, "fault", "the VM is reset", "") })
	}
	if s.left.cancel > 0 && s.sidecar.up && s.sidecar.doing == idle {
		for j, r := range s.record {
			if r.stage >= collecting || r.wish {
				continue
			}
			n := s
			n.record[j].wish = true
			if r.stage == queued {
				n.record[j].stage, n.record[j].result = collecting, cancelled
			}
			fault(&s.left.cancel, n, "user", "cancels", jobNames[j])
		}
	}
	if s.left.damage > 0 && s.out.n > s.saved.read {
		n := s
		n.garble()
		fault(&s.left.damage, n, "fault", "somebody garbles pipe_out behind the checkpoint, and the runner can't see it", "")
		n.out.changed = true
		fault(&s.left.damage, n, "fault", "somebody garbles pipe_out behind the checkpoint", "")
	}
}

// garble makes what the current generation says behind the checkpoint
// unreadable, where the reader is too. Its hello stays.
func (s *state) garble() {
	from := s.saved.read
	for i := from; i < s.out.n; i++ {
		if s.out.event[i].begins {
			from = i + 1
		}
	}
	unread := s.sidecar.read < s.out.n
	read := min(s.sidecar.read, s.out.n)
	if from == s.out.n {
		return
	}
	clear(s.out.event[from:])
	s.out.n = from
	s.out.add(event{kind: damaged})
	if read > from && unread { // before the reader too, and not only where it would start anew
		s.out.add(event{kind: damaged})
	}
	if read > from {
		s.sidecar.read = from + 1
	}
	s.out.synced = s.out.n
	s.out.spoilt = true
	s.sidecar.skip = min(s.sidecar.skip, s.out.n)
	s.sidecar.advance = s.sidecar.advance && read < from
	s.runner.unsync = false
}

func (s *state) killRunner() {
	s.runner = runner{reset: s.runner.reset}
	s.notice = false
	for r := range s.attempt {
		s.attempt[r].starting = false
	}
}

// shorten takes any part of what is not synced off the logs from job j on.
func (s state) shorten(j int, then func(state)) {
	if j == jobs {
		then(s)
		return
	}
	for l := s.log[j]; ; {
		m := s
		m.log[j] = l
		m.shorten(j+1, then)
		if l.n <= l.synced {
			return
		}
		l.n--
		l.text[l.n] = 0
	}
}

// reset ends all that runs in the VM, and takes any part of what is not
// synced from its disk.
func (s state) reset(then func(state)) {
	n := s
	n.killRunner()
	n.runner.reset, n.resets = true, true
	n.cutOut(func(n state) { n.loseFiles(0, 0, then) })
	if n.pipeIn != n.seen && n.pipeIn.kind != none {
		n.pipeIn = n.seen // its rename was not synced
		n.cutOut(func(n state) { n.loseFiles(0, 0, then) })
	}
}

// cutOut takes events off pipe_out, down to those that are synced.
func (s state) cutOut(then func(state)) {
	for {
		m := s
		m.out.synced = s.out.n
		m.saved.read = min(s.saved.read, s.out.n)
		m.sidecar.read = min(s.sidecar.read, s.out.n)
		m.sidecar.advance = s.sidecar.advance && s.sidecar.read < s.out.n
		m.sidecar.skip = min(s.sidecar.skip, s.out.n)
		m.forget()
		then(m)
		if s.out.n == s.out.synced {
			return
		}
		s.out.n--
		if e := s.out.event[s.out.n]; e.kind == logged && e.in == s.out.gen {
			s.attempt[e.ref].toldLines = min(s.attempt[e.ref].toldLines, e.n)
		}
		s.out.event[s.out.n] = event{}
	}
}

// loseFiles takes unsynced files from attempt r on, the f-th first.
func (s state) loseFiles(r, f int, then func(state)) {
	if r == len(s.attempt) {
		then(s)
		return
	}
	a := &s.attempt[r]
	files := a.files()
	if f < len(files) {
		unsynced := *files[f] == cached || *files[f] == adopted
		if unsynced {
			m := s
			*m.attempt[r].files()[f] = absent
			m.loseFiles(r, f+1, then)
			*files[f] = synced
		}
		s.loseFiles(r, f+1, then)
		return
	}
	if a.spool == absent {
		*a = attempt{tomb: a.tomb, starts: a.starts, said: a.said}
	}
	a.unit, a.old = noUnit, a.ran != absent
	for lines := a.lines; ; lines-- {
		m := s
		m.attempt[r].lines, m.attempt[r].safe = lines, lines
		m.loseFiles(r+1, 0, then)
		if lines == a.safe {
			return
		}
	}
}
