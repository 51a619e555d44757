package explain_test

import (
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nixlog"
	"osbuilder/vmimage/internal/nixlog/nixlogtest"
)

// A want is what is to be said of a recording of that name, by every version
// and way.
type want struct {
	class   explain.Class
	summary string            // begins with
	at      string            // in the drop
	lines   []string          // that are among them
	but     map[string]string // version → another place: some say less
}

var wants = map[string]want{
	"build-fail":        {class: explain.Build, summary: "building broken-1.0 failed with exit code 2", lines: []string{"main.c:3: error: expected ';'"}},
	"build-dependents":  {class: explain.Build, summary: "building broken-1.0 failed with exit code 2", lines: []string{"main.c:3: error: expected ';'"}},
	"build-empty":       {class: explain.Build, summary: "building empty-1.0 failed: it ended well, but made nothing"},
	"build-killed":      {class: explain.Killed, summary: "the builder of shot-1.0 was ended by signal 9 (Killed)", lines: []string{"before"}},
	"build-segfault":    {class: explain.Killed, summary: "the builder of crash-1.0 was ended by signal 11", lines: []string{"before"}},
	"build-memory":      {class: explain.Memory, summary: "out of memory while building hungry-1.0", lines: []string{"eating"}},
	"build-forkless":    {class: explain.Memory, summary: "out of memory while building forkless-1.0"},
	"build-disk":        {class: explain.Disk, summary: "no space left on the builder VM's data disk, while building large-1.0"},
	"build-foreign":     {class: explain.Unsupported, summary: "building arm-1.0 wants a machine of the system aarch64-linux; this builder VM is x86_64-linux"},
	"build-feature":     {class: explain.Unsupported, summary: "building vm-1.0 wants the feature kvm"},
	"build-hash":        {class: explain.Hash, summary: "a download is not what was expected: source-1.0.tar.gz", lines: []string{"got: sha256-YB/PfWer+wvvhuHf3h6vgsY4q+L+yyfandOxNcf2fwE="}},
	"build-timeout":     {class: explain.Timeout, summary: "building slow-1.0 took longer than 2 seconds", lines: []string{"working"}},
	"build-silent":      {class: explain.Timeout, summary: "building slow-1.0 ", lines: []string{"working"}}, // 2.34 doesn't tell them apart
	"build-fetch":       {class: explain.Network, summary: "no network: can't download https://example.invalid/fetched-1.0.tar.gz: Could"},
	"build-curl":        {class: explain.Network, summary: "no network: can't download page.html: Could not resolve host: example.invalid"},
	"build-daemondies":  {class: explain.Daemon, summary: "nix-daemon in the builder VM ended during the build"},
	"build-nodaemon":    {class: explain.Daemon, summary: "nix-daemon in the builder VM can't be reached: cannot connect to socket"},
	"eval-syntax":       {class: explain.Evaluation, summary: "syntax error, unexpected '=', expecting ';'", at: "syntax.nix:3:27"},
	"eval-undefined":    {class: explain.Evaluation, summary: "undefined variable 'hello'", at: "undefined.nix:2:16"},
	"eval-imported":     {class: explain.Evaluation, summary: "undefined variable 'hello'", at: "undefined.nix:2:16"},
	"eval-throw":        {class: explain.Evaluation, summary: "this host needs a key", at: "throw.nix:2:11", but: map[string]string{"2.8": "throw.nix:2"}},
	"eval-abort":        {class: explain.Evaluation, summary: "evaluation aborted with the following error message: 'not like this'", at: "abort.nix:1:11", but: map[string]string{"2.8": "abort.nix:1"}},
	"eval-assert":       {class: explain.Evaluation, at: "assert.nix:1:11"},
	"eval-recursion":    {class: explain.Evaluation, summary: "infinite recursion encountered", at: "recursion.nix:2:7"},
	"eval-type":         {class: explain.Evaluation, summary: "cannot coerce an integer to a string", at: "type.nix:1:21"},
	"eval-missing-file": {class: explain.Evaluation, at: "missing-file.nix:1:11", but: map[string]string{"2.8": "missing-file.nix:1"}},
	"eval-search-path":  {class: explain.Evaluation, summary: "file 'nixos-unstable' was not found in the Nix search path", at: "search-path.nix:1:18"},
	"eval-download":     {class: explain.Network, summary: "no network: can't download https://example.invalid/x.tar.gz: Could", at: "download.nix:1:19", but: map[string]string{"2.8": "download.nix:1:11"}},
	"eval-memory":       {class: explain.Memory, summary: "out of memory while evaluating the configuration"},
	"eval-disk":         {class: explain.Disk, summary: "no space left on the builder VM's data disk"},

	"eval-missing-attribute":     {class: explain.Evaluation, summary: "attribute 'htopp' missing", at: "missing-attribute.nix:5:16"},
	"eval-module-option":         {class: explain.Evaluation, summary: "A definition for option `networking.hostName' is not of type", at: "option.nix:2"},
	"eval-module-unknown-option": {class: explain.Evaluation, summary: "The option `services.opensssh' does not exist", at: "unknown-option.nix:2"},
	"eval-module-conflict":       {class: explain.Evaluation, summary: "The option `networking.hostName' has conflicting definition values", at: "conflicting.nix:1"},
	"eval-module-module-type":    {class: explain.Evaluation, summary: "A definition for option `services.openssh.ports' is not of type", at: "module-type.nix:2"},
	"eval-module-assertion":      {class: explain.Evaluation, summary: "failed assertion: this host must have a name", at: "assertion.nix:5"},
	"eval-module-import-missing": {class: explain.Evaluation, at: "import-missing.nix:2"},
	"eval-module-package":        {class: explain.Evaluation, summary: "attribute 'htopp' missing", at: "package.nix:3:34"},
	"eval-module-infinite":       {class: explain.Evaluation, summary: "infinite recursion encountered", at: "infinite.nix:3:25", but: map[string]string{"2.8": ""}},
	"eval-module-thrown":         {class: explain.Evaluation, summary: "this host needs a key", at: "thrown.nix:4:49", but: map[string]string{"2.8": "thrown.nix:4"}},
}

