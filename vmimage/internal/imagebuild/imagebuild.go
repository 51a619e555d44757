// Package imagebuild turns a NixOS configuration into an image, in steps: get
// nixpkgs, evaluate, look what is to be done, do it, and put the image into
// the folder for results.
package imagebuild

import (
	"context"
	_ "embed" // the expression
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nix"
	"osbuilder/vmimage/internal/nixlog"
	"osbuilder/vmimage/internal/nixpkgs"
	"osbuilder/vmimage/internal/product"
)

//go:embed image.nix
var expression []byte

// Formats are those that image.nix has.
var Formats = []string{"iso", "install-iso"}

// Options say what to build. Source, Out and Work are absolute folders.
type Options struct {
	Source    string // the drop, unpacked
	Entry     string // the configuration in it
	Format    string
	Attribute string // instead of a format
	System    string
	Nixpkgs   string
	Pin       string // file; empty is none
	Name      string // of the image in Out, without its suffix; empty is the build's own
	Out       string
	Work      string // for what is ours, like the collector's roots

	Systems []string // all that it can build for

	Say func(line string) // one plain line
}

// A Report is what is to be known of a build, whatever its outcome.
type Report struct {
	Kind       string               `json:"kind"`
	Entry      string               `json:"entry"`
	Format     string               `json:"format,omitempty"`
	Attribute  string               `json:"attribute,omitempty"`
	System     string               `json:"system"`
	Nixpkgs    nixpkgs.Nixpkgs      `json:"nixpkgs"`
	Method     string               `json:"method,omitempty"`
	Nix        string               `json:"nix,omitempty"`
	Overridden []string             `json:"overridden"`
	Times      Times                `json:"times_ms"`
	Derivation string               `json:"derivation,omitempty"`
	Outputs    []string             `json:"outputs"`
	Closure    int64                `json:"closure_bytes,omitempty"`
	Error      *explain.Explanation `json:"error,omitempty"`
}

// Times are how long each step took, in milliseconds.
type Times struct {
	Fetch    int64 `json:"fetch"`
	Evaluate int64 `json:"evaluate"`
	Build    int64 `json:"build"`
	Collect  int64 `json:"collect"`
}

// A builder is one build under way.
type builder struct {
	Options
	nix    nix.Runner
	report *Report
}

// Build makes the image. The report is as full as the build came far; an
// error is in it, too, explained.
func Build(ctx context.Context, o Options) (Report, error) {
	report := Report{
		Kind: "nixos-image", Entry: o.Entry, Format: o.Format, Attribute: o.Attribute, System: o.System,
		Nixpkgs: nixpkgs.Nixpkgs{Source: o.Nixpkgs}, Overridden: []string{}, Outputs: []string{},
	}
	b := &builder{
		Options: o,
		nix:     nix.Runner{Env: environment(), Dir: o.Work, Sink: onceWarned(o.Say)},
		report:  &report,
	}
	err := b.build(ctx)
	if err != nil {
		report.Error = explained(ctx, err)
	}
	return report, err
}

// environment makes Nix use the daemon, as a user that it doesn't trust has
// to, and say all without regard to a terminal or a language.
func environment() []string {
	env := []string{"LC_ALL=C.UTF-8", "NO_COLOR=1", "TERM=dumb"}
	if _, err := os.Stat("/nix/var/nix/daemon-socket/socket"); err == nil && os.Getuid() != 0 {
		env = append(env, "NIX_REMOTE=daemon")
	}
	return env
}

func explained(ctx context.Context, err error) *explain.Explanation {
	var e *explain.Error
	switch {
	case errors.As(err, &e):
		return &e.Explanation
	case ctx.Err() != nil:
		stopped := explain.Explain(explain.Facts{Stopped: true, Step: explain.Realise})
		return &stopped
	default:
		return &explain.Explanation{
			Class:   explain.Internal,
			Summary: nixlog.Plain(err.Error()),
			Advice:  "This is a fault of the builder, or of its VM: report it with the log.",
		}
	}
}

