package pipe

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"
)

// FuzzParseReport: what is taken as a report fits into an event, and comes out
// of it as it went in.
func FuzzParseReport(f *testing.F) {
	for _, seed := range []string{
		`{}`, ` {"kind":"nixos-image","error":{"class":"disk","summary":"<full> & \u2028"}} `, `{"a":"\"{[\\"}`, `[1]`, `null`, `{"a":`,
		"{\"a\":\"\xff\"}", "", " ", `{"a":` + string(bytes.Repeat([]byte("["), 70)) + string(bytes.Repeat([]byte("]"), 70)) + `}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ParseReport(data)
		if err != nil {
			return
		}
		line, err := MarshalEvent(Event{Seq: 1, Time: time.Unix(0, 0).UTC(), Type: TypeFinished, Job: "j", Attempt: 1, Finished: &Finished{Status: StatusFailed, Report: r}})
		if err != nil {
			t.Fatalf("%q: %v", data, err)
		}
		e, err := ParseEvent(line)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if !bytes.Equal(e.Finished.Report, r) {
			t.Errorf("%q went in, %q came out", r, e.Finished.Report)
		}
		var fields map[string]any
		if err := json.Unmarshal(r, &fields); err != nil {
			t.Errorf("%q: %v", r, err)
		}
	})
}
