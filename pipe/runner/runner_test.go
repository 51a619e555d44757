package runner

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/pipe"
)

func TestJob(t *testing.T) {
	m := boot(t)
	m.submit("one", "echo hello\necho 'and more' >&2\necho image >$OUT/a.img\n")
	f := m.finished("one")
	if f.Status != pipe.StatusSucceeded || f.ExitCode == nil || *f.ExitCode != 0 {
		t.Errorf("finished: %+v", f)
	}
	if got, want := m.output("one"), "hello\nand more\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	if f.LogLength != int64(len("hello\nand more\n")) || f.Artifacts != 1 {
		t.Errorf("finished: %+v", f)
	}
	var types []pipe.Type
	for i, e := range m.events() {
		types = append(types, e.Type)
		if e.Seq != uint64(i)+1 {
			t.Errorf("event %d has number %d", i, e.Seq)
		}
	}
	want := []pipe.Type{
		pipe.TypeHello, pipe.TypeAccepted, pipe.TypeStarted, pipe.TypeLog, pipe.TypeArtifact, pipe.TypeFinished,
	}
	if d := cmp.Diff(want, types); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
	a := m.await("artifact", 1, ofType(pipe.TypeArtifact)).Artifact
	data, err := os.ReadFile(a.Path)
	if err != nil {
		t.Fatal(err)
	}
	if string(data) != "image\n" || a.Size != 6 || a.Name != "a.img" || a.SHA256 != digestOf("image\n") {
		t.Errorf("artifact %+v holds %q", a, data)
	}
}

func digestOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}
