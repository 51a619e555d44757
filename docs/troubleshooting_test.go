// Package docs holds what people read. Its test holds a part of that to the
// code.
package docs

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// A line is something that the program can say when something is wrong, with …
// where it puts in what it is about.
type line struct {
	text string
	from string // file:line
}

// speakers are the functions whose text a user reads: in which folders, by
// which name, and in which argument.
var speakers = []struct {
	dir, name string
	arg       int
}{
	{"daemon", "Warn", 0},  // the log
	{"daemon", "Error", 0}, // the log
	{"daemon/internal/inbox", "say", 1},
	{"daemon/internal/inbox", "refuse", 1},  // a drop
	{"daemon/internal/recipe", "refuse", 1}, // a drop
	{"daemon/internal/config", "say", 1},    // a setting
	{"daemon/internal/dispatch", "fail", 3},
	{"daemon/internal/dispatch", "interrupted", 2},
	{"daemon/internal/dispatch", "waits", 2},
	{"daemon", "With", 0}, // hint.With: an error that carries what to do
	{"daemon/internal/setup", "Fprintf", 1},
	{"daemon/internal/setup", "Fprintln", 1},
	{"pipe/runner", "refuse", 1},
}

// fields are those of results and refusals that a user reads.
var fields = map[string][]string{
	"daemon/internal/dispatch":  {"why", "Why", "Reason"},
	"daemon/internal/room":      {"why"},
	"daemon/internal/preflight": {"Then"},
	"pipe/runner":               {"Message", "Reason", "message"},
	"vmimage/internal":          {"Summary"},
}

// sentinels are folders whose errors of their own are read by users.
var sentinels = []string{"daemon"}

// shell are scripts, with the words that begin what they say when something is
// wrong.
var shell = []struct{ glob, words string }{
	{"scripts/{demo,down,clean,vm-iso,test,lib,world,engine,images,project}.sh", `die`},
	{"scripts/checks.sh", `die`},
	{"vmimage/install-image.sh", `fail`},
	{"vmimage/nixos/make-image", `fail`},
	{"vmimage/nixos/store/store", `die`},
	{"vmimage/qemu/entrypoint.sh", `die \S+|warn`},
	{"vmimage/qemu/start-hook.sh", `echo`},
	{"vmimage/qemu/watch-vm.sh", `echo`},
	{"vmimage/qemu/status.sh", `echo`},
}

// quiet are scripts whose lines of the kind may be in the document: most of
// them tell that all is well.
var quiet = []struct{ glob, words string }{
	{"vmimage/nixos/scripts/{address,import-config,systems}.sh", `echo`},
	{"vmimage/nixos/make-image", `say`},
}

func root(t *testing.T) fs.FS {
	t.Helper()
	return os.DirFS("..")
}

// goLines collects what the Go code can say.
func goLines(t *testing.T) []line {
	t.Helper()
	var lines []line
	for _, top := range []string{"daemon", "pipe/runner", "vmimage/internal"} {
		files := token.NewFileSet()
		err := fs.WalkDir(root(t), top, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			if d.IsDir() {
				if slices.Contains([]string{"testdata", "vmtest", "storetest", "nixlogtest"}, d.Name()) {
					return fs.SkipDir
				}
				return nil
			}
			if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
				return nil
			}
			source, err := fs.ReadFile(root(t), path)
			if err != nil {
				return err
			}
			file, err := parser.ParseFile(files, path, source, parser.SkipObjectResolution)
			if err != nil {
				return err
			}
			ast.Inspect(file, func(n ast.Node) bool {
				for _, e := range said(path, n) {
					if text := strings.TrimSpace(template(e)); literal(text) >= 8 {
						lines = append(lines, line{text, files.Position(e.Pos()).String()})
					}
				}
				return true
			})
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return lines
}

// said returns the expressions in a node whose text a user reads.
func said(path string, n ast.Node) []ast.Expr {
	in := func(dir string) bool { return strings.HasPrefix(path, dir+"/") }
	var out []ast.Expr
	switch n := n.(type) {
	case *ast.CallExpr:
		name := ""
		switch f := n.Fun.(type) {
		case *ast.Ident:
			name = f.Name
		case *ast.SelectorExpr:
			name = f.Sel.Name
		}
		for _, s := range speakers {
			if s.dir == "daemon/internal/setup" && len(n.Args) > s.arg && !strings.HasPrefix(template(n.Args[s.arg]), "note: ") {
				continue // what init did
			}
			if s.name == name && in(s.dir) && len(n.Args) > s.arg {
				out = append(out, n.Args[s.arg])
			}
		}
	case *ast.KeyValueExpr:
		if key, ok := n.Key.(*ast.Ident); ok && wanted(path, key.Name) {
			out = append(out, n.Value)
		}
	case *ast.AssignStmt:
		for i, left := range n.Lhs {
			said := n.Rhs[min(i, len(n.Rhs)-1)]
			switch to := left.(type) {
			case *ast.SelectorExpr:
				if wanted(path, to.Sel.Name) {
					out = append(out, said)
				}
			case *ast.Ident:
				if to.Name == "what" && in("daemon/internal/inbox") {
					out = append(out, said)
				}
			}
		}
	case *ast.FuncDecl: // the text of an error's type
		if n.Name.Name == "Error" && in("daemon/internal/disk") {
			ast.Inspect(n, func(m ast.Node) bool {
				if r, ok := m.(*ast.ReturnStmt); ok {
					out = append(out, r.Results...)
				}
				return true
			})
		}
	case *ast.ValueSpec:
		for i, name := range n.Names {
			if i >= len(n.Values) {
				break
			}
			switch {
			case strings.HasPrefix(strings.ToLower(name.Name), "err") && slices.ContainsFunc(sentinels, in),
				name.Name == "droppedMessage", name.Name == "what" && in("daemon/internal/inbox"):
				out = append(out, n.Values[i])
			case strings.HasPrefix(name.Name, "Rung"): // shown as a field
				out = append(out, &ast.BinaryExpr{X: &ast.BasicLit{ValuePos: n.Pos(), Value: `"rung="`}, Y: n.Values[i]})
			}
		}
	}
	return out
}

func wanted(path, field string) bool {
	for dir, names := range fields {
		if strings.HasPrefix(path, dir+"/") && slices.Contains(names, field) {
			return true
		}
	}
	return false
}

var verb = regexp.MustCompile(`%[-+#0-9.\[\]]*[a-zA-Z]`)

// template is the text of an expression, with … for what is put in.
func template(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil {
			return verb.ReplaceAllString(text, "…")
		}
	case *ast.BinaryExpr:
		return template(e.X) + template(e.Y)
	case *ast.ParenExpr:
		return template(e.X)
	case *ast.CallExpr:
		if f, ok := e.Fun.(*ast.SelectorExpr); ok && len(e.Args) > 0 && slices.Contains([]string{"Sprintf", "Errorf", "New"}, f.Sel.Name) {
			if pkg, ok := f.X.(*ast.Ident); ok && (pkg.Name == "fmt" || pkg.Name == "errors") {
				return template(e.Args[0])
			}
		}
	}
	return "…"
}

