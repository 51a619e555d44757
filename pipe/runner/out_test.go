package runner

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

func line(t testing.TB, e pipe.Event) string {
	t.Helper()
	data, err := pipe.MarshalEvent(e)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func sample(t testing.TB) string {
	t.Helper()
	ref := pipe.JobRef{Job: "j", Attempt: 1}
	return line(t, pipe.Event{Seq: 1, Type: pipe.TypeHello, Hello: &pipe.Hello{Generation: "3-0123abcd"}}) +
		line(t, pipe.Event{Seq: 2, Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: jobKey(ref)}, Job: "j", Attempt: 1}) +
		line(t, pipe.Event{Seq: 3, Type: pipe.TypeStarted, Started: &pipe.Started{}, Job: "j", Attempt: 1}) +
		line(t, pipe.Event{Seq: 4, Type: pipe.TypeLog, Log: &pipe.Log{Offset: 10, Data: []byte("abc")}, Job: "j", Attempt: 1}) +
		line(t, pipe.Event{Seq: 5, Type: pipe.TypeAccepted, Accepted: &pipe.Accepted{Request: "acknowledge/j/1"}, Job: "j", Attempt: 1})
}

func TestReadHistory(t *testing.T) {
	good := sample(t)
	for name, text := range map[string]string{
		"whole":   good,
		"torn":    good + `{"seq":6,"ty`,
		"bad":     strings.Replace(good, "\n", "\nno event\n", 1),
		"punched": strings.Repeat("\x00", 5000) + "\n" + good,
		"long":    strings.Repeat("x", 3*pipe.MaxLine) + "\n" + good,
	} {
		h, err := readHistory(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		want := told{accepted: true, started: true, log: 13}
		if got := h.jobs[pipe.JobRef{Job: "j", Attempt: 1}]; got != want || h.seq != 5 || h.gen != "3-0123abcd" || h.size != int64(len(text)) {
			t.Errorf("%s: %+v, told %+v", name, h, got)
		}
		if torn := h.end != h.size; torn != (name == "torn") {
			t.Errorf("%s: torn %v", name, torn)
		}
	}
}

func FuzzReadHistory(f *testing.F) {
	good := sample(f)
	f.Add([]byte(good))
	f.Add([]byte(good[:len(good)-5]))
	f.Add([]byte("\x00\x00\n{}\n"))
	f.Add([]byte(`{"seq":18446744073709551615,"type":"new","time":"2026-01-02T03:04:05Z"}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		h, err := readHistory(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if h.size != int64(len(data)) || h.end > h.size {
			t.Errorf("size %d, end %d of %d", h.size, h.end, len(data))
		}
	})
}

// A line that the disk cut is ended before the next, which counts on.
func TestAppendAfterShortWrite(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Pipe: dir, Data: dir, Boot: "b"}
	if err := os.MkdirAll(cfg.spool(), 0o700); err != nil {
		t.Fatal(err)
	}
	o := &out{cfg: cfg, room: &reserve{path: filepath.Join(dir, "reserve")}, user: self()}
	if err := o.begin(history{}, pipe.Hello{}); err != nil {
		t.Fatal(err)
	}
	defer o.close()
	progress := pipe.Event{Type: pipe.TypeProgress, Job: "j", Attempt: 1, Progress: &pipe.Progress{Unit: "bytes"}}

	// RLIMIT_FSIZE cuts a write as a full disk does.
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_FSIZE, &old); err != nil {
		t.Fatal(err)
	}
	o.blocks = 1 << 20 // so that not the allocation fails, but the write
	limit := unix.Rlimit{Cur: uint64(o.size) + 20, Max: old.Max}
	if err := unix.Setrlimit(unix.RLIMIT_FSIZE, &limit); err != nil {
		t.Fatal(err)
	}
	err := o.append(progress)
	if rerr := unix.Setrlimit(unix.RLIMIT_FSIZE, &old); rerr != nil {
		t.Fatal(rerr)
	}
	if err == nil || !o.torn {
		t.Fatalf("append: %v, torn %v", err, o.torn)
	}
	if err := o.append(progress); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(cfg.pipeOut())
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(data), "\n")
	if len(lines) != 4 {
		t.Fatalf("%q", lines)
	}
	if e, err := pipe.ParseEvent([]byte(lines[2])); err != nil || e.Seq != 2 {
		t.Errorf("event %+v, %v", e, err)
	}
}
