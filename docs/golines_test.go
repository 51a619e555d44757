package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// speakers are the functions whose text a user reads: in which folders, by
// which name, and in which argument. A function that hands a parameter on to
// one of them is one, too.
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
	"daemon/internal/inbox":     {"what"},
	"daemon/internal/room":      {"why"},
	"daemon/internal/preflight": {"Then"},
	"pipe/runner":               {"Message", "Reason", "message", "unfit"},
	"vmimage/internal":          {"Summary"},
}

// sentinels are folders whose errors of their own are read by users.
var sentinels = []string{"daemon"}

// A folder is the Go code of one folder.
type folder struct {
	dir       string
	files     []*ast.File
	structs   map[string][]string        // the names of their fields, in order
	funcs     map[string][]*ast.FuncDecl // functions and methods
	speakers  map[string][]int           // functions whose text a user reads: which arguments
	positions *token.FileSet
}

// goLines collects what the Go code can say.
func goLines(t *testing.T) []line {
	t.Helper()
	var lines []line
	for _, top := range []string{"daemon", "pipe/runner", "vmimage/internal"} {
		err := fs.WalkDir(root(t), top, func(dir string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() {
				return err
			}
			if slices.Contains([]string{"testdata", "vmtest", "storetest", "nixlogtest"}, d.Name()) {
				return fs.SkipDir
			}
			f, err := readFolder(root(t), dir)
			if err == nil {
				lines = append(lines, f.lines()...)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return lines
}

func readFolder(files fs.FS, dir string) (*folder, error) {
	f := &folder{dir: dir, structs: map[string][]string{}, funcs: map[string][]*ast.FuncDecl{}, speakers: map[string][]int{}, positions: token.NewFileSet()}
	for _, s := range speakers {
		if within(dir, s.dir) {
			f.speakers[s.name] = append(f.speakers[s.name], s.arg)
		}
	}
	names, err := fs.Glob(files, path.Join(dir, "*.go"))
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		source, err := fs.ReadFile(files, name)
		if err != nil {
			return nil, err
		}
		file, err := parser.ParseFile(f.positions, name, source, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		f.add(file)
	}
	return f, nil
}

func within(dir, top string) bool { return dir == top || strings.HasPrefix(dir, top+"/") }

func (f *folder) add(file *ast.File) {
	f.files = append(f.files, file)
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			f.funcs[n.Name.Name] = append(f.funcs[n.Name.Name], n)
		case *ast.TypeSpec:
			if s, ok := n.Type.(*ast.StructType); ok {
				f.structs[n.Name.Name] = names(s.Fields)
			}
		}
		return true
	})
}

// names are those of fields or parameters, in order; one without a name has "".
func names(list *ast.FieldList) []string {
	var out []string
	for _, field := range list.List {
		if field.Names == nil {
			out = append(out, "")
		}
		for _, name := range field.Names {
			out = append(out, name.Name)
		}
	}
	return out
}

// lines are all that its code can say. While that finds functions that hand on
// what they are given, their callers are looked at anew.
func (f *folder) lines() (lines []line) {
	for known := -1; known != f.spoken(); {
		known, lines = f.spoken(), nil
		for _, file := range f.files {
			for _, d := range file.Decls {
				in, _ := d.(*ast.FuncDecl)
				ast.Inspect(d, func(n ast.Node) bool {
					for _, e := range f.said(n) {
						lines = append(lines, f.find(n, e, in)...)
					}
					return true
				})
			}
		}
	}
	return lines
}

// find returns the lines that an expression can be. One of the log must be seen.
func (f *folder) find(n ast.Node, e ast.Expr, in *ast.FuncDecl) (lines []line) {
	seen := false
	for _, l := range f.texts(e, in, 0, map[ast.Expr]bool{}) {
		l.text = strings.TrimSpace(l.text)
		seen = seen || literal(l.text) > 0
		if literal(l.text) >= 8 {
			lines = append(lines, l)
		}
	}
	call, ok := n.(*ast.CallExpr)
	if !ok || seen || !slices.Contains([]string{"Warn", "Error"}, called(call)) {
		return lines
	}
	switch e := e.(type) {
	case *ast.Ident:
		seen = paramOf(in, e.Name) >= 0
	case *ast.SelectorExpr: // a field, which is looked at where it is filled in
		seen = f.wanted(e.Sel.Name) || e.Sel.Name == "What" // of preflight: there Then is what is wrong
	}
	if !seen {
		lines = append(lines, line{"a line of the log that this test can't see", f.position(e)})
	}
	return lines
}

func (f *folder) position(e ast.Node) string { return f.positions.Position(e.Pos()).String() }

func (f *folder) spoken() (n int) {
	for _, args := range f.speakers {
		n += len(args)
	}
	return n
}

// said returns the expressions in a node whose text a user reads.
func (f *folder) said(n ast.Node) (out []ast.Expr) {
	switch n := n.(type) {
	case *ast.CallExpr:
		if name := called(n); name == "append" && len(n.Args) > 1 && named(n.Args[0], "problems") {
			return n.Args[1:]
		}
		if of, ok := n.Fun.(*ast.SelectorExpr); ok && named(of.X, "zap") {
			return nil // a field
		}
		for _, arg := range f.speakers[called(n)] {
			if f.dir == "daemon/internal/setup" && strings.HasPrefix(called(n), "Fprint") && !strings.HasPrefix(template(n.Args[arg]), "note: ") {
				continue // what init did
			}
			if arg < len(n.Args) {
				out = append(out, n.Args[arg])
			}
		}
	case *ast.CompositeLit:
		out = f.saidIn(n)
	case *ast.AssignStmt:
		for i, left := range n.Lhs {
			if to, ok := left.(*ast.SelectorExpr); ok && f.wanted(to.Sel.Name) {
				out = append(out, n.Rhs[min(i, len(n.Rhs)-1)])
			}
		}
	case *ast.FuncDecl: // the text of an error's type
		if n.Name.Name == "Error" && f.dir == "daemon/internal/disk" {
			out = returned(n, 0)
		}
	case *ast.Field: // a setting that is no text
		if kind, ok := n.Type.(*ast.Ident); f.dir == "daemon/internal/config" && n.Tag != nil && (!ok || kind.Name != "string") {
			if name := reflect.StructTag(strings.Trim(n.Tag.Value, "`")).Get("env"); name != "-" {
				out = append(out, &ast.BasicLit{ValuePos: n.Pos(), Value: strconv.Quote(name + "=%v: want")})
			}
		}
	case *ast.ValueSpec:
		for i, name := range n.Names[:len(n.Values)] {
			switch {
			case strings.HasPrefix(strings.ToLower(name.Name), "err") && slices.ContainsFunc(sentinels, func(top string) bool { return within(f.dir, top) }),
				name.Name == "droppedMessage":
				out = append(out, n.Values[i])
			case strings.HasPrefix(strings.ToLower(name.Name), "rung"): // shown as a field
				out = append(out, &ast.BinaryExpr{X: &ast.BasicLit{ValuePos: n.Pos(), Value: `"rung="`}, Y: n.Values[i]})
			}
		}
	}
	return out
}

// saidIn returns a struct's fields that a user reads, by name or in order.
func (f *folder) saidIn(n *ast.CompositeLit) (out []ast.Expr) {
	kind, _ := n.Type.(*ast.Ident)
	for i, e := range n.Elts {
		if pair, ok := e.(*ast.KeyValueExpr); ok {
			if key, ok := pair.Key.(*ast.Ident); ok && f.wanted(key.Name) {
				out = append(out, pair.Value)
			}
		} else if kind != nil && i < len(f.structs[kind.Name]) && f.wanted(f.structs[kind.Name][i]) {
			out = append(out, e)
		}
	}
	return out
}

func (f *folder) wanted(field string) bool {
	for dir, names := range fields {
		if within(f.dir, dir) && slices.Contains(names, field) {
			return true
		}
	}
	return false
}

// texts returns what an expression in a function can say: what a variable is
// given there, and what functions of the same folder return. at is which of a
// call's results it is.
func (f *folder) texts(e ast.Expr, in *ast.FuncDecl, at int, seen map[ast.Expr]bool) (out []line) {
	if seen[e] {
		return nil
	}
	seen[e] = true // until it is left: a variable can be given what is made of itself
	defer delete(seen, e)
	switch e := e.(type) {
	case *ast.Ident:
		out = f.variable(e, in, seen)
		if i := paramOf(in, e.Name); i >= 0 && !slices.Contains(f.speakers[in.Name.Name], i) {
			f.speakers[in.Name.Name] = append(f.speakers[in.Name.Name], i)
		}
	case *ast.BinaryExpr:
		for _, x := range f.part(e.X, in, seen) {
			for _, y := range f.part(e.Y, in, seen) {
				out = append(out, line{x.text + y.text, x.from})
			}
		}
		return out
	case *ast.CallExpr:
		for _, callee := range f.funcs[called(e)] {
			for _, r := range returned(callee, at) {
				out = append(out, f.texts(r, callee, at, seen)...)
			}
		}
		for _, arg := range e.Args {
			if slices.Contains([]string{"append", "Join", "Or"}, called(e)) {
				out = append(out, f.texts(arg, in, 0, seen)...)
			}
		}
	}
	return append(out, line{template(e), f.position(e)})
}

// variable returns what a function gives one of its variables.
func (f *folder) variable(e *ast.Ident, in *ast.FuncDecl, seen map[ast.Expr]bool) (out []line) {
	if in == nil || e.Name == "err" { // another's error, which stands behind what is said
		return nil
	}
	for _, v := range given(in, e.Name) {
		out = append(out, f.texts(v.Expr, in, v.at, seen)...)
	}
	return out
}

// part returns what a part of a line can be.
func (f *folder) part(e ast.Expr, in *ast.FuncDecl, seen map[ast.Expr]bool) (out []line) {
	switch e := e.(type) {
	case *ast.BinaryExpr:
		return f.texts(e, in, 0, seen)
	case *ast.Ident:
		out = f.variable(e, in, seen)
	}
	if out == nil {
		out = []line{{template(e), f.position(e)}}
	}
	return out
}

func paramOf(in *ast.FuncDecl, name string) int {
	if in == nil {
		return -1
	}
	return slices.Index(names(in.Type.Params), name)
}

func called(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		return f.Sel.Name
	}
	return ""
}

