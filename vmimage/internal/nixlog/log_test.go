package nixlog_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/google/go-cmp/cmp"

	"osbuilder/vmimage/internal/nixlog"
	"osbuilder/vmimage/internal/nixlog/nixlogtest"
)

// A clock moves only when told.
type clock struct{ now time.Time }

func (c *clock) Now() time.Time       { return c.now }
func (c *clock) move(d time.Duration) { c.now = c.now.Add(d) }
func newClock() *clock                { return &clock{time.Unix(1_000_000, 0)} }
func event(text string) []byte        { return []byte("@nix " + text) }
func take(l *nixlog.Log, lines ...string) {
	for _, line := range lines {
		l.Line(event(line))
	}
}

func play(r nixlogtest.Recording, interval time.Duration) (*nixlog.Log, []string) {
	var said []string
	c := newClock()
	log := nixlog.New(func(line string) { said = append(said, line) }, c.Now)
	log.Interval = interval
	for _, line := range r.Lines {
		log.Line(line)
		c.move(time.Second)
		log.Tick()
	}
	return log, said
}

func find(t *testing.T, id string) nixlogtest.Recording {
	t.Helper()
	for _, r := range nixlogtest.Read(t, "testdata") {
		if r.ID() == id {
			return r
		}
	}
	t.Fatalf("no recording %s", id)
	return nixlogtest.Recording{}
}

// All that real versions say becomes plain lines, and failures leave an error behind.
func TestRecordingsBecomePlainLines(t *testing.T) {
	for _, r := range nixlogtest.Read(t, "testdata") {
		t.Run(r.ID(), func(t *testing.T) {
			log, said := play(r, 0)
			for _, line := range said {
				checkPlain(t, line)
			}
			for _, e := range log.Errors() {
				for line := range strings.SplitSeq(e.Message+"\n"+e.Cause, "\n") {
					checkPlain(t, line)
				}
			}
			if r.Exit != 0 && len(log.Errors()) == 0 {
				t.Errorf("it failed with %d, but there is no error in the log", r.Exit)
			}
			if r.Exit == 0 && len(log.Errors()) > 0 {
				t.Errorf("it succeeded, but there is an error in the log: %v", log.Errors())
			}
		})
	}
}

func checkPlain(t *testing.T, line string) {
	t.Helper()
	if strings.ContainsFunc(line, unicode.IsControl) {
		t.Errorf("control characters in %q", line)
	}
	if strings.Contains(line, "@nix") {
		t.Errorf("a line of the format came through: %q", line)
	}
}

func TestBuildersOfSeveralAreToldApart(t *testing.T) {
	for _, version := range nixlogtest.Versions {
		for _, way := range []string{"direct", "daemon"} {
			id := version + "-" + way + "/build-parallel"
			t.Run(id, func(t *testing.T) {
				log, said := play(find(t, id), 0)
				for _, want := range []string{
					"building one-1.0", "building all-1.0",
					"one-1.0> one says 1", "two-1.0> two says 3",
				} {
					if !slices.ContainsFunc(said, func(line string) bool { return strings.HasSuffix(line, want) }) {
						t.Errorf("no line %q in\n%s", want, strings.Join(said, "\n"))
					}
				}
				if got, want := log.Progress(), "built 4 of 4"; got != want {
					t.Errorf("progress %q, want %q", got, want)
				}
				if got := len(log.Plan().Build); got != 4 {
					t.Errorf("%d derivations planned, want 4", got)
				}
			})
		}
	}
}

func TestProgressOfDownloads(t *testing.T) {
	for _, version := range nixlogtest.Versions {
		id := version + "-daemon/build-cache"
		t.Run(id, func(t *testing.T) {
			log, said := play(find(t, id), time.Second)
			plan := log.Plan()
			if len(plan.Fetch) != 1 || plan.Download == "" || plan.Unpacked == "" {
				t.Errorf("plan %+v, want one path to fetch and its sizes", plan)
			}
			if got := log.Progress(); !strings.HasPrefix(got, "built 1 of 1, fetched 1 of 1 paths, ") || !strings.HasSuffix(got, "0.8 MiB of 0.8 MiB") {
				t.Errorf("progress at the end %q", got)
			}
			parts := 0
			for _, line := range said {
				if strings.Contains(line, "of 0.8 MiB") && !strings.Contains(line, "0.8 MiB of 0.8 MiB") {
					parts++
				}
			}
			if parts == 0 {
				t.Errorf("no progress in between:\n%s", strings.Join(said, "\n"))
			}
		})
	}
}

