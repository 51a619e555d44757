package model

import (
	"fmt"
	"hash/maphash"
	"slices"
	"strings"
)

// A step is how one state becomes the next.
type step struct {
	who   string // takes it
	what  string
	of    string // what it is about; empty where there is one only
	fault bool   // need not happen: a kill, a cut, a second writing
}

func (s step) String() string {
	text := s.who + ": " + s.what
	if s.of != "" {
		text += " (" + s.of + ")"
	}
	return text
}

// A system is a model: states of type S and the steps between them.
type system[S comparable] struct {
	start S
	// steps hands over every step that is possible in s.
	steps func(s S, next func(step, S))
	// wrong says what must not be in s, or must not come of before; "" if all holds.
	wrong func(before, s S) string
	// ended reports that all is done.
	ended func(S) bool
}

// A finding is what a walk came upon: the kind of fault, and the shortest
// story that leads to it.
type finding struct {
	kind  string
	story []string
}

func (f *finding) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s, after %d steps:\n", f.kind, len(f.story))
	for i, s := range f.story {
		fmt.Fprintf(&b, "  %2d  %s\n", i+1, s)
	}
	return b.String()
}

// A walked system.
type walked struct {
	states, steps, ends int
	deepest             int // steps of the longest shortest way
	found               *finding
}

// The kinds of finding that are the walk's own.
const (
	stuck  = "the end can't be reached any more"
	circle = "it can go round for ever"
)

// A table numbers the states in the order they were found. It holds each once.
type table[S comparable] struct {
	seed   maphash.Seed
	slots  []int32 // number of a state and 1, at its hash
	states []S
}

func newTable[S comparable]() *table[S] {
	return &table[S]{seed: maphash.MakeSeed(), slots: make([]int32, 1<<16)}
}

// add returns the number of s, and whether it is new.
func (t *table[S]) add(s S) (int32, bool) {
	if 2*len(t.states) >= len(t.slots) {
		t.grow()
	}
	i := t.find(s)
	if n := t.slots[i]; n > 0 {
		return n - 1, false
	}
	t.states = append(t.states, s)
	t.slots[i] = int32(len(t.states))
	return int32(len(t.states) - 1), true
}

func (t *table[S]) find(s S) uint64 {
	mask := uint64(len(t.slots) - 1)
	i := maphash.Comparable(t.seed, s) & mask
	for t.slots[i] > 0 && t.states[t.slots[i]-1] != s {
		i = (i + 1) & mask
	}
	return i
}

func (t *table[S]) grow() {
	t.slots = make([]int32, 2*len(t.slots))
	for n, s := range t.states {
		t.slots[t.find(s)] = int32(n + 1)
	}
}

// walk visits every state, nearest first, and stops at the first that is
// wrong. Then it looks for those from which the end can't be reached, and for
// circles, when nothing fails any more. More than limit states are an error.
func walk[S comparable](sys system[S], limit int) (walked, error) {
	t := newTable[S]()
	var (
		w     walked
		from  = []int32{-1} // the state that led to each first
		depth = []int32{0}
		first []int32 // where each state's steps without a fault begin in to
		to    []int32
		over  bool
	)
	t.add(sys.start)
	for n := int32(0); int(n) < len(t.states) && w.found == nil && !over; n++ {
		s := t.states[n]
		first = append(first, int32(len(to)))
		sys.steps(s, func(how step, next S) {
			if w.found != nil || next == s {
				return
			}
			w.steps++
			if kind := sys.wrong(s, next); kind != "" {
				w.found = &finding{kind, append(story(sys, t, from, n), how.String())}
				return
			}
			m, fresh := t.add(next)
			if fresh {
				from, depth = append(from, n), append(depth, depth[n]+1)
			}
			if !how.fault {
				to = append(to, m)
			}
			over = len(t.states) > limit
		})
	}
	w.states = len(t.states)
	if over {
		return w, fmt.Errorf("more than %d states", limit)
	}
	if w.found != nil {
		return w, nil
	}
	w.deepest = int(depth[len(depth)-1])
	first = append(first, int32(len(to)))
	ends := make([]bool, w.states)
	for n, s := range t.states {
		if ends[n] = sys.ended(s); ends[n] {
			w.ends++
		}
	}
	if n := unreachable(first, to, ends); n >= 0 {
		w.found = &finding{stuck, story(sys, t, from, n)}
	} else if way := round(first, to); way != nil {
		told := append(story(sys, t, from, way[0]), "and from there round and round:")
		for i, n := range way {
			told = append(told, between(sys, t, n, way[(i+1)%len(way)]))
		}
		w.found = &finding{circle, told}
	}
	return w, nil
}

// story tells the way to state n.
func story[S comparable](sys system[S], t *table[S], from []int32, n int32) []string {
	if from[n] < 0 {
		return nil
	}
	return append(story(sys, t, from, from[n]), between(sys, t, from[n], n))
}

// between tells the step from state n to m.
func between[S comparable](sys system[S], t *table[S], n, m int32) (told string) {
	sys.steps(t.states[n], func(how step, next S) {
		if told == "" && next == t.states[m] {
			told = how.String()
		}
	})
	return told
}

// unreachable returns the first state from which no end can be reached; -1 if
// there is none.
func unreachable(first, to []int32, ends []bool) int32 {
	// The steps backwards.
	into := make([]int32, len(ends)+1)
	for _, m := range to {
		into[m+1]++
	}
	for n := range ends {
		into[n+1] += into[n]
	}
	back, place := make([]int32, len(to)), append([]int32(nil), into...)
	for n := range ends {
		for _, m := range to[first[n]:first[n+1]] {
			back[place[m]] = int32(n)
			place[m]++
		}
	}
	good := append([]bool(nil), ends...)
	var todo []int32
	for n, end := range ends {
		if end {
			todo = append(todo, int32(n))
		}
	}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, m := range back[into[n]:into[n+1]] {
			if !good[m] {
				good[m] = true
				todo = append(todo, m)
			}
		}
	}
	for n, ok := range good {
		if !ok {
			return int32(n)
		}
	}
	return -1
}

// round returns states that steps without a fault lead round and round; nil if there
// are none. Without one, and with an end in reach of every state, the end comes
// whatever the order of steps.
func round(first, to []int32) []int32 {
	const (
		fresh = iota
		open
		closed
	)
	mark := make([]uint8, len(first)-1)
	at := append([]int32(nil), first...) // the next step of each to follow
	for root := range mark {
		if mark[root] != fresh {
			continue
		}
		mark[root] = open
		for path := []int32{int32(root)}; len(path) > 0; {
			n := path[len(path)-1]
			if at[n] == first[n+1] {
				mark[n] = closed
				path = path[:len(path)-1]
				continue
			}
			m := to[at[n]]
			at[n]++
			switch mark[m] {
			case open:
				return path[slices.Index(path, m):]
			case fresh:
				mark[m] = open
				path = append(path, m)
			}
		}
	}
	return nil
}
