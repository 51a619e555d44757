package logging

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logged returns what f logs.
func logged(t *testing.T, format, level string, f func(*zap.Logger)) string {
	t.Helper()
	return loggedWith(t, Options{Format: format, Level: level}, f)
}

func loggedWith(t *testing.T, o Options, f func(*zap.Logger)) string {
	t.Helper()
	var b bytes.Buffer
	log, out, err := New(o, &b)
	if err != nil {
		t.Fatal(err)
	}
	f(log)
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := out.Run(over); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestConsole(t *testing.T) {
	got := logged(t, Console, "info", func(log *zap.Logger) {
		log = log.WithOptions(zap.WithClock(clock{}))
		inbox := log.Named("inbox").With(zap.String("job", "20260102-030405-abcdef"))
		inbox.Debug("not shown")
		inbox.Info("job taken", zap.String("name", "hello iso"), zap.Int("size", 5), zap.Duration("after", 2*time.Second))
		inbox.Warn("drop refused", zap.Error(fmt.Errorf("read drop: %w", errors.New("no\x1b[2Jsuch file\nINFO fake"))))
		Line(log, "hello-iso", "\x1b[1;32mok\x1b[0m a\tb\r")
		Line(log, "hello-iso", "")
		Line(log, "a", "shorter")
		Line(log, "a-name-longer-than-the-column", "x")
		Line(log, "a", "as before")
		log.Info("job is done", zap.Duration("duration", 3*time.Minute+2*time.Second+4*time.Millisecond), zap.Duration("after", 2*time.Second+1500*time.Microsecond),
			zap.Int64("bytes", 13_568_000), zap.Int64("free_bytes", 5), zap.Int("megabytes", 7))
		log.Warn("a message that is longer than its column", zap.Int("n", 1))
		log.Error("empty", zap.String("quote", `a"b`), zap.String("none", ""))
	})
	want := `2026-01-02T03:04:05Z INFO  inbox     job taken                 job=20260102-030405-abcdef name="hello iso" size=5 after=2s
2026-01-02T03:04:05Z WARN  inbox     drop refused              job=20260102-030405-abcdef error="read drop: nosuch file\nINFO fake"
hello-iso | ok a	b
hello-iso |
a         | shorter
a-name-longer-than-the-column | x
a                    | as before
2026-01-02T03:04:05Z INFO            job is done               duration=3m2s after=2.002s size=12.9MiB free=5B megabytes=7
2026-01-02T03:04:05Z WARN            a message that is longer than its column  n=1
2026-01-02T03:04:05Z ERROR           empty                     quote="a\"b" none=""
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Colours are ours alone: what a build writes never becomes one.
func TestColors(t *testing.T) {
	log := func(log *zap.Logger) {
		log = log.WithOptions(zap.WithClock(clock{}))
		Line(log, "a\x1b[31mb", "\x1b[32mgreen\x1b[0m \x1b")
		Line(log, "other", "x")
		log.Info("fine", zap.String("job", "other"))
		log.Warn("odd")
		log.Error("bad\x1b[2J")
	}
	want := "\x1b[%smab\x1b[0m | green \\x1b\n" +
		"\x1b[%[2]smother\x1b[0m | x\n" +
		"2026-01-02T03:04:05Z INFO            fine                      job=\x1b[%[2]smother\x1b[0m\n" +
		"2026-01-02T03:04:05Z \x1b[33mWARN \x1b[0m           odd\n" +
		"2026-01-02T03:04:05Z \x1b[31mERROR\x1b[0m           bad\n"
	want = fmt.Sprintf(want, nameColor("ab"), nameColor("other"))
	got := loggedWith(t, Options{Format: Console, Level: "info", Color: true}, log)
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, o := range []Options{{Format: JSON, Level: "info", Color: true}, {Format: Console, Level: "info"}} {
		if got := loggedWith(t, o, log); strings.Contains(got, "\x1b") {
			t.Errorf("%s: escape sequences in %q", o.Format, got)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0B", 1023: "1023B", 1024: "1.0KiB", 13_568_000: "12.9MiB", 1<<30 - 1: "1.0GiB", 1 << 40: "1.0TiB", math.MaxInt64: "8.0EiB", -5: "-5B",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %s, want %s", n, got, want)
		}
	}
}

// Docker's reader of standard output is a pipe. One that nobody reads costs
// the builds no time, and what was dropped is counted.
func TestPipeThatNobodyReads(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	log, out, err := New(Options{Format: JSON, Level: "info"}, w)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- out.Run(ctx) }()
	const lines = 20_000 // of 500 bytes: more than the queue and a pipe hold
	text := strings.Repeat("x", 500)
	for range lines {
		Line(log, "a", text) // blocks for ever if it waits for the reader
	}
	read := make(chan []byte, 1)
	go func() {
		all, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		read <- all
	}()
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	w.Close()
	written, dropped := 0, 0
	for line := range bytes.Lines(<-read) {
		var v struct {
			Line    string
			Dropped int
		}
		if err := json.Unmarshal(line, &v); err != nil {
			t.Fatalf("%v: %.100s", err, line)
		}
		if dropped += v.Dropped; v.Line == text {
			written++
		}
	}
	if dropped == 0 || written+dropped != lines {
		t.Errorf("%d written and %d dropped of %d", written, dropped, lines)
	}
}

func TestJSON(t *testing.T) {
	got := logged(t, JSON, "info", func(log *zap.Logger) {
		log = log.WithOptions(zap.WithClock(clock{}))
		log.Named("vm").Info("link up", zap.String("builder", "vm"), zap.String("odd", "a\u009b\u202eb\x7f"))
		Line(log, "hello-iso", "\x1b[31mred\x1b[m \x00")
	})
	want := `{"level":"info","time":"2026-01-02T03:04:05Z","logger":"vm","message":"link up","builder":"vm","odd":"a\u009b\u202eb\u007f"}
{"level":"info","time":"2026-01-02T03:04:05Z","message":"build output","job":"hello-iso","line":"red \\x00"}
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for line := range strings.Lines(got) {
		if err := json.Unmarshal([]byte(line), new(map[string]any)); err != nil {
			t.Errorf("%v: %s", err, line)
		}
	}
}

type clock struct{}

func (clock) Now() time.Time                       { return time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) }
func (clock) NewTicker(time.Duration) *time.Ticker { panic("not used") }

