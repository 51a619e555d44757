package runner

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"osbuilder/pipe"
)

// noUnits starts nothing: what is fuzzed must not run.
type noUnits struct{ Units }

var errNoUnits = errors.New("nothing is started here")

func (noUnits) Start(context.Context, Spec) error         { return errNoUnits }
func (noUnits) Alive(context.Context, Spec) (bool, error) { return false, nil }
func (noUnits) Kill(context.Context, Spec) error          { return nil }
func (noUnits) Forget(context.Context, Spec) error        { return nil }
func (noUnits) Remembered(context.Context, Spec) (Result, bool, error) {
	return Result{}, false, nil
}

// answers counts what the runner said to requests.
func answers(t *testing.T, cfg Config) (n int) {
	t.Helper()
	data, err := os.ReadFile(cfg.pipeOut())
	if err != nil {
		t.Fatal(err)
	}
	for line := range bytes.Lines(data) {
		e, err := pipe.ParseEvent(line)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if e.Type == pipe.TypeAccepted || e.Type == pipe.TypeRefused {
			n++
		}
	}
	return n
}

// FuzzReceive: whatever lies in pipe_in is answered once, and leaves a spool
// that the next runner can read, all of it.
func FuzzReceive(f *testing.F) {
	for _, h := range []pipe.Header{
		{Kind: pipe.KindJob, Owner: "o", Job: "a", Attempt: 1, Name: "n\x00", Timeout: 5},
		{Kind: pipe.KindJob, Owner: "o", Job: "a", Attempt: 2, Consumed: &pipe.Position{Generation: "1-00000000", Offset: 1 << 62}},
		{Kind: pipe.KindAcknowledge, Owner: "o", Job: "a", Attempt: 1},
		{Kind: pipe.KindCancel, Owner: "o", Job: "a", Attempt: 1},
		{Kind: pipe.KindConsume, Owner: "o", Consumed: &pipe.Position{Generation: "9-0123abcd"}},
		{Kind: pipe.KindRepeat, Owner: "o", Consumed: &pipe.Position{Generation: "1-0123abcd", Offset: 7}},
		{Kind: pipe.KindTakeOver, Owner: "another"},
	} {
		data, err := pipe.Marshal(h, []byte("true\n"))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, true)
		f.Add(data, false)
		f.Add(data[:len(data)-1], false)
	}
	f.Add([]byte("uname -a\n"), false)
	f.Add([]byte("uname -a\n"), true)
	f.Add([]byte("#!/bin/bash\n#pipe {\n"), false)
	f.Add([]byte(" \n"), false)
	f.Fuzz(func(t *testing.T, data []byte, late bool) {
		dir := t.TempDir()
		cfg := Config{
			Pipe: filepath.Join(dir, "pipe"), Data: filepath.Join(dir, "data"), Store: filepath.Join(dir, "store"), GCRoots: filepath.Join(dir, "roots"),
			Units: noUnits{}, Image: "i", Version: "v", Boot: "b", Log: io.Discard,
		}
		life := func(do func(ctx context.Context, r *Runner)) {
			ctx, cancel := context.WithCancel(t.Context())
			r := New(cfg)
			ended := make(chan error, 1)
			go func() { ended <- r.Run(ctx) }()
			select {
			case <-r.Ready():
				do(ctx, r)
			case <-time.After(patience):
				t.Error("the runner isn't ready")
			}
			cancel()
			if err := <-ended; err != nil {
				t.Errorf("%q: %v", data, err)
			}
		}
		life(func(ctx context.Context, r *Runner) {
			l := letter{data: data, digest: "0123456789abcdef", late: late}
			before := 0
			if err := r.call(ctx, func() error { before = answers(t, cfg); r.receive(ctx, l); return nil }); err != nil {
				t.Error(err)
			}
			want := 1
			if len(bytes.TrimSpace(data)) == 0 {
				want = 0
			}
			if got := answers(t, cfg) - before; got < want || got > want+1 { // a new generation says accepted again
				t.Errorf("%q: %d answers, want %d", data, got, want)
			}
		})
		life(func(context.Context, *Runner) {})
		if damaged, err := os.ReadDir(filepath.Join(cfg.spool(), "damaged")); err != nil || len(damaged) > 0 {
			t.Errorf("%q: damaged %v, %v", data, damaged, err)
		}
	})
}

