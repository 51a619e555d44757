package effect_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
)

// The packages whose changes of the world are all effects.
var covered = []string{
	"osbuilder/daemon",
	"osbuilder/daemon/internal/...",
	"osbuilder/pipe/runner",
}

// Not those: what runs there is a test's.
var exempt = []string{"osbuilder/daemon/internal/vmtest", "osbuilder/daemon/internal/store/storetest"}

// changing are the functions that change what outlives the program. Where a
// number stands, only calls whose argument of that index has one of the flags
// that make or change a file count.
var changing = map[string]int{
	"os.Rename": -1, "os.Link": -1, "os.Symlink": -1, "os.Remove": -1, "os.RemoveAll": -1, "os.Mkdir": -1, "os.MkdirAll": -1,
	"os.MkdirTemp": -1, "os.Chmod": -1, "os.Chown": -1, "os.Lchown": -1, "os.Chtimes": -1, "os.Truncate": -1, "os.WriteFile": -1,
	"os.Create": -1, "os.CreateTemp": -1, "os.CopyFS": -1, "os.OpenFile": 1,

	"(*os.File).Write": -1, "(*os.File).WriteString": -1, "(*os.File).WriteAt": -1, "(*os.File).ReadFrom": -1,
	"(*os.File).Sync": -1, "(*os.File).Truncate": -1, "(*os.File).Chmod": -1, "(*os.File).Chown": -1,

	"(*os.Root).OpenFile": 1, "(*os.Root).Create": -1, "(*os.Root).Mkdir": -1, "(*os.Root).MkdirAll": -1, "(*os.Root).Chmod": -1,
	"(*os.Root).Chown": -1, "(*os.Root).Lchown": -1, "(*os.Root).Chtimes": -1, "(*os.Root).Remove": -1, "(*os.Root).RemoveAll": -1,
	"(*os.Root).Rename": -1, "(*os.Root).Link": -1, "(*os.Root).Symlink": -1, "(*os.Root).WriteFile": -1,

	"(*os.Process).Kill": -1, "(*os.Process).Signal": -1, "(*os/exec.Cmd).Start": -1, "(*os/exec.Cmd).Run": -1,
	"(*os/exec.Cmd).Output": -1, "(*os/exec.Cmd).CombinedOutput": -1,

	"(*database/sql.DB).ExecContext": -1, "(*database/sql.Conn).ExecContext": -1, "(*database/sql.Tx).Commit": -1,

	"(*github.com/pkg/sftp.Client).OpenFile": 1, "(*github.com/pkg/sftp.Client).Create": -1, "(*github.com/pkg/sftp.Client).Remove": -1,
	"(*github.com/pkg/sftp.Client).RemoveAll": -1, "(*github.com/pkg/sftp.Client).Rename": -1,
	"(*github.com/pkg/sftp.Client).PosixRename": -1, "(*github.com/pkg/sftp.Client).Mkdir": -1,
	"(*github.com/pkg/sftp.Client).MkdirAll": -1, "(*github.com/pkg/sftp.Client).RemoveDirectory": -1,
	"(*github.com/pkg/sftp.Client).Link": -1, "(*github.com/pkg/sftp.Client).Symlink": -1, "(*github.com/pkg/sftp.Client).Chmod": -1,
	"(*github.com/pkg/sftp.Client).Chown": -1, "(*github.com/pkg/sftp.Client).Truncate": -1,
	"(*github.com/pkg/sftp.File).Write": -1, "(*github.com/pkg/sftp.File).WriteAt": -1, "(*github.com/pkg/sftp.File).ReadFrom": -1,
	"(*github.com/pkg/sftp.File).ReadFromWithConcurrency": -1, "(*github.com/pkg/sftp.File).Sync": -1,
	"(*github.com/pkg/sftp.File).Truncate": -1, "(*github.com/pkg/sftp.File).Chmod": -1, "(*github.com/pkg/sftp.File).Chown": -1,
}

func init() {
	for _, name := range []string{
		"Rename", "Renameat", "Renameat2", "Link", "Linkat", "Symlink", "Symlinkat", "Unlink", "Unlinkat", "Rmdir", "Mkdir", "Mkdirat",
		"Mkfifo", "Mkfifoat", "Mknod", "Mknodat", "Chmod", "Fchmod", "Fchmodat", "Chown", "Lchown", "Fchown", "Fchownat", "Truncate",
		"Ftruncate", "Fallocate", "Fsync", "Fdatasync", "SyncFileRange", "Sync", "Syncfs", "Write", "Pwrite", "Pwritev", "Writev",
		"CopyFileRange", "Sendfile", "Setxattr", "Fsetxattr", "Lsetxattr", "Kill", "Tgkill", "PidfdSendSignal", "Mount", "Unmount",
	} {
		changing["golang.org/x/sys/unix."+name] = -1
		changing["syscall."+name] = -1
	}
	changing["golang.org/x/sys/unix.Open"], changing["golang.org/x/sys/unix.Openat"] = 1, 2
}

const announce = "osbuilder/pipe/effect.Before"