// facts are those of a recorded failure.
func facts(r nixlogtest.Recording) explain.Facts {
	log := nixlog.New(func(string) {}, time.Now)
	for _, line := range r.Lines {
		log.Line(line)
	}
	step := explain.Realise
	if strings.HasPrefix(r.Name, "eval-") {
		step = explain.Evaluate
	}
	f := explain.FactsOf(step, log)
	f.Source = "/src/eval"
	f.Entry = strings.TrimPrefix(strings.TrimPrefix(r.Name, "eval-"), "module-") + ".nix"
	f.OOM = r.Name == "build-memory" // the kernel's count says it
	f.Read = func(file string) ([]byte, error) {
		return os.ReadFile(strings.Replace(file, "/src", "../nixlog/testdata/cases", 1))
	}
	return f
}

func TestEveryClassInTheWordsOfEveryVersion(t *testing.T) {
	seen := map[string]map[string]bool{}
	for _, r := range nixlogtest.Read(t, "../nixlog/testdata") {
		if r.Exit == 0 {
			continue
		}
		t.Run(r.ID(), func(t *testing.T) {
			want, ok := wants[r.Name]
			if !ok {
				t.Fatalf("no expectation for %s", r.Name)
			}
			if seen[r.Name] == nil {
				seen[r.Name] = map[string]bool{}
			}
			seen[r.Name][r.Version] = true
			got := explain.Explain(facts(r))
			at := want.at
			if other, ok := want.but[r.Version]; ok {
				at = other
			}
			if got.Class != want.class || !strings.HasPrefix(got.Summary, want.summary) || got.At != at {
				t.Errorf("got  [%s] %s (%s)\nwant [%s] %s (%s)", got.Class, got.Summary, got.At, want.class, want.summary, at)
			}
			for _, line := range want.lines {
				if !slices.Contains(got.Lines, line) {
					t.Errorf("line %q is not among %q", line, got.Lines)
				}
			}
			if strings.HasPrefix(got.Summary, "no network: ") && !strings.Contains(got.Advice, "substituters, in VM_NIX_CONF") {
				t.Errorf("nix.conf knows no proxy, only caches; advice %q", got.Advice)
			}
			if got.Advice == "" {
				t.Error("it doesn't say what to do")
			}
			if strings.Contains(got.Summary, "\n") || got.Summary == "" {
				t.Errorf("the summary %q is not one line", got.Summary)
			}
		})
	}
	for name := range wants {
		for _, version := range nixlogtest.Versions {
			if !seen[name][version] {
				t.Errorf("%s was not recorded with %s", name, version)
			}
		}
	}
}