func (b *builder) build(ctx context.Context) error {
	if err := b.check(); err != nil {
		return err
	}
	version, err := b.nix.Query(ctx, "nix-store", "--version")
	if err != nil {
		return fmt.Errorf("ask Nix for its version: %w", err)
	}
	// «nix-store (Nix) 2.26.3»
	b.report.Nix = version[strings.LastIndexByte(version, ' ')+1:]

	if err := b.timed(&b.report.Times.Fetch, func() error { return b.getNixpkgs(ctx) }); err != nil {
		return err
	}
	image, err := b.evaluate(ctx)
	if err != nil {
		return err
	}
	if err := b.timed(&b.report.Times.Build, func() error { return b.realise(ctx, image.Derivation, "image") }); err != nil {
		return err
	}
	return b.timed(&b.report.Times.Collect, func() error { return b.collect(ctx, image) })
}

func (b *builder) timed(to *int64, do func() error) error {
	start := time.Now()
	err := do()
	*to += time.Since(start).Milliseconds()
	return err
}

// check refuses at once what can't work.
func (b *builder) check() error {
	if b.Attribute == "" && !slices.Contains(Formats, b.Format) {
		return refuse(fmt.Sprintf("unknown format %q", b.Format), "Set FORMAT to one of "+strings.Join(Formats, ", ")+".")
	}
	if err := b.checkSystem(b.System); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(b.Source, b.Entry)); err != nil {
		return &explain.Error{Explanation: explain.Explanation{
			Class:   explain.Evaluation,
			Summary: "there is no " + b.Entry + " in the drop",
			Advice:  "Drop a file NAME.nix, or a folder with configuration.nix.",
		}, Cause: err}
	}
	return nil
}

func refuse(summary, advice string) error {
	return &explain.Error{Explanation: explain.Explanation{Class: explain.Unsupported, Summary: summary, Advice: advice}}
}

// builtin is what Nix itself builds.
const builtin = "builtin"

func (b *builder) checkSystem(system string) error {
	if system == builtin || slices.Contains(b.Systems, system) {
		return nil
	}
	return refuse(
		fmt.Sprintf("this builder VM can't build for %s: it has %s", system, strings.Join(b.Systems, ", ")),
		"Set SYSTEM, and nixpkgs.hostPlatform in the configuration if it is there, to one of these. A foreign system is there when its emulation passed the test at the VM's boot: see the VM's console.",
	)
}

func (b *builder) root(name string) string { return filepath.Join(b.Work, "roots", name) }

func (b *builder) getNixpkgs(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(b.Work, "roots"), 0o755); err != nil {
		return fmt.Errorf("make a folder for roots: %w", err)
	}
	got, err := nixpkgs.Resolver{Nix: b.nix, Say: b.Say, Root: b.root("nixpkgs")}.Resolve(ctx, b.Nixpkgs, b.Pin)
	if err != nil {
		return err
	}
	b.report.Nixpkgs = got
	line := "nixpkgs " + got.Release
	if got.Revision != "" {
		line += ", revision " + got.Revision
	}
	b.Say(nixlog.Plain(line + ", in " + got.Path))
	return nil
}

// An answer is image.nix's.
type answer struct {
	Method     string   `json:"method"`
	Generators string   `json:"generators"` // derivation to build first
	Derivation string   `json:"derivation"`
	System     string   `json:"system"`
	Host       string   `json:"host"`
	FilePath   string   `json:"filePath"`
	Overridden []string `json:"overridden"`
}

