package imagebuild_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/imagebuild"
	"osbuilder/vmimage/internal/nixlog/nixlogtest"
)

// A world has Nix's programs as they behave when all goes well, and files in
// its folder that change that: NAME.err is what a step says, NAME.exit how it
// ends. Real runs of Nix are in e2e.
type world struct {
	imagebuild.Options
	dir  string
	said []string
}

const (
	drv    = "/nix/store/00000000000000000000000000000000-image.drv"
	genDrv = "/nix/store/11111111111111111111111111111111-nixos-generators.drv"
)

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{dir: dir}
	w.Options = imagebuild.Options{
		Source: filepath.Join(dir, "drop"), Entry: "configuration.nix", Format: "iso", System: "x86_64-linux",
		Nixpkgs: filepath.Join(dir, "nixpkgs"), Name: "mine", Out: filepath.Join(dir, "out"), Work: filepath.Join(dir, "work"),
		Systems: []string{"x86_64-linux"},
		Say:     func(line string) { w.said = append(w.said, line) },
	}
	for _, folder := range []string{w.Out, w.Work} {
		if err := os.Mkdir(folder, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w.write(t, "drop/configuration.nix", "{ }")
	w.write(t, "nixpkgs/nixos/lib/eval-config.nix", "")
	w.write(t, "nixpkgs/.version", "26.05")
	w.write(t, "output/iso/nixos.iso.zst", "an image")
	w.write(t, "output/nix-support/hydra-build-products", "file iso "+dir+"/output/iso/nixos.iso.zst\n")
	w.answer(t, "evaluate", map[string]any{
		"method": "image.modules", "derivation": drv, "system": "x86_64-linux", "host": "x86_64-linux",
		"filePath": "iso/x", "overridden": []string{`fileSystems."/": the image's own`},
	})
	w.program(t, "nix-instantiate", `
case "$*" in
*--add-root*)
  echo "$*" >>keep.args
  mv gone kept-not && exit 1
  exit 0
  ;;
*generators*) step=evaluate-2 ;;
*) step=evaluate ;;
esac
echo "$*" >"$step.args"
echo "$step" >>evaluations
cat "$step.err" >&2
cat "$step.json"
exit "$(cat "$step.exit" || echo 0)"`)
	w.program(t, "nix-store", `
case "$*" in
--version) echo "nix-store (Nix) 2.26.3" ;;
*--dry-run*) cat plan.err >&2 || : ;;
--realise*nixos-generators*) touch generators.built ;;
--realise*)
  touch realised
  cat realise.err >&2
  exit "$(cat realise.exit || echo 0)"
  ;;
*--outputs*) echo "$PWD/output" ;;
*--requisites*) printf '/nix/store/a\n/nix/store/b\n' ;;
*--size*) printf '1000\n234\n' ;;
*) exit 9 ;;
esac`)
	t.Setenv("PATH", filepath.Join(dir, "bin")+":"+os.Getenv("PATH")) //nolint:forbidigo // the test's own
	return w
}

func (w *world) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func (w *world) program(t *testing.T, name, text string) {
	t.Helper()
	// A file that isn't there says nothing.
	w.write(t, "bin/"+name, fmt.Sprintf("#!/bin/sh\ncd '%s'\ncat() { [ ! -e \"$1\" ] || command cat \"$1\"; [ -e \"$1\" ]; }\n%s\n", w.dir, text))
	if err := os.Chmod(filepath.Join(w.dir, "bin", name), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (w *world) answer(t *testing.T, step string, answer map[string]any) {
	t.Helper()
	text, err := json.Marshal(answer)
	if err != nil {
		t.Fatal(err)
	}
	w.write(t, step+".json", string(text))
}

func (w *world) has(name string) bool {
	_, err := os.Stat(filepath.Join(w.dir, name))
	return err == nil
}

func recorded(t *testing.T, id string) string {
	t.Helper()
	for _, r := range nixlogtest.Read(t, "../nixlog/testdata") {
		if r.ID() == id {
			var text strings.Builder
			for _, line := range r.Lines {
				text.Write(line)
				text.WriteByte('\n')
			}
			return text.String()
		}
	}
	t.Fatalf("no recording %s", id)
	return ""
}

func TestAnImage(t *testing.T) {
	w := newWorld(t)
	report, err := imagebuild.Build(t.Context(), w.Options)
	if err != nil {
		t.Fatal(err, w.said)
	}
	got, err := os.ReadFile(filepath.Join(w.Out, "mine.iso.zst"))
	if err != nil || string(got) != "an image" {
		t.Errorf("the image is %q, %v", got, err)
	}
	report.Times = imagebuild.Times{}
	want := imagebuild.Report{
		Kind: "nixos-image", Entry: "configuration.nix", Format: "iso", System: "x86_64-linux",
		Method: "image.modules", Nix: "2.26.3", Overridden: []string{`fileSystems."/": the image's own`},
		Derivation: drv, Outputs: []string{w.dir + "/output"}, Closure: 1234,
	}
	want.Nixpkgs.Source, want.Nixpkgs.Path, want.Nixpkgs.Release = w.Nixpkgs, w.Nixpkgs, "26.05"
	if diff := cmp.Diff(want, report); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
	if !slices.Contains(w.said, `  fileSystems."/": the image's own`) {
		t.Errorf("the log doesn't say what was overridden:\n%s", strings.Join(w.said, "\n"))
	}
}

func TestOlderNixpkgsGoThroughNixosGenerators(t *testing.T) {
	w := newWorld(t)
	w.answer(t, "evaluate-2", map[string]any{"method": "nixos-generators", "derivation": drv, "system": "x86_64-linux", "host": "x86_64-linux"})
	w.answer(t, "evaluate", map[string]any{"method": "nixos-generators", "generators": genDrv})
	report, err := imagebuild.Build(t.Context(), w.Options)
	if err != nil || report.Method != "nixos-generators" || !w.has("generators.built") {
		t.Errorf("%v: %+v", err, report)
	}
	args, _ := os.ReadFile(filepath.Join(w.dir, "evaluate-2.args")) // empty fails below
	if want := "--argstr generators " + w.dir + "/output"; !strings.Contains(string(args), want) {
		t.Errorf("arguments %q without %q", args, want)
	}
}

// Another job's collection may take the derivation before it is rooted.
func TestTheDerivationIsKept(t *testing.T) {
	for name, tc := range map[string]struct {
		gone        bool
		evaluations string
	}{
		"there": {false, "evaluate\n"},
		"gone":  {true, "evaluate\nevaluate\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			if tc.gone {
				w.write(t, "gone", "")
			}
			if _, err := imagebuild.Build(t.Context(), w.Options); err != nil {
				t.Fatal(err, w.said)
			}
			keep := "--expr { drv }: import drv --argstr drv " + drv + " --add-root " + w.Work + "/roots/image.drv --indirect\n"
			for file, want := range map[string]string{
				"evaluations": tc.evaluations, "keep.args": strings.Repeat(keep, strings.Count(tc.evaluations, "\n")),
			} {
				got, err := os.ReadFile(filepath.Join(w.dir, file))
				if diff := cmp.Diff(want, string(got)); diff != "" || err != nil {
					t.Errorf("%s: %v (-want +got)\n%s", file, err, diff)
				}
			}
		})
	}
}

func TestItDoesNotCompileTheWorld(t *testing.T) {
	var plan strings.Builder
	msg := func(level int, text string) {
		fmt.Fprintf(&plan, "@nix {\"action\":\"msg\",\"level\":%d,\"msg\":%q}\n", level, text)
	}
	msg(3, "these 150 derivations will be built:")
	for i := range 150 {
		msg(3, fmt.Sprintf("  /nix/store/%032d-bootstrap-stage%d-gcc.drv", i, i))
	}
	for _, version := range nixlogtest.Versions {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			w.write(t, "plan.err", recorded(t, version+"-daemon/dryrun-nocache")+plan.String())
			report, err := imagebuild.Build(t.Context(), w.Options)
			if err == nil || report.Error.Class != explain.Cache || w.has("realised") {
				t.Fatalf("%v, %+v, begun: %v", err, report.Error, w.has("realised"))
			}
			if len(report.Error.Lines) == 0 || !strings.Contains(report.Error.Lines[0], "nix-cache-info") {
				t.Errorf("Nix's warning is not among the lines %q", report.Error.Lines)
			}
		})
	}
	t.Run("not while it evaluates, either", func(t *testing.T) {
		w := newWorld(t)
		w.write(t, "begun.err", recorded(t, "2.34-daemon/dryrun-nocache")+
			`@nix {"action":"start","id":1,"type":105,"level":3,"fields":["/nix/store/00000000000000000000000000000000-bootstrap-stage0-gcc.drv","",1,1]}`+"\n")
		w.program(t, "nix-instantiate", "cat begun.err >&2; exec sleep 60")
		report, err := imagebuild.Build(t.Context(), w.Options)
		if err == nil || report.Error.Class != explain.Cache || !strings.Contains(report.Error.Summary, "bootstrap-stage0-gcc") {
			t.Errorf("%v, %+v", err, report.Error)
		}
	})
	t.Run("but a few derivations without a cache", func(t *testing.T) {
		w := newWorld(t)
		w.write(t, "plan.err", recorded(t, "2.34-daemon/dryrun-nocache"))
		if _, err := imagebuild.Build(t.Context(), w.Options); err != nil {
			t.Error(err)
		}
	})
	t.Run("nor many with one", func(t *testing.T) {
		w := newWorld(t)
		w.write(t, "plan.err", plan.String()+`@nix {"action":"msg","level":3,"msg":"this path will be fetched (1.00 MiB download, 2.00 MiB unpacked):"}
@nix {"action":"msg","level":3,"msg":"  /nix/store/00000000000000000000000000000000-x"}
`)
		if _, err := imagebuild.Build(t.Context(), w.Options); err != nil {
			t.Error(err)
		}
		if !slices.Contains(w.said, "to fetch: 1 path, 1.00 MiB to download, 2.00 MiB unpacked") {
			t.Errorf("the plan isn't said: %q", w.said)
		}
	})
}

