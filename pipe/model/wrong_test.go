package model

// The kinds of finding that break a guarantee.
const (
	tooMany     = "more events than there should be"
	twice       = "an attempt ran twice"
	atOnce      = "two attempts of a job ran at once"
	undead      = "a cancelled job ran"
	notOnDisk   = "accepted, and not on the disk"
	unknown     = "the record says that the VM has a job, and it has not"
	forgotten   = "the VM forgot what is not on record"
	otherWords  = "two outcomes of one attempt"
	changed     = "an outcome that was recorded changed"
	neverRan    = "succeeded without having run"
	unmarked    = "a gap in the log that is not marked"
	lostAlive   = "output was lost, and the VM lived"
	lineTwice   = "a line twice in the log"
	endUnmarked = "the end of the output is missing, and nothing says so"
)

// wrong holds the guarantees against a state and the one before it.
func (m model) wrong(before, s state) string {
	if s.out.full {
		return tooMany
	}
	for i, a := range s.attempt {
		r := ref(i)
		rec := s.record[r.job()]
		switch {
		case a.starts > 1:
			return twice
		case a.status == cancelled && a.outcome != absent && a.ran == absent && a.starts > 0:
			return undead
		case a.spool == absent && before.attempt[i].toldAccepted && s.runner.reset && before.runner != s.runner:
			return notOnDisk
		case a.spool == absent && before.attempt[i].outcome != absent &&
			(rec.attempt < r.attempt() || rec.attempt == r.attempt() && rec.stage != ended && rec.stage != queued):
			return forgotten
		}
		if b := before.attempt[i]; a.toldFinished && !b.toldFinished {
			if a.said != open && a.said != a.status {
				return otherWords
			}
		}
	}
	for j, r := range s.record {
		a1, a2 := s.attempt[refOf(j, 1)], s.attempt[refOf(j, 2)]
		if a1.unit == runs && a2.unit == runs {
			return atOnce
		}
		b := before.record[j]
		switch {
		case r.stage == running && s.attempt[refOf(j, r.attempt)].spool == absent:
			return unknown
		case b.stage == ended && (r.stage != ended || r.result != b.result || r.attempt != b.attempt || r.output != b.output),
			r.stage == ended && r.output != r.result:
			return changed
		}
		if r.output != open && b.output == open {
			if kind := m.published(s, j); kind != "" {
				return kind
			}
		}
	}
	return ""
}

// published reads a job's log the way that a user does, at the moment when it
// comes into output/.
func (m model) published(s state, j int) string {
	r, l := s.record[j], s.log[j]
	if r.result == succeeded && s.attempt[refOf(j, r.attempt)].starts != 1 {
		return neverRan
	}
	attempt, lines, hole := uint8(1), uint8(0), false
	for _, text := range l.text[:l.n] {
		switch {
		case text == lost:
			if !s.resets {
				return lostAlive
			}
			hole = true
		case text&begins != 0: // which says that the one before did not end
			attempt, lines, hole = uint8(text&^begins), 0, false
		case text>>4 != line(attempt):
			return unmarked
		default:
			at := uint8(text & 0xf)
			switch {
			case at < lines:
				return lineTwice
			case at > lines && !hole:
				return unmarked
			}
			lines, hole = at+1, false
		}
	}
	if r.result == succeeded && (attempt != r.attempt || lines < m.lines[j] && !hole) {
		return endUnmarked
	}
	return ""
}