func TestWrongSettings(t *testing.T) {
	for _, tt := range [][2]string{{"xml", "info"}, {"console", "loud"}, {"", "info"}} {
		if _, _, err := New(Options{Format: tt[0], Level: tt[1]}, &bytes.Buffer{}); err == nil {
			t.Errorf("format %q, level %q: no error", tt[0], tt[1])
		}
	}
}

func TestLongLine(t *testing.T) {
	got := logged(t, Console, "info", func(log *zap.Logger) { Line(log, "a", strings.Repeat("ü", maxLine)) })
	if len(got) > maxLine+100 || !strings.HasSuffix(got, "… (8192 bytes more in build.log)\n") {
		t.Errorf("%d bytes, ends %q", len(got), got[len(got)-40:])
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{
		"plain\ttext":                          "plain\ttext",
		"größe 你好 👩‍💻":                         "größe 你好 👩‍💻",
		"\x1b[38;5;1mred\x1b[0m":               "red",
		"\x1b]0;title\x07after":                "after",
		"\x1b]8;;http://x\x1b\\link":           "link",
		"\x1b]0;never ended":                   "",
		"10%\r20%\r\n":                         `10%\r20%`,
		"bell\a null\x00 esc\x1b":              `bell\a null\x00 esc\x1b`,
		"bad \xff\xfe utf8":                    `bad \xff\xfe utf8`,
		"real \uFFFD":                          "real \uFFFD",
		"c1 \u009b2J":                          `c1 \u009b2J`,
		"reversed \u202egnp.exe":               `reversed \u202egnp.exe`,
		"two\nlines\u2028three\u0085":          `two\nlines\u2028three\u0085`,
		"sequences that \x1b[ do not end \x1b": "sequences that o not end \\x1b",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
	}
}

func FuzzClean(f *testing.F) {
	for _, seed := range []string{"", "\x1b[1mx", "\x1b\x1b[[mm", "a\xffb", "\u202e\u009b\x7f", "\r\n\r"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got := Clean(in)
		for _, r := range got {
			if !shown(r) {
				t.Fatalf("%q is left in Clean(%q) = %q", r, in, got)
			}
		}
		if again := Clean(got); again != got {
			t.Fatalf("Clean(%q) = %q, cleaned again %q", in, got, again)
		}
	})
}

// stalled blocks in Write until it is released.
type stalled struct {
	entered chan struct{}
	release chan struct{}
	once    sync.Once
	bytes.Buffer
}

func (s *stalled) Write(p []byte) (int, error) {
	s.once.Do(func() { close(s.entered) })
	<-s.release
	return s.Buffer.Write(p)
}

func TestStalledReaderDropsWithCount(t *testing.T) {
	for _, format := range []string{Console, JSON} {
		t.Run(format, func(t *testing.T) {
			w := &stalled{entered: make(chan struct{}), release: make(chan struct{})}
			log, out, err := New(Options{Format: format, Level: "info"}, w)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() { ended <- out.Run(ctx) }()
			Line(log, "a", "first")
			<-w.entered
			const lines = 1000
			for n := range lines { // more than fits, and none of them blocks
				Line(log, "a", fmt.Sprint(n, strings.Repeat("x", maxLine-10)))
			}
			close(w.release)
			cancel()
			if err := <-ended; err != nil {
				t.Fatal(err)
			}
			got := strings.Split(strings.TrimSuffix(w.String(), "\n"), "\n")
			last, dropped := got[len(got)-1], 0
			if !strings.Contains(last, droppedMessage) {
				t.Fatalf("the last line is %.200q", last)
			}
			if format == JSON {
				var v struct{ Dropped int }
				if err := json.Unmarshal([]byte(last), &v); err != nil {
					t.Fatal(err)
				}
				dropped = v.Dropped
			} else if _, err := fmt.Sscanf(last[strings.Index(last, "dropped="):], "dropped=%d", &dropped); err != nil {
				t.Fatal(err)
			}
			if written := len(got) - 2; dropped == 0 || written+dropped != lines {
				t.Errorf("%d written and %d dropped of %d", written, dropped, lines)
			}
		})
	}
}

func TestRunEndsThoughReaderStalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &stalled{entered: make(chan struct{}), release: make(chan struct{})}
		log, out, err := New(Options{Format: Console, Level: "info"}, w)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		log.Info("x")
		ended := make(chan error, 1)
		go func() { ended <- out.Run(ctx) }()
		<-w.entered
		start := time.Now()
		cancel()
		if err := <-ended; err == nil {
			t.Error("nothing was said about what is lost")
		}
		if waited := time.Since(start); waited != flushTime {
			t.Errorf("waited %v", waited)
		}
		close(w.release)
	})
}

type broken struct{}

func (broken) Write([]byte) (int, error) { return 0, errors.New("broken pipe") }

func TestBrokenOutputEndsRun(t *testing.T) {
	log, out, err := New(Options{Format: Console, Level: "info"}, broken{})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("x")
	if err := out.Run(t.Context()); err == nil {
		t.Error("no error")
	}
	log.Info("still does not block")
}