// literal counts what is not put in.
func literal(text string) int {
	return len(strings.Trim(strings.Join(strings.Fields(strings.ReplaceAll(text, "…", "")), " "), " :;,."))
}

var (
	command   = regexp.MustCompile(`\$\([^()]*(\([^()]*(\([^()]*\)[^()]*)*\)[^()]*)*\)`)
	parameter = regexp.MustCompile(`\$\{[^{}]*(\{[^{}]*\}[^{}]*)*\}|\$[A-Za-z_][A-Za-z0-9_]*|\$[0-9#*@?!]`)
)

// shellLines collects what the scripts can say.
func shellLines(t *testing.T, scripts []struct{ glob, words string }) []line {
	t.Helper()
	var lines []line
	for _, s := range scripts {
		says := regexp.MustCompile(`(?:^|[;&|{()!]|\bthen|\belse)\s*(?:` + s.words + `) ("(?:[^"\\]|\\.)*")`)
		for _, path := range braces(s.glob) {
			text, err := fs.ReadFile(root(t), path)
			if err != nil {
				t.Fatal(err)
			}
			// A command goes on in the next line where one ends with ||, && or \.
			for i, source := range strings.Split(string(text), "\n") {
				source = strings.TrimSpace(source)
				source = command.ReplaceAllString(source, "…")
				for _, m := range says.FindAllStringSubmatch(source, -1) {
					said := strings.Trim(m[1], `"`)
					said = parameter.ReplaceAllString(said, "…")
					said = strings.NewReplacer(`\"`, `"`, `\$`, `$`, `\\`, `\`).Replace(said)
					said = strings.TrimPrefix(strings.TrimPrefix(said, "qemu: "), "warning: ") // as say and warn put them
					if literal(said) >= 8 {
						lines = append(lines, line{said, fmt.Sprintf("%s:%d", path, i+1)})
					}
				}
			}
		}
	}
	return lines
}

// braces expands one {a,b}.
func braces(glob string) []string {
	before, rest, ok := strings.Cut(glob, "{")
	if !ok {
		return []string{glob}
	}
	list, after, _ := strings.Cut(rest, "}")
	var out []string
	for _, name := range strings.Split(list, ",") {
		out = append(out, before+name+after)
	}
	return out
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
	docs := map[string]*regexp.Regexp{}
	for _, doc := range documented(t) {
		if literal(doc) < 6 {
			t.Errorf("troubleshooting.md: %q says too little to be found by", doc)
		}
		docs[doc] = pattern(doc)
	}
	goes, shells := goLines(t), shellLines(t, shell)
	if len(goes) < 100 || len(shells) < 50 {
		t.Fatalf("%d lines found in the Go code, %d in scripts: the test is blind", len(goes), len(shells))
	}
	used := map[string]bool{}
	find := func(l line) (found bool) {
		for doc, pattern := range docs {
			if pattern.MatchString(l.text) {
				used[doc], found = true, true
			}
		}
		return found
	}
	missing := map[string]string{}
	for _, l := range slices.Concat(goes, shells) {
		if !find(l) {
			missing[l.text] = l.from
		}
	}
	for _, l := range shellLines(t, quiet) {
		find(l)
	}
	for _, text := range slices.SortedFunc(maps.Keys(missing), func(a, b string) int { return strings.Compare(missing[a]+a, missing[b]+b) }) {
		t.Errorf("%s: troubleshooting.md lacks: %s", missing[text], text)
	}
	for _, doc := range slices.Sorted(maps.Keys(docs)) {
		if !used[doc] {
			t.Errorf("troubleshooting.md: nothing says this any more: %s", doc)
		}
	}
}

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
