package pipe

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func jobHeader() Header {
	return Header{Kind: KindJob, Owner: "sidecar-1", Job: "20260101-120000-abcdef", Attempt: 1, Name: "hello", Timeout: 3600}
}

const digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" // of nothing

func TestRequestRoundTrip(t *testing.T) {
	for name, h := range map[string]Header{
		"job":         jobHeader(),
		"acknowledge": {Kind: KindAcknowledge, Owner: "o", Job: "j", Attempt: 3, Consumed: &Position{Generation: "7-0123abcd", Offset: 1 << 40}},
		"cancel":      {Kind: KindCancel, Owner: "o", Job: "j", Attempt: 3},
		"consume":     {Kind: KindConsume, Owner: "o", Consumed: &Position{Generation: "7-0123abcd", Offset: 1 << 40}},
		"repeat":      {Kind: KindRepeat, Owner: "o", Consumed: &Position{Generation: "7-0123abcd"}},
		"take over":   {Kind: KindTakeOver, Owner: "o"},
		"inputs":      {Kind: KindJob, Owner: "o", Job: "j", Attempt: 1, Inputs: digest},
		"odd name":    {Kind: KindJob, Owner: "o", Job: "j", Attempt: 1, Name: "a\nb\x00\u2028</script>é\"'"},
	} {
		for _, body := range []string{"", "\n", "echo hi\n", "no newline", "#pipe {}\n", "\x00\xff\r\n", strings.Repeat("x", 1<<20)} {
			data, err := Marshal(h, []byte(body))
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			r, err := Parse(data)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			want := h
			want.Version, want.Length, want.SHA256 = r.Header.Version, int64(len(body)), r.Header.SHA256
			if diff := cmp.Diff(&want, r.Header); diff != "" || string(r.Body) != body || r.Header.Version != Version {
				t.Errorf("%s: body %.20q, header %s", name, r.Body, diff)
			}
			again, err := Marshal(*r.Header, r.Body)
			if err != nil || !bytes.Equal(again, data) {
				t.Errorf("%s: marshalled again it differs, %v", name, err)
			}
		}
	}
}

func TestRequestIsBash(t *testing.T) {
	data, err := Marshal(Header{Kind: KindJob, Owner: "o", Job: "j", Attempt: 1, Name: "x\necho no; `echo no`"}, []byte("echo yes\n"))
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "request")
	if err := os.WriteFile(name, data, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "bash", name).CombinedOutput()
	if err != nil || string(out) != "yes\n" {
		t.Errorf("bash says %q, %v", out, err)
	}
}

