package job

import (
	"strings"
	"testing"

	"osbuilder/pipe"
)

func TestReportedFailure(t *testing.T) {
	long := strings.Repeat("ü", 600)
	for name, tc := range map[string]struct {
		report string
		want   Failure
	}{
		"none":          {"", Failure{}},
		"success":       {`{"kind":"nixos-image","nix":"2.34"}`, Failure{}},
		"other form":    {`{"error":"it broke"}`, Failure{}},
		"other type":    {`{"error":{"summary":7}}`, Failure{}},
		"no summary":    {`{"error":{"advice":"do"}}`, Failure{}},
		"not JSON":      {`{`, Failure{}},
		"whole":         {`{"error":{"class":"evaluation","summary":"undefined variable 'x'","at":"a.nix:3:5","advice":"Define it.","lines":["l"]}}`, Failure{"evaluation", "undefined variable 'x'", "a.nix:3:5", "Define it."}},
		"control":       {`{"error":{"summary":"\u001b[31mred\r\n\ttext \u202e\u0000"}}`, Failure{Summary: "[31mred text"}},
		"long":          {`{"error":{"summary":"` + long + `"}}`, Failure{Summary: long[:2*499] + "…"}},
		"blank summary": {`{"error":{"summary":" \n"}}`, Failure{}},
	} {
		got, ok := ReportedFailure(pipe.Report(tc.report))
		if got != tc.want || ok != (tc.want.Summary != "") {
			t.Errorf("%s: %+v, %v, want %+v", name, got, ok, tc.want)
		}
	}
	if got := (Failure{Summary: "s", At: "a:1"}).Text(); got != "s (at a:1)" {
		t.Errorf("text %q", got)
	}
	if got := (Failure{Summary: "s"}).Text(); got != "s" {
		t.Errorf("text %q", got)
	}
}

func TestReportedNix(t *testing.T) {
	for report, want := range map[string]string{
		"": "", "{}": "", `{"nix":7}`: "", `{"nix":"2.26.3"}`: "2.26.3", `{"nix":"2\n3"}`: "2 3",
	} {
		if got := ReportedNix(pipe.Report(report)); got != want {
			t.Errorf("%s: %q, want %q", report, got, want)
		}
	}
}