func (b *builder) evaluate(ctx context.Context) (answer, error) {
	file := filepath.Join(b.Work, "image.nix")
	if err := os.WriteFile(file, expression, 0o644); err != nil {
		return answer{}, fmt.Errorf("write the expression: %w", err)
	}
	b.Say("evaluating " + nixlog.Plain(b.Entry))
	a, err := b.ask(ctx, file, "")
	if err != nil {
		return answer{}, err
	}
	if a.Generators != "" {
		b.Say("this nixpkgs has no image.modules: its nixos-generators is used")
		err := b.timed(&b.report.Times.Build, func() error { return b.realise(ctx, a.Generators, "nixos-generators") })
		if err != nil {
			return answer{}, err
		}
		outputs, err := b.outputs(ctx, a.Generators)
		if err != nil {
			return answer{}, err
		}
		if a, err = b.ask(ctx, file, outputs[0]); err != nil {
			return answer{}, err
		}
	}
	b.report.Method, b.report.Derivation = a.Method, a.Derivation
	if a.Host != "" && a.Host != b.System {
		b.Say(fmt.Sprintf("note: the configuration itself asks for %s, not %s", a.Host, b.System))
		b.report.System = a.Host
	}
	if len(a.Overridden) > 0 {
		b.report.Overridden = a.Overridden
		b.Say("this configuration was written for an installed machine; in the image it is overridden:")
		for _, line := range a.Overridden {
			b.Say("  " + nixlog.Plain(line))
		}
	}
	return a, b.checkSystem(a.System)
}

func (b *builder) ask(ctx context.Context, file, generators string) (a answer, err error) {
	err = b.timed(&b.report.Times.Evaluate, func() error {
		for try := 1; ; try++ {
			if a, err = b.instantiate(ctx, file, generators); err != nil {
				return err
			}
			gone := b.keep(ctx, a)
			if gone == nil {
				return nil
			}
			b.Say("the derivation could not be kept from the collector of garbage: " + nixlog.Plain(gone.Error()))
			if try > 1 {
				return nil // if it is gone again, building it says so
			}
			b.Say("evaluating once more")
		}
	})
	return a, err
}

// keep roots the derivation. What holds it until then ends with the evaluation,
// and from then on another job's collection may take it.
func (b *builder) keep(ctx context.Context, a answer) error {
	drv, name := a.Derivation, "image.drv"
	if a.Generators != "" {
		drv, name = a.Generators, "nixos-generators.drv"
	}
	// An evaluation that answers in JSON makes no roots, but this one does.
	_, err := b.nix.Query(ctx, "nix-instantiate", "--expr", "{ drv }: import drv", "--argstr", "drv", drv,
		"--add-root", b.root(name), "--indirect")
	return err
}

