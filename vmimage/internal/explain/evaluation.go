package explain

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"osbuilder/vmimage/internal/nixlog"
)

// A shape is a kind of evaluation error, told by its words.
type shape struct {
	words  *regexp.Regexp
	advice string
}

var shapes = []shape{
	{
		regexp.MustCompile(`^syntax error`),
		"Nix can't read the file from there on: often a ';', a bracket or a quote is missing on that line or the one before.",
	},
	{
		regexp.MustCompile(`^undefined variable`),
		"Is it misspelt, or missing among the arguments at the top of the file, like { config, lib, pkgs, ... }?",
	},
	{
		regexp.MustCompile(`^infinite recursion`),
		"A value depends on itself. Often config or pkgs decides what is imported, or an option is set from its own value.",
	},
	{
		regexp.MustCompile("^The option `[^']*' does not exist"),
		"Is it misspelt, or an option of another release? https://search.nixos.org/options knows them by release; NIXPKGS chooses it.",
	},
	{
		regexp.MustCompile(`conflicting definition|is defined multiple times|has conflicting`),
		"Remove one of the definitions, or say which one wins with lib.mkForce.",
	},
	{
		regexp.MustCompile("is not of type|A definition for option"),
		"Give the option a value of the type that it wants: https://search.nixos.org/options says which.",
	},
	{
		regexp.MustCompile(`^Failed assertions`),
		"NixOS itself checks this: change the configuration as the message says.",
	},
	{
		regexp.MustCompile("^The option `[^']*' (?:was accessed|is used) but has no value defined|used but not defined"),
		"Give that option a value.",
	},
	{
		regexp.MustCompile(`was not found in the Nix search path`),
		"In the builder VM only <nixpkgs> is known, the one that NIXPKGS names. Import other sources by address and hash, or put them into the drop.",
	},
	{
		regexp.MustCompile(`does not exist|No such file or directory|getting status of|opening file`),
		"A file that a configuration imports must be in the drop: drop the whole folder, with configuration.nix in it.",
	},
	{
		regexp.MustCompile(`^attribute '[^']*' missing|^attribute '[^']*' .*not found|^cannot find attribute`),
		"This nixpkgs has no such name. https://search.nixos.org/packages knows packages by release; NIXPKGS chooses it.",
	},
	{
		regexp.MustCompile(`(?:unfree|insecure|broken|not available on the requested).*refusing to evaluate|refusing to evaluate`),
		"Allow it in the configuration, as the message says (nixpkgs.config), or leave the package out.",
	},
	{
		regexp.MustCompile(`stack overflow|max-call-depth`),
		"A function calls itself without end.",
	},
	{
		regexp.MustCompile(`^assertion .*failed`),
		"The expression itself checks this: look at the condition there.",
	},
}

func evaluation(f Facts, _ string) (Explanation, bool) {
	if f.Step != Evaluate || len(f.Errors) == 0 {
		return Explanation{}, false
	}
	at := 0
	// Nix 2.8 may add a second message that only repeats the trace.
	for i, e := range f.Errors {
		if e.Cause != "" {
			at = i
			break
		}
	}
	err := f.Errors[at]
	text := strings.TrimPrefix(strings.TrimSpace(cause(err)), "osbuilder: ")
	e := Explanation{Class: Evaluation, Summary: headline(text)}
	if rest, ok := strings.CutPrefix(text, "Failed assertions:"); ok {
		e.Summary = assertions(rest)
	}
	if rest := after(text); len(rest) > 0 {
		e.Lines = rest
	}
	for _, s := range shapes {
		if s.words.MatchString(text) {
			e.Advice = s.advice
			break
		}
	}
	if e.Advice == "" {
		e.Advice = "The message is the configuration's own, or nixpkgs': the trace below leads to it."
	}
	e.At = place(f, err, text)
	// The user knows his files by their names in the drop.
	if f.Source != "" {
		within := strings.NewReplacer(f.Source+"/", "")
		e.Summary = within.Replace(e.Summary)
		for i, line := range e.Lines {
			e.Lines[i] = within.Replace(line)
		}
	}
	return e, true
}

// assertions is the first that failed, and how many more.
func assertions(text string) string {
	var all []string
	for line := range strings.SplitSeq(text, "\n") {
		if message, ok := strings.CutPrefix(strings.TrimSpace(line), "- "); ok {
			all = append(all, message)
		}
	}
	switch len(all) {
	case 0:
		return "failed assertion: " + headline(text)
	case 1:
		return "failed assertion: " + all[0]
	default:
		return fmt.Sprintf("failed assertion: %s (and %d more)", all[0], len(all)-1)
	}
}

// after is what a message says beyond its first line.
func after(text string) []string {
	_, rest, ok := strings.Cut(text, "\n")
	if !ok {
		return nil
	}
	var lines []string
	for line := range strings.SplitSeq(rest, "\n") {
		if strings.TrimSpace(line) != "" || len(lines) > 0 {
			lines = append(lines, line)
		}
	}
	const most = 30
	if len(lines) > most {
		lines = append(lines[:most:most], "…")
	}
	return lines
}

var (
	// «at /src/x.nix:3:5:», and «at: (3:5) in file: /src/x.nix» of 2.8.
	traceAt     = regexp.MustCompile(`\bat:? (/[^\n:]+):(\d+):(\d+)`)
	traceInFile = regexp.MustCompile(`at: \((\d+):(\d+)\) in file: (/[^\n]+)`)
	inFile      = regexp.MustCompile("(?:- In|from|In) `(/[^']+)'")
	optionName  = regexp.MustCompile("(?:The option|A definition for option|while evaluating the option) `([^']+)'")
)