func TestAFailedBuildIsExplainedCauseFirst(t *testing.T) {
	for _, version := range nixlogtest.Versions {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			w.write(t, "realise.err", recorded(t, version+"-daemon/build-dependents"))
			w.write(t, "realise.exit", "1")
			report, err := imagebuild.Build(t.Context(), w.Options)
			if err == nil || report.Error.Class != explain.Build || report.Derivation != drv {
				t.Fatalf("%v, %+v", err, report)
			}
			w.said = nil
			imagebuild.Explain(*report.Error, err, w.Say)
			want := []string{
				"",
				"FAILED (build): building broken-1.0 failed with exit code 2",
				"  | compiling main.c",
				"  | main.c:3: error: expected ';'",
			}
			if diff := cmp.Diff(want, w.said[:len(want)]); diff != "" {
				t.Errorf("(-want +got)\n%s", diff)
			}
			if !slices.Contains(w.said, "In Nix's own words:") {
				t.Errorf("Nix's own words are missing:\n%s", strings.Join(w.said, "\n"))
			}
		})
	}
}

func TestAFailedEvaluationNamesTheUsersLine(t *testing.T) {
	w := newWorld(t)
	w.Source, w.Entry = filepath.Join(w.dir, "drop"), "undefined.nix"
	w.write(t, "drop/undefined.nix", "{\n  packages = [ hello ];\n}\n")
	w.write(t, "evaluate.err", strings.ReplaceAll(recorded(t, "2.34-daemon/eval-undefined"), "/src/eval", w.Source))
	w.write(t, "evaluate.exit", "1")
	report, err := imagebuild.Build(t.Context(), w.Options)
	if err == nil || report.Error.Class != explain.Evaluation || report.Error.At != "undefined.nix:2:16" {
		t.Errorf("%v, %+v", err, report.Error)
	}
}