func (b *builder) instantiate(ctx context.Context, file, generators string) (answer, error) {
	path := b.report.Nixpkgs.Path
	args := []string{
		"--eval", "--strict", "--json", "--read-write-mode",
		// What a throw of the configuration's own is at is said in the trace alone.
		"--show-trace",
		"-I", "nixpkgs=" + path,
		file,
		"--argstr", "nixpkgs", path,
		"--argstr", "configuration", filepath.Join(b.Source, b.Entry),
		"--argstr", "system", b.System,
	}
	if b.Attribute != "" {
		args = append(args, "--argstr", "attribute", b.Attribute)
	} else {
		args = append(args, "--argstr", "format", b.Format)
	}
	if generators != "" {
		args = append(args, "--argstr", "generators", generators)
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	watch := &worldWatch{say: b.nix.Sink, stop: stop}
	run := b.nix
	run.Sink = watch.line
	out, log, err := run.Run(ctx, "nix-instantiate", args...)
	if watch.stopped != "" {
		return answer{}, tooMuch("evaluation would compile all packages, from "+watch.stopped+" on", unreachable(log))
	}
	if err != nil {
		return answer{}, b.failed(explain.Evaluate, log, err, false)
	}
	var a answer
	if err := json.Unmarshal(out, &a); err != nil {
		return answer{}, fmt.Errorf("read what image.nix answers: %w", err)
	}
	return a, nil
}

func (b *builder) failed(step explain.Step, log *nixlog.Log, err error, oom bool) error {
	return explain.Failed(step, log, err, func(f *explain.Facts) {
		f.Source, f.Entry, f.OOM, f.Read = b.Source, b.Entry, oom, os.ReadFile
	})
}

// realise builds a derivation, and roots it under a name.
func (b *builder) realise(ctx context.Context, drv, name string) error {
	_, log, err := b.nix.Run(ctx, "nix-store", "--realise", drv, "--dry-run")
	if err != nil {
		return b.failed(explain.Realise, log, err, false)
	}
	if err := world(log); err != nil {
		return err
	}
	b.sayPlan(log.Plan())
	killed := oomKills()
	_, log, err = b.nix.Run(ctx, "nix-store", "--realise", drv, "--add-root", b.root(name), "--indirect")
	if err != nil {
		return b.failed(explain.Realise, log, err, oomKills() > killed)
	}
	if line := log.Progress(); line != "" {
		b.Say(line)
	}
	return nil
}

func (b *builder) sayPlan(plan nixlog.Plan) {
	if n := len(plan.Build); n > 0 {
		b.Say(fmt.Sprintf("to build: %s", count(n, "derivation")))
	}
	if n := len(plan.Fetch); n > 0 {
		line := "to fetch: " + count(n, "path")
		if plan.Download != "" {
			line += fmt.Sprintf(", %s to download, %s unpacked", plan.Download, plan.Unpacked)
		}
		b.Say(line)
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return strconv.Itoa(n) + " " + what + "s"
}

func (b *builder) outputs(ctx context.Context, drv string) ([]string, error) {
	out, err := b.nix.Query(ctx, "nix-store", "--query", "--outputs", drv)
	if err != nil {
		return nil, fmt.Errorf("ask for the outputs: %w", err)
	}
	paths := strings.Fields(out)
	if len(paths) == 0 {
		return nil, fmt.Errorf("ask for the outputs: %s has none", drv)
	}
	return paths, nil
}

// collect puts the image into the folder for results.
func (b *builder) collect(ctx context.Context, image answer) error {
	outputs, err := b.outputs(ctx, image.Derivation)
	if err != nil {
		return err
	}
	b.report.Outputs = outputs
	if b.report.Closure, err = b.closure(ctx, outputs); err != nil {
		return err
	}
	var files []string
	for _, output := range outputs {
		found, err := product.Find(output, image.FilePath)
		if err != nil {
			return err
		}
		files = append(files, found...)
	}
	return b.deliver(files)
}

func (b *builder) closure(ctx context.Context, outputs []string) (int64, error) {
	all, err := b.nix.Query(ctx, "nix-store", append([]string{"--query", "--requisites"}, outputs...)...)
	if err != nil {
		return 0, fmt.Errorf("ask for the closure: %w", err)
	}
	sizes, err := b.nix.Query(ctx, "nix-store", append([]string{"--query", "--size"}, strings.Fields(all)...)...)
	if err != nil {
		return 0, fmt.Errorf("ask for the closure's size: %w", err)
	}
	var sum int64
	for _, size := range strings.Fields(sizes) {
		n, err := strconv.ParseInt(size, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("ask for the closure's size: %w", err)
		}
		sum += n
	}
	return sum, nil
}

// deliver links what lies in the store, since the runner ships the file that
// such a link leads to, and an image is large.
func (b *builder) deliver(files []string) error {
	for _, file := range files {
		name := filepath.Base(file)
		if b.Name != "" && len(files) == 1 {
			name = b.Name + suffix(name)
		}
		st, err := os.Stat(file)
		if err != nil {
			return fmt.Errorf("deliver the image: %w", err)
		}
		to := filepath.Join(b.Out, name)
		if err := place(file, to); err != nil {
			return fmt.Errorf("deliver the image: %w", err)
		}
		b.Say(fmt.Sprintf("made %s, %s: %s", nixlog.Plain(name), nixlog.Bytes(st.Size()), file))
	}
	return nil
}

// suffix is a file's, with that of its compression.
func suffix(name string) string {
	ext := filepath.Ext(name)
	switch ext {
	case ".zst", ".gz", ".xz", ".bz2":
		return filepath.Ext(strings.TrimSuffix(name, ext)) + ext
	}
	return ext
}