// Nothing is changed behind the hook's back: where it isn't done by this
// package's functions, Before goes in front of each call.
func TestEveryEffectIsAnnounced(t *testing.T) {
	packages := list(t)
	exports := make(map[string]string, len(packages))
	for _, p := range packages {
		exports[p.ImportPath] = p.Export
	}
	set := token.NewFileSet()
	imports := importer.ForCompiler(set, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	seen := map[string]bool{}
	for _, p := range packages {
		if p.DepOnly || slices.Contains(exempt, p.ImportPath) {
			continue
		}
		for _, complaint := range check(t, set, imports, p, seen) {
			t.Error(complaint)
		}
	}
	// A name that is in no package guards nothing.
	for _, name := range []string{"(*github.com/pkg/sftp.Client).PosixRename", "(*database/sql.Tx).Commit", "golang.org/x/sys/unix.Renameat2"} {
		if !seen[name] {
			t.Errorf("no use of %s was found: the test looks past the code", name)
		}
	}
}

type listed struct {
	ImportPath, Dir, Export string
	GoFiles                 []string
	DepOnly                 bool
	Error                   *struct{ Err string }
}

// list returns the packages and all that they import, compiled.
func list(t *testing.T) []listed {
	args := []string{"list", "-export", "-deps", "-json=ImportPath,Dir,Export,GoFiles,DepOnly,Error"}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "-race" && s.Value == "true" {
				args = append(args, "-race") // as everything else was compiled
			}
		}
	}
	cmd := exec.CommandContext(t.Context(), "go", append(args, covered...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var all []listed
	for decoder := json.NewDecoder(bytes.NewReader(out)); ; {
		var p listed
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatal(err)
		}
		if p.Error != nil {
			t.Fatalf("%s: %s", p.ImportPath, p.Error.Err)
		}
		all = append(all, p)
	}
}

// check returns a complaint for each change that is not announced.
func check(t *testing.T, set *token.FileSet, imports types.Importer, p listed, seen map[string]bool) []string {
	var files []*ast.File
	for _, name := range p.GoFiles {
		f, err := parser.ParseFile(set, filepath.Join(p.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	info := &types.Info{Uses: map[*ast.Ident]types.Object{}, Types: map[ast.Expr]types.TypeAndValue{}}
	if _, err := (&types.Config{Importer: imports}).Check(p.ImportPath, set, files, info); err != nil {
		t.Fatal(err)
	}
	c := &checker{set: set, info: info, seen: seen}
	for _, f := range files {
		ast.Walk(c.function(), f)
	}
	return c.complaints
}

type checker struct {
	set        *token.FileSet
	info       *types.Info
	seen       map[string]bool
	complaints []string
}

// function returns a visitor of one function's own code: announced once, one
// change may follow.
func (c *checker) function() ast.Visitor {
	announced := false
	called := map[*ast.Ident]*ast.CallExpr{}
	var visit visitor
	visit = func(n ast.Node) ast.Visitor {
		switch n := n.(type) {
		case *ast.FuncDecl, *ast.FuncLit:
			return c.function()
		case *ast.CallExpr:
			switch f := ast.Unparen(n.Fun).(type) {
			case *ast.Ident:
				called[f] = n
			case *ast.SelectorExpr:
				called[f.Sel] = n
			}
		case *ast.Ident:
			f, ok := c.info.Uses[n].(*types.Func)
			if !ok {
				return visit
			}
			if f.FullName() == announce {
				announced = true
			} else if c.changes(f.FullName(), called[n]) {
				if !announced {
					c.complaints = append(c.complaints, fmt.Sprintf("%s: %s: use the function of that name in osbuilder/pipe/effect, or put effect.Before in front of it",
						c.set.Position(n.Pos()), f.FullName()))
				}
				announced = false
			}
		}
		return visit
	}
	return visit
}

type visitor func(ast.Node) ast.Visitor

func (v visitor) Visit(n ast.Node) ast.Visitor { return v(n) }

// changes reports whether a use of a function is a change.
func (c *checker) changes(name string, call *ast.CallExpr) bool {
	flags, ok := changing[name]
	if !ok {
		return false
	}
	c.seen[name] = true
	if flags < 0 || call == nil || len(call.Args) <= flags {
		return true
	}
	value := c.info.Types[call.Args[flags]].Value
	if value == nil {
		return true // who knows
	}
	n, exact := constant.Int64Val(value)
	return !exact || n&int64(os.O_WRONLY|os.O_RDWR|os.O_CREATE|os.O_TRUNC|os.O_APPEND) != 0
}

// The checker itself finds what it should, and no more.
func TestTheCheckFindsWhatIsForgotten(t *testing.T) {
	dir := t.TempDir()
	source := strings.ReplaceAll(`package p

import "os"

func Before(string) {}

func fine() error {
	if f, err := os.OpenFile("x", os.O_RDONLY, 0); err == nil {
		return f.Close()
	}
	return nil
}

func bad(f *os.File) error {
	func() { _ = os.Remove("a") }() // 1
	do := f.Sync                    // 2
	if _, err := os.OpenFile("x", os.O_RDWR, 0); err != nil { // 3
		return err
	}
	return do()
}

type own struct{ *os.File }

func promoted(o own) error { return o.Truncate(0) } // 4
`, "\t", "  ")
	if err := os.WriteFile(filepath.Join(dir, "p.go"), []byte(source), 0o600); err != nil {
		t.Fatal(err)
	}
	set := token.NewFileSet()
	got := check(t, set, importer.ForCompiler(set, "source", nil), listed{ImportPath: "p", Dir: dir, GoFiles: []string{"p.go"}}, map[string]bool{})
	var lines []string
	for _, complaint := range got {
		at := strings.Split(complaint, ":")
		lines = append(lines, at[1])
	}
	if want := []string{"15", "16", "17", "25"}; !slices.Equal(lines, want) {
		t.Errorf("complaints %q, want some of the lines %v", got, want)
	}
}
