package pipe

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var when = time.Date(2026, 1, 2, 3, 4, 5, 600, time.UTC)

func events() []Event {
	code := 3
	all := []Event{
		{Type: TypeHello, Hello: &Hello{Generation: "1-0123abcd", Protocol: 1, Runner: "1", Image: "debian-13", Slots: 2, Systems: []string{"x86_64-linux"}, Free: 1 << 40, Jobs: []JobRef{{"a-job", 1}}}},
		{Type: TypeAccepted, Accepted: &Accepted{Request: "job/a-job/1"}, Job: "a-job", Attempt: 1},
		{Type: TypeAccepted, Accepted: &Accepted{Request: "take-over/o"}},
		{Type: TypeRefused, Refused: &Refused{Reason: ReasonOwner, Message: "owned by", OwnedBy: "o", Retryable: true}},
		{Type: TypeStarted, Job: "a-job", Attempt: 2, Started: &Started{Name: "n", Slot: 1, Unit: "job-a-job-2", User: "job-1"}},
		{Type: TypeProgress, Job: "a-job", Attempt: 1, Progress: &Progress{Phase: "copy", Done: 1, Expected: 2, Unit: "bytes"}},
		{Type: TypeArtifact, Job: "a-job", Attempt: 1, Artifact: &Artifact{Name: "a/b.iso", Path: "/data/a", Size: 0, SHA256: digest, Download: "scp …"}},
		{Type: TypeFinished, Job: "a-job", Attempt: 1, Finished: &Finished{Status: StatusFailed, ExitCode: &code, Duration: 5, LogLength: 7}},
		{Type: TypeFinished, Job: "a-job", Attempt: 1, Finished: &Finished{Status: StatusFailed, Report: Report(`{"kind":"k","n":1.50,"s":"\u003c\u2028é"}`)}},
		{Type: TypeRefused, Refused: &Refused{Reason: ReasonInputs, Message: "upload them", Retryable: true}},
	}
	for _, data := range []string{"", "a line\n", "\x00\x1b[0m\r\n", "\xff\xfe", "é\u2028\ufffd", "half a rune \xc3", "</script>&"} {
		all = append(all, Event{Type: TypeLog, Job: "a-job", Attempt: 1, Log: &Log{Offset: 1 << 50, Data: []byte(data)}})
	}
	for i := range all {
		all[i].Seq, all[i].Time = uint64(i+1), when
	}
	return all
}

func TestEventRoundTrip(t *testing.T) {
	for _, e := range events() {
		line, err := MarshalEvent(e)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.IndexByte(line, 0) >= 0 || bytes.Count(line, []byte("\n")) != 1 || line[len(line)-1] != '\n' {
			t.Errorf("%q is no line of its own", line)
		}
		for _, l := range [][]byte{line, line[:len(line)-1]} {
			got, err := ParseEvent(l)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(e, got); diff != "" {
				t.Error(diff)
			}
		}
	}
}

func TestLargestLogFitsALine(t *testing.T) {
	for _, b := range []string{"\x00", "\xff", "\u2028", "x"} {
		data := []byte(strings.Repeat(b, MaxLog))[:MaxLog]
		_, err := MarshalEvent(Event{Seq: 1, Time: when, Type: TypeLog, Job: strings.Repeat("j", 63), Attempt: 1 << 30, Log: &Log{Offset: 1 << 60, Data: data}})
		if err != nil {
			t.Errorf("%q: %v", b, err)
		}
	}
}

func TestMarshalEventRefuses(t *testing.T) {
	long := Event{Seq: 1, Type: TypeRefused, Refused: &Refused{Message: strings.Repeat("x", MaxLine)}}
	if _, err := MarshalEvent(long); !errors.Is(err, ErrLineTooLong) {
		t.Errorf("too long: %v", err)
	}
	if _, err := MarshalEvent(Event{Seq: 1, Type: TypeHello}); !errors.Is(err, ErrEvent) {
		t.Errorf("without payload: %v", err)
	}
}