func TestProgressComesAtABoundedRate(t *testing.T) {
	var said []string
	c := newClock()
	log := nixlog.New(func(line string) { said = append(said, line) }, c.Now)
	take(log, `{"action":"start","id":1,"type":104}`)
	for i := range 101 {
		take(log, fmt.Sprintf(`{"action":"result","id":1,"type":105,"fields":[%d,100,0,0]}`, i))
		log.Tick()
		c.move(100 * time.Millisecond)
	}
	if diff := cmp.Diff([]string{"built 50 of 100", "built 100 of 100"}, said); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	said = nil
	c.move(10 * time.Second)
	log.Tick()
	log.Tick()
	if len(said) != 0 {
		t.Errorf("nothing changed, but it said %q", said)
	}
}

func TestASignOfLife(t *testing.T) {
	var said []string
	c := newClock()
	log := nixlog.New(func(line string) { said = append(said, line) }, c.Now)
	take(log, `{"action":"start","id":7,"type":105,"fields":["/nix/store/00000000000000000000000000000000-linux-6.6.drv","",1,1]}`,
		`{"action":"result","id":7,"type":104,"fields":["buildPhase"]}`)
	c.move(59 * time.Second)
	log.Tick()
	c.move(time.Second)
	log.Tick()
	c.move(time.Second)
	log.Tick()
	want := []string{"building linux-6.6", "still building linux-6.6 for 1m0s, buildPhase"}
	if diff := cmp.Diff(want, said); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestWhatIsUnknownIsAccepted(t *testing.T) {
	var said []string
	log := nixlog.New(func(line string) { said = append(said, line) }, newClock().Now)
	take(log,
		`{"action":"start","id":1,"type":999,"level":3,"text":"a new thing","fields":[{"x":1}]}`,
		`{"action":"result","id":1,"type":888,"fields":[[1],"x",null]}`,
		`{"action":"result","id":2,"type":105,"fields":["x"]}`,
		`{"action":"dance","id":3}`,
		`{"action":"stop","id":4}`,
	)
	log.Line([]byte("@nix {broken"))
	log.Line([]byte("just text\r"))
	log.Line([]byte("\x1b[31m\x1b[0m"))
	if diff := cmp.Diff([]string{"a new thing", "@nix {broken", "just text"}, said); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestPlain(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"", ""},
		{"plain", "plain"},
		{"10%\r20%\r100%\n", "100%"},
		{"\x1b[1;31mred\x1b[0m \x1b]0;title\x07x\x1b]8;;u\x1b\\y\x1b(Bz", "red xyz"},
		{"tab\there\a\x00\x7f\u0085", "tab    here"},
		{"bytes \xff\xfe", "bytes �"},
		{"turn \u202eback\u2028next", "turn backnext"},
		{"half an escape \x1b[", "half an escape"},
		{strings.Repeat("é", nixlog.MaxLine), strings.Repeat("é", nixlog.MaxLine/2) + " … (cut)"},
	} {
		if got := nixlog.Plain(test.in); got != test.want {
			t.Errorf("Plain(%q) = %q, want %q", test.in, got, test.want)
		}
	}
}

func TestReadTakesTheLastLineWithoutItsEnd(t *testing.T) {
	var said []string
	log := nixlog.New(func(line string) { said = append(said, line) }, time.Now)
	long := strings.Repeat("x", 5<<20)
	if err := log.Read(strings.NewReader("one\n" + long + "\nlast")); err != nil {
		t.Fatal(err)
	}
	if len(said) != 3 || said[0] != "one" || said[2] != "last" || len(said[1]) > nixlog.MaxLine+20 {
		t.Errorf("%d lines: %.60q", len(said), said)
	}
}

func FuzzLog(f *testing.F) {
	for _, r := range nixlogtest.Read(f, "testdata") {
		if r.Version == "2.34" && r.Way == "daemon" {
			for i := 0; i < len(r.Lines); i += 7 {
				f.Add(r.Lines[i])
			}
		}
	}
	f.Add([]byte("text"))
	f.Add([]byte("@nix {\"action\":\"msg\",\"level\":0,\"msg\":\"\\u001b[31merror:\\u001b[0m\\r\\n\\tx\",\"file\":\"/a:1:2\",\"line\":1,\"column\":2}"))
	f.Add([]byte("@nix {\"action\":\"start\",\"id\":18446744073709551615,\"type\":-1,\"fields\":null}"))
	f.Fuzz(func(t *testing.T, line []byte) {
		c := newClock()
		log := nixlog.New(func(line string) {
			if strings.ContainsFunc(line, unicode.IsControl) {
				t.Errorf("control characters in %q", line)
			}
			if len(line) > nixlog.MaxLine+20 {
				t.Errorf("a line of %d bytes", len(line))
			}
		}, c.Now)
		take(log, `{"action":"start","id":1,"type":105,"fields":["/nix/store/x.drv"]}`, `{"action":"start","id":2,"type":105,"fields":["y"]}`)
		for range 2 {
			log.Line(line)
			c.move(time.Hour)
			log.Tick()
		}
	})
}