// FuzzResume: whatever lies in pipe_out and in what the spool says of it, a
// runner goes on in it or begins anew, and counts on.
func FuzzResume(f *testing.F) {
	good := sample(f)
	f.Add([]byte(`{"generation":"1-0123abcd","boot":"b"}`), []byte("00000000000000000001 1-0123abcd\n"), []byte(good))
	f.Add([]byte(`{"generation":"1-0123abcd","boot":"b"}`), []byte("99999999999999999999 x"), []byte(good[:len(good)-3]))
	f.Add([]byte(`{"generation":"","boot":""}`), []byte(""), []byte("\x00\x00"))
	f.Add([]byte(`{`), []byte("1 2 3"), []byte(""))
	f.Fuzz(func(t *testing.T, record, length, events []byte) {
		dir := t.TempDir()
		cfg := Config{Pipe: dir, Data: dir, Boot: "b"}
		o := &out{cfg: cfg, room: &reserve{path: filepath.Join(dir, "reserve")}, user: self()}
		defer o.close()
		if err := os.MkdirAll(cfg.spool(), 0o700); err != nil {
			t.Fatal(err)
		}
		for path, data := range map[string][]byte{o.recordPath(): record, o.lengthPath(): length, cfg.pipeOut(): events} {
			if err := os.WriteFile(path, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		h, err := readOut(cfg.pipeOut(), mark{})
		if err != nil {
			t.Fatal(err)
		}
		resumed, _, err := o.resume(h, mark{})
		if err != nil {
			return
		}
		if !resumed {
			if err := o.begin(h, pipe.Hello{}); err != nil {
				t.Fatal(err)
			}
		}
		seq := o.seq
		if err := o.append(pipe.Event{Type: pipe.TypeProgress, Job: "j", Attempt: 1, Progress: &pipe.Progress{}}); err != nil {
			t.Fatal(err)
		}
		after, err := readOut(cfg.pipeOut(), mark{})
		if err != nil || after.end != after.size || after.gen == "" || seq+1 != 0 && after.seq != seq+1 {
			t.Errorf("resumed %v; after it %+v, %v; the last was %d", resumed, after, err, seq)
		}
	})
}

// FuzzCut: output of any kind, seen in pieces of any length, is told to its
// last byte, in pieces that fit into an event each.
func FuzzCut(f *testing.F) {
	f.Add([]byte("one\ntwo\nthree"), uint16(4))
	f.Add([]byte("äöü€𝄞\n\xff\xfe\x00\x80"), uint16(1))
	f.Add(bytes.Repeat([]byte("\x00\""), pipe.MaxLog), uint16(60000))
	f.Add(bytes.Repeat([]byte("€"), pipe.MaxLog/2), uint16(50001))
	f.Fuzz(func(t *testing.T, output []byte, step uint16) {
		told := &tail{}
		var got []byte
		for visible := 0; len(got) < len(output); {
			visible = min(len(output), visible+1+int(step))
			final := visible == len(output)
			for {
				n := copy(told.buf[:], output[len(got):visible])
				cut := 0
				if n > 0 {
					cut = told.cut(told.buf[:n], final)
				}
				if cut == 0 {
					break
				}
				line, err := pipe.MarshalEvent(pipe.Event{Seq: 1, Time: time.Unix(0, 0), Type: pipe.TypeLog, Job: "j", Attempt: 1, Log: &pipe.Log{Offset: int64(len(got)), Data: told.buf[:cut]}})
				if err != nil {
					t.Fatalf("%d bytes: %v", cut, err)
				}
				e, err := pipe.ParseEvent(line)
				if err != nil || !bytes.Equal(e.Log.Data, told.buf[:cut]) {
					t.Fatalf("%q became %q, %v", told.buf[:cut], line, err)
				}
				got = append(got, told.buf[:cut]...)
			}
			if final && len(got) < len(output) {
				t.Fatalf("%d of %d bytes were told", len(got), len(output))
			}
		}
		if !bytes.Equal(got, output) {
			t.Error("other output was told")
		}
	})
}

// FuzzSystems: whatever lies in the file, hello lists systems that can be
// ones, this one first.
func FuzzSystems(f *testing.F) {
	f.Add([]byte("aarch64-linux\nx86_64-linux\n"))
	f.Add([]byte("\x00\n-linux\naarch64-linux aarch64-linux\n\xff-linux"))
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "systems")
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		all := (&Runner{cfg: Config{SystemsFile: path, Log: io.Discard}}).systems()
		if all[0] != native() || len(all) > maxSystems {
			t.Errorf("%q: %q", data, all)
		}
		for _, s := range all {
			if !systemPattern.MatchString(s) {
				t.Errorf("%q: %q", data, s)
			}
		}
	})
}