func TestWhatNixDoesNotSay(t *testing.T) {
	nothing := explain.Facts{Step: explain.Evaluate}
	for _, test := range []struct {
		name string
		with func(*explain.Facts)
		want explain.Class
	}{
		{"nothing at all", func(*explain.Facts) {}, explain.Internal},
		{"the job was ended", func(f *explain.Facts) { f.Stopped = true }, explain.Killed},
		{"the kernel killed the evaluator", func(f *explain.Facts) { f.Signal = syscall.SIGKILL }, explain.Memory},
		{"the evaluator crashed", func(f *explain.Facts) { f.Signal = syscall.SIGSEGV }, explain.Killed},
		{"interrupted", func(f *explain.Facts) {
			f.Errors = []nixlog.Error{{Message: "error: interrupted by the user"}}
		}, explain.Killed},
		{"our own expression refuses", func(f *explain.Facts) {
			f.Errors = []nixlog.Error{{Message: "error: osbuilder: unsupported: this nixpkgs makes no 'x' images", Cause: "osbuilder: unsupported: this nixpkgs makes no 'x' images"}}
		}, explain.Unsupported},
		{"a message of another time", func(f *explain.Facts) {
			f.Step = explain.Realise
			f.Errors = []nixlog.Error{{Message: "error: the moon is full"}}
		}, explain.Build},
		{"text alone", func(f *explain.Facts) { f.Text = []string{"nix-store: cannot execute"} }, explain.Internal},
		{"a full disk, said by a builder", func(f *explain.Facts) {
			f.Step = explain.Realise
			f.Errors = []nixlog.Error{{Message: "error: builder for '/nix/store/00000000000000000000000000000000-x.drv' failed with exit code 1"}}
			f.BuildLog = func(string) []string { return []string{"mksquashfs: write failed: No space left on device"} }
		}, explain.Disk},
	} {
		t.Run(test.name, func(t *testing.T) {
			f := nothing
			test.with(&f)
			got := explain.Explain(f)
			if got.Class != test.want || got.Summary == "" || got.Advice == "" {
				t.Errorf("got %+v, want class %s", got, test.want)
			}
		})
	}
}

// A signal 9 without the kernel's word is not called want of memory for sure.
func TestSignal9IsMemoryOnlyWhereTheKernelSaysSo(t *testing.T) {
	for _, r := range nixlogtest.Read(t, "../nixlog/testdata") {
		if r.Name != "build-killed" {
			continue
		}
		f := facts(r)
		if got := explain.Explain(f); got.Class != explain.Killed {
			t.Errorf("%s: %s without the kernel's count", r.ID(), got.Class)
		}
		f.OOM = true
		if got := explain.Explain(f); got.Class != explain.Memory {
			t.Errorf("%s: %s with the kernel's count", r.ID(), got.Class)
		}
	}
}

func TestTheDropsFilesHaveTheirShortNames(t *testing.T) {
	got := explain.Explain(explain.Facts{
		Step: explain.Evaluate, Source: "/jobs/1/drop", Entry: "configuration.nix",
		Errors: []nixlog.Error{{Message: "error: path '/jobs/1/drop/hardware.nix' does not exist", Cause: "path '/jobs/1/drop/hardware.nix' does not exist"}},
		Read: func(string) ([]byte, error) {
			return []byte("{\n  imports = [\n    ./hardware.nix # mine\n  ];\n}\n"), nil
		},
	})
	want := explain.Explanation{
		Class:   explain.Evaluation,
		Summary: "path 'hardware.nix' does not exist",
		At:      "configuration.nix:3",
		Advice:  "A file that a configuration imports must be in the drop: drop the whole folder, with configuration.nix in it.",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func FuzzExplain(f *testing.F) {
	for _, r := range nixlogtest.Read(f, "../nixlog/testdata") {
		if r.Exit != 0 && r.Way == "daemon" {
			for _, e := range facts(r).Errors {
				f.Add(e.Message, e.Cause, e.At.File, true)
				f.Add(e.Message, "", "", false)
			}
		}
	}
	f.Fuzz(func(t *testing.T, message, cause, file string, evaluating bool) {
		facts := explain.Facts{
			Step: explain.Realise, Source: "/src/eval", Entry: "x.nix",
			Errors: []nixlog.Error{{Message: message, Cause: cause, At: nixlog.Position{File: file, Line: 1}}},
			Read:   func(string) ([]byte, error) { return []byte(message), nil },
		}
		if evaluating {
			facts.Step = explain.Evaluate
		}
		got := explain.Explain(facts)
		if got.Class == "" || got.Summary == "" || strings.Contains(got.Summary, "\n") || strings.HasPrefix(got.At, "/") {
			t.Errorf("got %+v", got)
		}
	})
}

// A configuration of another time's editor: not UTF-8.
func TestBytesThatAreNoUTF8(t *testing.T) {
	const said = "this host needs a k\xe9y"
	got := explain.Explain(explain.Facts{
		Step: explain.Evaluate, Source: "/jobs/1/drop", Entry: "configuration.nix",
		Errors: []nixlog.Error{{Message: "error: " + said, Cause: said}},
		Read: func(string) ([]byte, error) {
			return []byte("{ ... }:\nthrow \"" + said + "\"\n"), nil
		},
	})
	if got.Class != explain.Evaluation || got.At != "configuration.nix:2" || !strings.HasPrefix(got.Summary, "this host needs a k") {
		t.Errorf("%+v", got)
	}
}
