// Package docs holds what people read. Its test holds a part of that to the
// code.
package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// A line is something that the program can say when something is wrong, with …
// where it puts in what it is about.
type line struct {
	text string
	from string // file:line
}

func root(t *testing.T) fs.FS {
	t.Helper()
	return os.DirFS("..")
}

// literal counts what is not put in.
func literal(text string) int {
	return len(strings.Trim(strings.Join(strings.Fields(strings.ReplaceAll(text, "…", "")), " "), " :;,."))
}

// documented returns the lines in the first column of the document's tables.
func documented(t *testing.T) []string {
	t.Helper()
	text, err := os.ReadFile("troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	return rows(string(text))
}

func rows(text string) []string {
	var out []string
	quoted := regexp.MustCompile("``([^`]+(?:`[^`]+)*)``|`([^`]+)`")
	for row := range strings.Lines(text) {
		if !strings.HasPrefix(row, "| `") {
			continue
		}
		first, _, _ := strings.Cut(strings.ReplaceAll(row[2:], `\|`, "\x00"), " | ")
		for _, m := range quoted.FindAllStringSubmatch(first, -1) {
			out = append(out, strings.ReplaceAll(strings.TrimSpace(m[1]+m[2]), "\x00", "|"))
		}
	}
	return out
}

// pattern returns what matches the lines that a documented one stands for. The
// document may leave out more than the program puts in.
func pattern(doc string) *regexp.Regexp {
	pattern := ""
	for i, piece := range strings.Split(doc, "…") {
		if i > 0 {
			pattern += ".*"
		}
		pattern += regexp.QuoteMeta(piece)
	}
	return regexp.MustCompile(`(?s)^(?:` + pattern + `)$`)
}

// Each line that the program can say when something is wrong is in
// troubleshooting.md, and nothing that it can't say.
func TestTroubleshootingIsComplete(t *testing.T) {
	lines := documented(t)
	for i, doc := range lines {
		if literal(doc) < 5 {
			t.Errorf("troubleshooting.md: %q says too little to be found by", doc)
		}
		if slices.Contains(lines[:i], doc) {
			t.Errorf("troubleshooting.md has %q twice", doc)
		}
	}
	docs := patterns(lines)
	goes, shells := goLines(t), shellLines(t)
	if len(goes) < 100 || len(shells) < 100 {
		t.Fatalf("%d lines found in the Go code, %d in scripts: the test is blind", len(goes), len(shells))
	}
	fine := patterns(well)
	missing, used := map[string]string{}, map[string]bool{}
	for _, l := range slices.Concat(goes, shells) {
		if !matches(docs, l.text, used) && !matches(fine, l.text, used) {
			missing[l.text] = l.from
		}
	}
	for _, text := range slices.SortedFunc(maps.Keys(missing), func(a, b string) int { return strings.Compare(missing[a]+a, missing[b]+b) }) {
		t.Errorf("%s: troubleshooting.md lacks: %s", missing[text], text)
	}
	for _, doc := range slices.Sorted(maps.Keys(docs)) {
		if !used[doc] {
			t.Errorf("troubleshooting.md: nothing says this any more: %s", doc)
		}
	}
	for _, text := range well {
		if !used[text] {
			t.Errorf("nothing says this any more: %s", text)
		}
	}
}

func patterns(texts []string) map[string]*regexp.Regexp {
	out := map[string]*regexp.Regexp{}
	for _, text := range texts {
		out[text] = pattern(text)
	}
	return out
}

// matches reports whether one of the patterns matches, and notes which do.
func matches(patterns map[string]*regexp.Regexp, text string, used map[string]bool) (found bool) {
	for doc, pattern := range patterns {
		if pattern.MatchString(text) {
			used[doc], found = true, true
		}
	}
	return found
}

const example = `package x

type reason struct{ rung, why string }

func why(n int) (string, bool) {
	if n > 0 {
		return "by a function", true
	}
	return "", false
}

func say(message string) { log.Warn(message) }

func run(w *worker) {
	w.why, _ = why(1)
	first := "first"
	if w.up {
		first = "second"
	}
	log.Warn(first + " of one", zap.Error(errors.New("no line of the log")))
	log.Warn(w.unknown())
	say("handed on to the log")
	_ = reason{"no reason to read", "in its place"}
	problems = append(problems, fmt.Errorf("on a list %d", 1))
}
`

// The test itself is not blind.
func TestTemplates(t *testing.T) {
	for expr, want := range map[string]string{
		`"plain"`: "plain",
		`fmt.Sprintf("%s of %-4.2f, %w", a, b, c)`: "… of …, …",
		`errors.New("x")`:                          "x",
		`"a " + b + " c"`:                          "a … c",
		`f("x")`:                                   "…",
		`fmt.Errorf(("a"+"b"))`:                    "ab",
	} {
		e, err := parser.ParseExpr(expr)
		if err != nil {
			t.Fatal(err)
		}
		if got := template(e); got != want {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
	f := &folder{dir: "daemon/internal/dispatch", structs: map[string][]string{}, funcs: map[string][]*ast.FuncDecl{}, speakers: map[string][]int{"Warn": {0}}, positions: token.NewFileSet()}
	file, err := parser.ParseFile(f.positions, "x.go", example, parser.SkipObjectResolution)
	if err != nil {
		t.Fatal(err)
	}
	f.add(file)
	var got []string
	for _, l := range f.lines() {
		got = append(got, l.text)
	}
	want := []string{"by a function", "in its place", "first of one", "second of one", "handed on to the log", "a line of the log that this test can't see", "on a list …"}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("found %q, want %q", got, want)
	}
	for doc, says := range map[string]string{
		"port … is in use": "port … of … is in use", "… can be shipped": "… is a socket: only files can be shipped", "whole": "whole",
	} {
		if !pattern(doc).MatchString(says) {
			t.Errorf("%q does not match %q", doc, says)
		}
	}
	if pattern("port is in use").MatchString("port … is in use") || pattern("part").MatchString("part of it") {
		t.Error("matches too much")
	}
	if got := rows("| `a` | b `c` |\n| `a \\| b`, ``x`y`` | z |\n|---|---|\ntext `d`\n"); !slices.Equal(got, []string{"a", "a | b", "x`y"}) {
		t.Errorf("rows %q", got)
	}
}
