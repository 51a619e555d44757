package job

import (
	"testing"
	"unicode"
	"unicode/utf8"

	"osbuilder/pipe"
)

// FuzzReportedFailure: a job says what it likes in its report; what is shown
// of it is lines of bounded length that a terminal can show.
func FuzzReportedFailure(f *testing.F) {
	for _, seed := range []string{
		`{"error":{"class":"disk","summary":"full\n\u001b[31m","at":"a.nix:1:2","advice":"buy"},"nix":"2.26"}`,
		`{"error":{"summary":"\ud800\u202e \u0000"}}`, `{"error":1}`, `null`, `{`, ``,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, report []byte) {
		failure, said := ReportedFailure(pipe.Report(report))
		if said == (failure.Summary == "") {
			t.Errorf("%q: said %v, %+v", report, said, failure)
		}
		for _, line := range []string{failure.Class, failure.Summary, failure.At, failure.Advice, failure.Text(), ReportedNix(pipe.Report(report))} {
			if !utf8.ValidString(line) || utf8.RuneCountInString(line) > 1000 {
				t.Errorf("%q: %q", report, line)
			}
			for _, r := range line {
				if !unicode.IsPrint(r) {
					t.Errorf("%q: %q", report, line)
				}
			}
		}
	})
}
