package pipe

import (
	"errors"
	"strings"
	"testing"
)

// nested is an object with arrays in it, depth levels in all.
func nested(depth int) string {
	return `{"a":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + "}"
}

func TestParseReport(t *testing.T) {
	for name, tc := range map[string]struct {
		in, want string // no want: it is none
	}{
		"object":         {"{}", "{}"},
		"spread out":     {"\n{ \"a\" : [ 1.50 , \"b c\" ] }\n", `{"a":[1.50,"b c"]}`},
		"markup":         {`{"a":"<b>&"}`, `{"a":"\u003cb\u003e\u0026"}`},
		"brackets":       {`{"a":"\"[[[{"}`, `{"a":"\"[[[{"}`},
		"deepest":        {nested(maxReportDepth), nested(maxReportDepth)},
		"largest":        {`{"a":"` + strings.Repeat("x", MaxReport-8) + `"}`, `{"a":"` + strings.Repeat("x", MaxReport-8) + `"}`},
		"empty":          {"", ""},
		"blank":          {" \n", ""},
		"null":           {"null", ""},
		"list":           {"[]", ""},
		"two":            {"{}{}", ""},
		"cut":            {`{"a":`, ""},
		"not UTF-8":      {"{\"a\":\"\xff\"}", ""},
		"NUL":            {"{\"a\":\"\x00\"}", ""},
		"zeros":          {strings.Repeat("\x00", 512), ""},
		"too deep":       {nested(maxReportDepth + 1), ""},
		"far too deep":   {nested(20_000), ""},
		"too large":      {`{"a":"` + strings.Repeat("x", MaxReport) + `"}`, ""},
		"large of blank": {"{}" + strings.Repeat(" ", MaxReport), ""},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := ParseReport([]byte(tc.in))
			if tc.want == "" && !errors.Is(err, ErrReport) || tc.want != "" && err != nil || string(got) != tc.want {
				t.Errorf("%q, %v, want %q", got, err, tc.want)
			}
		})
	}
}

// The largest report, each of its bytes escaped, still fits into a line.
func TestLargestReportFitsALine(t *testing.T) {
	r, err := ParseReport([]byte(`{"a":"` + strings.Repeat("<", MaxReport-8) + `"}`))
	if err != nil {
		t.Fatal(err)
	}
	e := Event{Seq: 1, Time: when, Type: TypeFinished, Job: strings.Repeat("j", 63), Attempt: 1, Finished: &Finished{Status: StatusFailed, Report: r}}
	line, err := MarshalEvent(e)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ParseEvent(line); err != nil || string(got.Finished.Report) != string(r) {
		t.Errorf("%d bytes come back as %d, %v", len(r), len(got.Finished.Report), err)
	}
}