func TestWhatCannotWorkIsRefusedBeforeAnythingIsDone(t *testing.T) {
	for _, test := range []struct {
		name  string
		with  func(t *testing.T, w *world)
		class explain.Class
		words string
	}{
		{"an unknown format", func(_ *testing.T, w *world) { w.Format = "floppy" }, explain.Unsupported, `unknown format "floppy"`},
		{"a foreign system", func(_ *testing.T, w *world) { w.System = "aarch64-linux" }, explain.Unsupported, "can't build for aarch64-linux"},
		{"no such file", func(_ *testing.T, w *world) { w.Entry = "flake.nix" }, explain.Evaluation, "there is no flake.nix in the drop"},
		{"no nixpkgs", func(_ *testing.T, w *world) { w.Nixpkgs = "/nonexistent" }, explain.Evaluation, "is no nixpkgs"},
		{"a configuration for another system", func(t *testing.T, w *world) {
			w.answer(t, "evaluate", map[string]any{"method": "image.modules", "derivation": drv, "system": "riscv64-linux", "host": "riscv64-linux"})
		}, explain.Unsupported, "can't build for riscv64-linux"},
		{"the VM was shut down", func(t *testing.T, w *world) {
			w.program(t, "nix-instantiate", "echo '@nix {\"action\":\"msg\",\"level\":0,\"msg\":\"error: interrupted by the user\"}' >&2; exit 1")
		}, explain.Killed, "ended from outside, while evaluating the configuration"},
		{"no Nix", func(t *testing.T, _ *world) { t.Setenv("PATH", t.TempDir()) }, explain.Internal, "nix-store"},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t)
			test.with(t, w)
			report, err := imagebuild.Build(t.Context(), w.Options)
			if err == nil || report.Error.Class != test.class || !strings.Contains(report.Error.Summary, test.words) {
				t.Errorf("%v, %+v", err, report.Error)
			}
			if w.has("realised") {
				t.Error("it began to build")
			}
		})
	}
}

func TestStopped(t *testing.T) {
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.program(t, "nix-instantiate", "echo evaluating now >&2; sleep 60")
	say := w.Say
	w.Say = func(line string) {
		say(line)
		if line == "evaluating now" {
			cancel()
		}
	}
	report, err := imagebuild.Build(ctx, w.Options)
	if err == nil || report.Error.Class != explain.Killed {
		t.Errorf("%v, %+v", err, report.Error)
	}
	var e *explain.Error
	if !errors.As(err, &e) || !strings.Contains(e.Summary, "evaluating") {
		t.Errorf("it doesn't say while what: %v", err)
	}
}

// The table of formats is in image.nix; the program refuses others before it downloads anything.
func TestFormatsAreThoseOfTheExpression(t *testing.T) {
	text, err := os.ReadFile("image.nix")
	if err != nil {
		t.Fatal(err)
	}
	_, table, ok := strings.Cut(string(text), "  formats = {\n")
	table, _, ok2 := strings.Cut(table, "\n  };\n")
	if !ok || !ok2 {
		t.Fatal("no table of formats in image.nix")
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^    ([\w-]+) = \{$`).FindAllStringSubmatch(table, -1) {
		names = append(names, m[1])
	}
	if diff := cmp.Diff(imagebuild.Formats, names); diff != "" {
		t.Errorf("(-Go +image.nix)\n%s", diff)
	}
}
