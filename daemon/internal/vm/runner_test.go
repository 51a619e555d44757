package vm_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"testing"

	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"
)

// Both halves together: a job goes out, runs, its events come in over two
// boots of the VM, its artifact is fetched.
func TestWithTheRealRunner(t *testing.T) {
	srv := vmtest.New(t)
	run := vmtest.NewRunner(t, srv, nil)
	r := start(t, srv, newSink(pipe.Position{}), quick)
	r.sink.untilUp(t, 1)
	header := pipe.Header{Kind: pipe.KindJob, Owner: "o", Job: "a-job", Attempt: 1, Name: "hello"}
	request, err := pipe.Marshal(header, []byte("echo building; echo image >\"$OUT/image.iso\"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if err := r.b.Send(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	find := func(typ pipe.Type) func(*sink) bool {
		return func(s *sink) bool {
			for _, e := range s.entries {
				if e.Event.Type == typ {
					return true
				}
			}
			return false
		}
	}
	r.sink.until(t, "the outcome", find(pipe.TypeFinished))
	if log := strings.Join(r.sink.texts(), ""); log != "building\n" {
		t.Errorf("log %q", log)
	}
	var artifact *pipe.Artifact
	r.sink.until(t, "an artifact", func(s *sink) bool {
		for _, e := range s.entries {
			if e.Event.Artifact != nil {
				artifact = e.Event.Artifact
			}
			if f := e.Event.Finished; f != nil && f.Status != pipe.StatusSucceeded {
				t.Errorf("finished: %+v", f)
			}
		}
		return artifact != nil
	})
	var got bytes.Buffer
	if _, err := r.b.Copy(t.Context(), artifact.Path, 0, &got); err != nil {
		t.Fatal(err)
	}
	if sum := sha256.Sum256(got.Bytes()); hex.EncodeToString(sum[:]) != artifact.SHA256 {
		t.Errorf("got %q, not what the VM announced", got.String())
	}

	var before pipe.Generation
	r.sink.until(t, "a generation", func(s *sink) bool { before = s.position.Generation; return before != "" })
	run.Reboot()
	r.sink.until(t, "the next generation", func(s *sink) bool { return s.position.Generation != before })
	acknowledge, err := pipe.Marshal(pipe.Header{Kind: pipe.KindAcknowledge, Owner: "o", Job: "a-job", Attempt: 1}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.b.Send(t.Context(), acknowledge); err != nil {
		t.Fatal(err)
	}
	r.sink.until(t, "the acknowledgement's answer", func(s *sink) bool {
		for _, e := range s.entries {
			if a := e.Event.Accepted; a != nil && a.Request == "acknowledge/a-job/1" {
				return true
			}
		}
		return false
	})
	r.sink.until(t, "one link", func(s *sink) bool { return s.ups == 1 })
}