func TestParseEventRefuses(t *testing.T) {
	const head = `{"seq":1,"time":"2026-01-01T00:00:00Z",`
	job := head + `"job":"j","attempt":1,`
	for name, test := range map[string]struct {
		line string
		want error
	}{
		"nothing":               {"", ErrEvent},
		"null":                  {"null", ErrEvent},
		"no type":               {"{}", ErrEvent},
		"two lines":             {head + `"type":"accepted","accepted":{}}` + "\n\n\n{}", ErrEvent},
		"two objects":           {head + `"type":"accepted","accepted":{}}{}`, ErrEvent},
		"cut":                   {head + `"type":"acc`, ErrEvent},
		"wrong type":            {`{"seq":"1"}`, ErrEvent},
		"negative seq":          {`{"seq":-1}`, ErrEvent},
		"no seq":                {`{"type":"accepted","accepted":{}}`, ErrEvent},
		"no payload":            {head + `"type":"accepted"}`, ErrEvent},
		"null payload":          {head + `"type":"accepted","accepted":null}`, ErrEvent},
		"another's payload":     {head + `"type":"accepted","refused":{}}`, ErrEvent},
		"two payloads":          {head + `"type":"accepted","accepted":{},"refused":{}}`, ErrEvent},
		"unknown type":          {head + `"type":"telepathy","telepathy":{}}`, ErrUnknownType},
		"hello of nothing":      {head + `"type":"hello","hello":{"generation":"x"}}`, ErrEvent},
		"no job":                {head + `"type":"started","started":{}}`, ErrEvent},
		"odd job":               {head + `"job":"../x","attempt":1,"type":"started","started":{}}`, ErrEvent},
		"no attempt":            {head + `"job":"j","type":"started","started":{}}`, ErrEvent},
		"log without data":      {job + `"type":"log","log":{"offset":0}}`, ErrEvent},
		"log with both":         {job + `"type":"log","log":{"offset":0,"text":"","base64":""}}`, ErrEvent},
		"log with no base64":    {job + `"type":"log","log":{"offset":0,"base64":"?"}}`, ErrEvent},
		"log before the start":  {job + `"type":"log","log":{"offset":-1,"text":""}}`, ErrEvent},
		"artifact of less than": {job + `"type":"artifact","artifact":{"size":-1,"sha256":"` + digest + `"}}`, ErrEvent},
		"report is a list":      {job + `"type":"finished","finished":{"report":[]}}`, ErrEvent},
		"report is too deep":    {job + `"type":"finished","finished":{"report":` + nested(maxReportDepth+1) + `}}`, ErrEvent},
		"artifact's digest":     {job + `"type":"artifact","artifact":{"size":1,"sha256":"` + strings.ToUpper(digest) + `"}}`, ErrEvent},
	} {
		if _, err := ParseEvent([]byte(test.line)); !errors.Is(err, test.want) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
	if _, err := ParseEvent([]byte(head + `"type":"accepted","accepted":{"request":"r","new":1},"newer":[]}`)); err != nil {
		t.Errorf("fields that nobody knows: %v", err)
	}
	if e, err := ParseEvent([]byte(head + `"type":"telepathy"}`)); err == nil || e.Type != "telepathy" {
		t.Errorf("an unknown type isn't named: %+v", e)
	}
}

// collect pushes data in pieces that end at cuts.
func collect(s *Splitter, data []byte, cuts ...int) (lines []string, ends []int64, err error) {
	emit := func(line []byte, end int64) error {
		lines, ends = append(lines, string(line)), append(ends, end)
		return nil
	}
	from := 0
	for _, cut := range append(cuts, len(data)) {
		if err := s.Push(bytes.Clone(data[from:cut]), emit); err != nil {
			return lines, ends, err
		}
		from = cut
	}
	return lines, ends, nil
}

func TestSplitterAtEveryChunking(t *testing.T) {
	data := []byte("one\n\ntwo two\nthree\n\n\nrest")
	wantLines := []string{"one\n", "\n", "two two\n", "three\n", "\n", "\n"}
	wantEnds := []int64{104, 105, 113, 119, 120, 121}
	for i := 0; i <= len(data); i++ {
		for j := i; j <= len(data); j++ {
			s := Splitter{Offset: 100}
			lines, ends, err := collect(&s, data, i, j)
			if err != nil || !cmp.Equal(lines, wantLines) || !cmp.Equal(ends, wantEnds) || s.Offset != 121 {
				t.Fatalf("cut at %d and %d: %q, %d, offset %d, %v", i, j, lines, ends, s.Offset, err)
			}
		}
	}
	s := Splitter{}
	every := make([]int, len(data))
	for i := range every {
		every[i] = i
	}
	if lines, _, err := collect(&s, data, every...); err != nil || !cmp.Equal(lines, wantLines) {
		t.Errorf("byte by byte: %q, %v", lines, err)
	}
}

func TestSplitterBounds(t *testing.T) {
	longest := append(bytes.Repeat([]byte("x"), MaxLine-1), '\n')
	for _, cut := range []int{0, 1, MaxLine / 2, MaxLine - 1} {
		var s Splitter
		if lines, _, err := collect(&s, longest, cut); err != nil || len(lines) != 1 {
			t.Errorf("the longest line, cut at %d: %v", cut, err)
		}
		s = Splitter{}
		_, _, err := collect(&s, append([]byte("ok\nx"), longest...), cut)
		if !errors.Is(err, ErrLineTooLong) || s.Offset != 3 {
			t.Errorf("a longer line, cut at %d: %v at %d", cut, err, s.Offset)
		}
		s = Splitter{}
		if _, _, err := collect(&s, bytes.Repeat([]byte("x"), MaxLine+1), cut); !errors.Is(err, ErrLineTooLong) {
			t.Errorf("an endless line, cut at %d: %v", cut, err)
		}
	}
}

func TestSplitterNoticesHoles(t *testing.T) {
	data := []byte("one\ntw\x00o\nthree\n")
	for cut := range len(data) {
		var s Splitter
		lines, _, err := collect(&s, data, cut)
		if !errors.Is(err, ErrPunched) || len(lines) != 1 || s.Offset != 4 {
			t.Errorf("cut at %d: %q, %v at %d", cut, lines, err, s.Offset)
		}
	}
}

func TestSplitterStopsWithItsTaker(t *testing.T) {
	var s Splitter
	full := errors.New("full")
	n := 0
	err := s.Push([]byte("one\ntwo\n"), func([]byte, int64) error { n++; return full })
	if !errors.Is(err, full) || n != 1 || s.Offset != 4 {
		t.Errorf("%v after %d lines at %d", err, n, s.Offset)
	}
}

// What ParseEvent takes, MarshalEvent writes in a form that means the same
// and stays.
func FuzzParseEvent(f *testing.F) {
	needSeeds(f)
	f.Fuzz(func(t *testing.T, line []byte) {
		e, err := ParseEvent(line)
		if err != nil {
			if !errors.Is(err, ErrEvent) && !errors.Is(err, ErrUnknownType) {
				t.Fatalf("an error that nobody can tell: %v", err)
			}
			return
		}
		written, err := MarshalEvent(e)
		if errors.Is(err, ErrLineTooLong) {
			return // the form we write can be longer
		}
		if err != nil {
			t.Fatal(err)
		}
		again, err := ParseEvent(written)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(e, again, cmpopts.EquateEmpty()); diff != "" {
			t.Fatal(diff)
		}
		if once, _ := MarshalEvent(again); !bytes.Equal(once, written) {
			t.Fatal("marshalling isn't stable")
		}
	})
}

// However the bytes come, the lines are the same, and their ends are where
// they are.
func FuzzSplitter(f *testing.F) {
	needSeeds(f)
	f.Fuzz(func(t *testing.T, data []byte, a, b uint16) {
		i, j := int(a), int(b)
		if i > j {
			i, j = j, i
		}
		i, j = min(i, len(data)), min(j, len(data))
		var s, whole Splitter
		lines, ends, err := collect(&s, data, i, j)
		wantLines, wantEnds, wantErr := collect(&whole, data)
		if !cmp.Equal(lines, wantLines) || !cmp.Equal(ends, wantEnds) || s.Offset != whole.Offset {
			t.Fatalf("%q at %d, in one piece %q at %d", lines, ends, wantLines, wantEnds)
		}
		if (err == nil) != (wantErr == nil) {
			t.Fatalf("%v, in one piece %v", err, wantErr)
		}
		var end int64
		for k, line := range lines {
			end += int64(len(line))
			if ends[k] != end || strings.IndexByte(line, '\n') != len(line)-1 || !bytes.HasPrefix(data[end-int64(len(line)):], []byte(line)) {
				t.Fatalf("line %q ends at %d", line, ends[k])
			}
		}
		if holed := bytes.IndexByte(data, 0) >= 0; holed != errors.Is(err, ErrPunched) && len(data) <= MaxLine {
			t.Fatalf("a NUL: %v, %v", holed, err)
		}
	})
}