func TestRequestsWithoutHeader(t *testing.T) {
	for _, text := range []string{
		"", "uname -a", "uname -a\n", "#!/bin/sh\necho\n", "#pipe {}\n", "#pipe {}\n#pipe", "\n#pipe{}\n", "\n #pipe {}\n",
	} {
		r, err := Parse([]byte(text))
		if err != nil || r.Header != nil || string(r.Body) != text {
			t.Errorf("%q: %+v, %v", text, r, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	good, err := Marshal(jobHeader(), []byte("body"))
	if err != nil {
		t.Fatal(err)
	}
	change := func(from, to string) string { return strings.Replace(string(good), from, to, 1) }
	for name, test := range map[string]struct {
		data  string
		want  error
		named bool // the header comes back all the same
	}{
		"too large":          {strings.Repeat("x", MaxRequest+1), ErrTooLarge, false},
		"line without end":   {"\n#pipe {}", ErrHeader, false},
		"header too long":    {"\n#pipe " + strings.Repeat(" ", MaxHeader) + "{}\n", ErrHeader, false},
		"no JSON":            {"\n#pipe nonsense\n", ErrHeader, false},
		"two objects":        {"\n#pipe {}{}\n", ErrHeader, false},
		"wrong type":         {change(`"attempt":1`, `"attempt":"1"`), ErrHeader, false},
		"another version":    {change(`"version":1`, `"version":2`), ErrVersion, true},
		"no version":         {change(`"version":1,`, ``), ErrVersion, true},
		"body changed":       {string(good) + "!", ErrDigest, true},
		"body cut":           {string(good[:len(good)-1]), ErrDigest, true},
		"body of its length": {strings.Replace(string(good), "\nbody", "\nBody", 1), ErrDigest, true},
		"no owner":           {change(`"sidecar-1"`, `""`), ErrHeader, false},
		"odd owner":          {change(`"sidecar-1"`, `"a b"`), ErrHeader, false},
		"kind":               {change(`"kind":"job"`, `"kind":"jab"`), ErrHeader, false},
		"consume nothing":    {strings.Replace(change(`"kind":"job"`, `"kind":"consume"`), `"job":"20260101-120000-abcdef","attempt":1,`, ``, 1), ErrHeader, false},
		"repeat nothing":     {change(`"kind":"job"`, `"kind":"repeat"`), ErrHeader, false},
		"cancel nothing":     {strings.Replace(change(`"kind":"job"`, `"kind":"cancel"`), `"attempt":1`, `"attempt":0`, 1), ErrHeader, false},
		"job":                {change(`20260101`, `../../etc`), ErrHeader, false},
		"attempt":            {change(`"attempt":1`, `"attempt":0`), ErrHeader, false},
		"timeout":            {change(`"timeout":3600`, `"timeout":-1`), ErrHeader, false},
		"sha256":             {change(`"sha256":"`, `"sha256":"X`), ErrHeader, false},
		"length":             {change(`"length":4`, `"length":-4`), ErrHeader, false},
		"name":               {change(`"name":"hello"`, `"name":"`+strings.Repeat("x", 256)+`"`), ErrHeader, false},
		"inputs":             {change(`"name":"hello"`, `"inputs":"abc"`), ErrHeader, false},
		"consumed":           {change(`"name":"hello"`, `"consumed":{"generation":"0-12345678","offset":0}`), ErrHeader, false},
		"consumed offset":    {change(`"name":"hello"`, `"consumed":{"generation":"1-12345678","offset":-1}`), ErrHeader, false},
	} {
		r, err := Parse([]byte(test.data))
		if !errors.Is(err, test.want) || (r.Header != nil) != test.named {
			t.Errorf("%s: %v, header %v", name, err, r.Header)
		}
	}
}

func TestMarshalRefuses(t *testing.T) {
	h := jobHeader()
	h.Job = "UPPER"
	if _, err := Marshal(h, nil); !errors.Is(err, ErrHeader) {
		t.Errorf("odd job: %v", err)
	}
	if _, err := Marshal(jobHeader(), make([]byte, MaxRequest)); !errors.Is(err, ErrTooLarge) {
		t.Errorf("too large: %v", err)
	}
}

func TestGeneration(t *testing.T) {
	for g, want := range map[Generation]uint64{
		"1-00000000": 1, "12-89abcdef": 12, "999999999999999999-00000000": 999999999999999999,
		"": 0, "1": 0, "0-00000000": 0, "01-00000000": 0, "1-0000000": 0, "1-0000000G": 0, "-1-00000000": 0,
		"1-00000000\n": 0, "1000000000000000000-00000000": 0, "../1-00000000": 0,
	} {
		if n, ok := g.Number(); n != want || ok != (want > 0) {
			t.Errorf("%q: %d, %v", g, n, ok)
		}
	}
	if f := Generation("7-0123abcd").File(); f != "pipe_out.7-0123abcd" {
		t.Error(f)
	}
}

func TestValidID(t *testing.T) {
	for id, want := range map[string]bool{
		"a": true, "0-a": true, strings.Repeat("a", 63): true,
		"": false, "-a": false, "A": false, "a/b": false, "a.b": false, "a\n": false, strings.Repeat("a", 64): false,
	} {
		if ValidID(id) != want {
			t.Errorf("%q: %v", id, !want)
		}
	}
}

func TestKey(t *testing.T) {
	h := jobHeader()
	if got := h.Key(); got != "job/20260101-120000-abcdef/1" {
		t.Error(got)
	}
	h.Kind = KindTakeOver
	if got := h.Key(); got != "take-over/sidecar-1" {
		t.Error(got)
	}
}

// What Parse takes, Marshal writes in a form that means the same and stays.
func FuzzParse(f *testing.F) {
	needSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Parse(data)
		if err != nil {
			for _, sentinel := range []error{ErrHeader, ErrVersion, ErrDigest, ErrTooLarge} {
				if errors.Is(err, sentinel) {
					return
				}
			}
			t.Fatalf("an error that nobody can tell: %v", err)
		}
		if r.Header == nil {
			if !bytes.Equal(r.Body, data) {
				t.Fatal("an anonymous request isn't the whole file")
			}
			return
		}
		written, err := Marshal(*r.Header, r.Body)
		if errors.Is(err, ErrTooLarge) {
			return // the form we write can be longer
		}
		if err != nil {
			t.Fatal(err)
		}
		again, err := Parse(written)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(r, again); diff != "" {
			t.Fatal(diff)
		}
		if once, _ := Marshal(*again.Header, again.Body); !bytes.Equal(once, written) {
			t.Fatal("marshalling isn't stable")
		}
	})
}

// needSeeds fails a fuzz test whose seeds are gone: it would pass on nothing.
func needSeeds(f *testing.F) {
	f.Helper()
	seeds, err := filepath.Glob(filepath.Join("testdata", "fuzz", f.Name(), "*"))
	if err != nil || len(seeds) < 3 {
		f.Fatalf("%d seeds in testdata/fuzz/%s: %v", len(seeds), f.Name(), err)
	}
}
