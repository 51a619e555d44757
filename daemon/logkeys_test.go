package main

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// The keys of the JSON log, with their types, are what docs/logs.md says.
// Others rely on them: a key in that table is neither renamed nor given another
// type.
func TestLogKeysAreDocumented(t *testing.T) {
	documented := documentedKeys(t)
	found := map[string]string{}
	for key := range entryKeys {
		found[key] = entryKeys[key]
	}
	add := func(at token.Position, key, kind string) {
		switch before, ok := found[key]; {
		case entryKeys[key] != "" && key != "job" && key != "line":
			t.Errorf("%v: the key %q is every line's own; a second one of that name makes an object that readers take apart differently", at, key)
		case ok && before != kind:
			t.Errorf("%v: the key %q is a %s here and a %s elsewhere", at, key, kind, before)
		default:
			found[key] = kind
		}
	}
	eachFile(t, func(files *token.FileSet, file *ast.File) {
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			at := files.Position(call.Pos())
			kind := fieldKind(call)
			switch kind {
			case "":
				return true
			case "error":
				add(at, "error", "string")
				return true
			}
			literal, ok := call.Args[0].(*ast.BasicLit)
			if !ok {
				if ident, ok := call.Args[0].(*ast.Ident); ok && ident.Name == "key" {
					return true // of said, whose own calls are looked at
				}
				t.Errorf("%v: the key is no literal, so nothing holds it to docs/logs.md", at)
				return true
			}
			key, err := strconv.Unquote(literal.Value)
			if err != nil {
				t.Fatal(at, err)
			}
			add(at, key, kind)
			return true
		})
	})
	if len(found) < 30 {
		t.Fatalf("only %d keys found: the test is blind", len(found))
	}
	if diff := cmp.Diff(documented, found); diff != "" {
		t.Error("docs/logs.md (-), the code (+):", diff)
	}
}

// entryKeys are those of the encoder in logging, and those of a build's line.
var entryKeys = map[string]string{
	"time": "time", "level": "string", "logger": "string", "message": "string", "job": "string", "line": "string",
}

// fieldKind returns the type in JSON of the field that call makes; "" if it
// makes none.
func fieldKind(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		if f.Name == "said" {
			return "string"
		}
	case *ast.SelectorExpr:
		if pkg, ok := f.X.(*ast.Ident); !ok || pkg.Name != "zap" {
			return ""
		}
		switch f.Sel.Name {
		case "String", "ByteString", "Stringer":
			return "string"
		case "Strings":
			return "list of strings"
		case "Int", "Int64", "Uint64", "Float64":
			return "number"
		case "Bool":
			return "true or false"
		case "Duration":
			return "duration"
		case "Time":
			return "time"
		case "Error":
			return "error"
		}
		if len(call.Args) == 2 && !slices.Contains([]string{"Fields", "New", "WrapCore"}, f.Sel.Name) {
			return "value of unknown type, zap." + f.Sel.Name
		}
	}
	return ""
}

// eachFile parses the daemon's own sources.
func eachFile(t *testing.T, do func(*token.FileSet, *ast.File)) {
	t.Helper()
	files := token.NewFileSet()
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && slices.Contains([]string{"testdata", "vmtest", "storetest"}, d.Name()) {
			if err == nil {
				err = fs.SkipDir
			}
			return err
		}
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		file, err := parser.ParseFile(files, path, nil, parser.SkipObjectResolution)
		if err == nil {
			do(files, file)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

func documentedKeys(t *testing.T) map[string]string {
	t.Helper()
	doc, err := os.ReadFile(filepath.Join("..", "docs", "logs.md"))
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| (`[^|]*`) \\| ([^|]*) \\| ([^|]+) \\|$").FindAllStringSubmatch(string(doc), -1) {
		for _, key := range strings.Split(row[1], ", ") {
			key = strings.Trim(key, "`")
			if keys[key] != "" {
				t.Errorf("docs/logs.md has the key %s twice", key)
			}
			keys[key] = row[2]
		}
	}
	return keys
}

// checkKeys reports keys of a line of the JSON log that docs/logs.md lacks.
func checkKeys(t *testing.T, documented map[string]string, line []byte) (object map[string]any) {
	t.Helper()
	if err := json.Unmarshal(line, &object); err != nil {
		t.Fatalf("%v in %.200s", err, line)
	}
	for _, key := range slices.Sorted(maps.Keys(object)) {
		if documented[key] == "" {
			t.Errorf("docs/logs.md lacks the key %q: %.300s", key, line)
		}
	}
	return object
}