// A value is what a variable is given: an expression, or one of its results.
type value struct {
	ast.Expr
	at int
}

func given(in *ast.FuncDecl, name string) (out []value) {
	is := func(e ast.Expr) bool { return named(e, name) }
	add := func(i int, values []ast.Expr) {
		if i < len(values) {
			out = append(out, value{values[i], 0})
		} else if len(values) == 1 {
			out = append(out, value{values[0], i})
		}
	}
	ast.Inspect(in, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.AssignStmt:
			for i, left := range n.Lhs {
				if is(left) && n.Tok != token.ADD_ASSIGN { // that goes on with what is said already
					add(i, n.Rhs)
				}
			}
		case *ast.ValueSpec:
			for i, left := range n.Names {
				if is(left) {
					add(i, n.Values)
				}
			}
		}
		return true
	})
	return out
}

// returned are the values that a function returns in place at.
func returned(fn *ast.FuncDecl, at int) (out []ast.Expr) {
	ast.Inspect(fn, func(n ast.Node) bool {
		if r, ok := n.(*ast.ReturnStmt); ok && len(r.Results) > 0 {
			out = append(out, r.Results[min(at, len(r.Results)-1)])
		}
		_, inner := n.(*ast.FuncLit)
		return !inner
	})
	return out
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

func named(e ast.Expr, name string) bool {
	id, ok := e.(*ast.Ident)
	return ok && id.Name == name
}