// place is the place in the drop that an error leads to: where Nix says it
// is; else the innermost of the trace; else a file that the module system
// names, with the line where it sets the option, if there is only one; else
// the line that names a file that is not there, or that has the message's words.
func place(f Facts, err nixlog.Error, text string) string {
	if p, ok := relative(f, err.At); ok {
		return p
	}
	if p := named(f, text, text); p != "" {
		return p
	}
	if p := inDrop(f, err.Message); p != "" {
		return p
	}
	if p := named(f, err.Message, text+err.Message); p != "" {
		return p
	}
	if p := missing(f, text); p != "" {
		return p
	}
	return spelled(f, text)
}

// own are the messages that a configuration may have itself: those of throw,
// of abort and of assertions.
var own = regexp.MustCompile(`(?m)^evaluation aborted with the following error message: '(.*)'$|^- (.*)$|^(.*)$`)

// spelled is the only line of the configuration with the message's words. With
// less than three of them it could be any.
func spelled(f Facts, text string) string {
	text = strings.TrimSpace(strings.TrimPrefix(text, "Failed assertions:"))
	m := own.FindStringSubmatch(text)
	if m == nil {
		return ""
	}
	words := strings.TrimSpace(m[1] + m[2] + m[3])
	if strings.Count(words, " ") < 2 {
		return ""
	}
	if n := onlyLine(f, filepath.Join(f.Source, f.Entry), regexp.MustCompile(literally(words))); n > 0 {
		return fmt.Sprintf("%s:%d", f.Entry, n)
	}
	return ""
}

// literally is an expression that matches a text as it stands. Nix passes on
// whatever bytes a user wrote. Those that are no UTF-8 no expression may have;
// where one is read, each counts as U+FFFD.
func literally(text string) string { return regexp.QuoteMeta(string([]rune(text))) }

// named is the file of a definition that a text names.
func named(f Facts, text, options string) string {
	for _, m := range inFile.FindAllStringSubmatch(text, -1) {
		file, ok := relative(f, nixlog.Position{File: m[1]})
		if !ok {
			continue
		}
		for _, name := range optionName.FindAllStringSubmatch(options, -1) {
			if n := lineOf(f, m[1], name[1]); n > 0 {
				return fmt.Sprintf("%s:%d", file, n)
			}
		}
		return file
	}
	return ""
}

var notThere = regexp.MustCompile(`'(/[^']+)'(?: does not exist|: No such file or directory)`)

// missing is the line of the configuration that names a file of the drop that
// is not there.
func missing(f Facts, text string) string {
	m := notThere.FindStringSubmatch(text)
	if m == nil {
		return ""
	}
	if _, ok := relative(f, nixlog.Position{File: m[1]}); !ok {
		return ""
	}
	name := regexp.MustCompile(`(?:^|[/" ])` + literally(filepath.Base(m[1])) + `(?:$|[^\w.-])`)
	if n := onlyLine(f, filepath.Join(f.Source, f.Entry), name); n > 0 {
		return fmt.Sprintf("%s:%d", f.Entry, n)
	}
	return ""
}

// inDrop is the innermost place of a trace that lies in the drop. Nix 2.8 and
// whatever else begins with the message tells it first, later versions last.
func inDrop(f Facts, text string) string {
	lines := strings.Split(text, "\n")
	if strings.TrimSpace(lines[0]) != "error:" {
		slices.Reverse(lines)
	}
	found := ""
	for _, line := range lines {
		p := nixlog.Position{}
		if m := traceAt.FindStringSubmatch(line); m != nil {
			p = nixlog.Position{File: m[1], Line: number(m[2]), Column: number(m[3])}
		} else if m := traceInFile.FindStringSubmatch(line); m != nil {
			p = nixlog.Position{File: m[3], Line: number(m[1]), Column: number(m[2])}
		}
		if at, ok := relative(f, p); ok {
			found = at
		}
	}
	return found
}

func number(digits string) int {
	n := 0
	for _, d := range digits {
		n = n*10 + int(d-'0')
	}
	return n
}

// relative is a position in the drop, told from the drop's folder.
func relative(f Facts, p nixlog.Position) (string, bool) {
	if p.File == "" || f.Source == "" {
		return "", false
	}
	rel, err := filepath.Rel(f.Source, p.File)
	if err != nil || !filepath.IsLocal(rel) {
		return "", false
	}
	p.File = rel
	return p.String(), true
}

// lineOf is the only line of a file that sets an option, else 0. Options are
// often set in nested sets, so ever less of the front of the name is asked for.
func lineOf(f Facts, file, option string) int {
	parts := strings.Split(option, ".")
	for i := range parts {
		name := regexp.MustCompile(`(?:^|[^\w.'-])` + literally(strings.Join(parts[i:], ".")) + `\s*(?:=|\.|$)`)
		if n := onlyLine(f, file, name); n != 0 {
			return max(n, 0)
		}
	}
	return 0
}

// onlyLine is the number of the only line that matches, 0 if none does and -1
// if several do.
func onlyLine(f Facts, file string, re *regexp.Regexp) int {
	if f.Read == nil {
		return 0
	}
	text, err := f.Read(file)
	if err != nil {
		return 0
	}
	found := 0
	for n, line := range strings.Split(string(text), "\n") {
		line, _, _ = strings.Cut(line, "#")
		if !re.MatchString(line) {
			continue
		}
		if found > 0 {
			return -1
		}
		found = n + 1
	}
	return found
}
