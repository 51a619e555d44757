package inbox

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
)

// odd are names of which a shell could make something else.
var odd = []string{
	"plain.nix", "two words.nix", "it's.nix", "$(ran)", "`ran`", "a;b.nix", "a&b", "a|b", "a>b", "a*b?[c]", "~", "~nobody", "#x", "!x", "{a,b}", "a=b",
	"-R", "--reference=x", "-", `a\b`, `a"b`, `it's "x" \n`, "tab\there", "line\nend", "\x1b[2Jclear", "\x7f", "\u009b", "gr\u00fc\u00dfe", "\u202egnp", "\u00a0", "\xff\xfe", "\ufffd", "''",
}

// What a name is quoted as is that name again to Bash, and looks in a log as it is.
func FuzzShellQuote(f *testing.F) {
	for _, name := range odd {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if strings.ContainsRune(name, 0) {
			return // no name has it
		}
		word := shellQuote(name)
		if !utf8.ValidString(word) || strings.ContainsFunc(word, func(r rune) bool { return r == '"' || !unicode.IsPrint(r) }) {
			t.Errorf("%q is quoted as %q, which does not show as it is", name, word)
		}
		want := name
		if strings.HasPrefix(name, "-") {
			want = "./" + name
		}
		if out, err := shell(t, t.TempDir(), "printf '%s|' "+word); err != nil || string(out) != want+"|" {
			t.Errorf("%q is quoted as %s, which is %q (%v)", name, word, out, err)
		}
	})
}

// The commands that hints name do what they say, and nothing else, whatever a
// drop is called.
func TestHintsCanBePasted(t *testing.T) {
	for _, name := range odd {
		t.Run(fmt.Sprintf("%q", name), func(t *testing.T) {
			f, b, _ := keeper(t)
			path := f.write(filepath.Join(name, "configuration.nix"), "{ }\n")
			if err := os.Chmod(path, 0); err != nil {
				t.Fatal(err)
			}
			hints := hint.Of(b.explain(&fs.PathError{Op: "open", Path: path, Err: unix.EACCES}, name, 0))
			_, command, _ := strings.Cut(hints[0], "in the jobs folder: ")
			f.paste(command)
			if info, err := os.Stat(path); err != nil || info.Mode().Perm()&0o444 != 0o444 {
				t.Errorf("%s: %v, %v", command, info, err)
			}
		})
	}
}

// shell runs a command that may be quoted wrongly: in a folder of the test's, as a Bash that goes and writes nowhere else,
// with no programs but those, and no home to be found.
func shell(t *testing.T, dir, command string, programs ...string) ([]byte, error) {
	t.Helper()
	bash, err := exec.LookPath("bash")
	if err != nil {
		t.Fatal(err)
	}
	bin := t.TempDir()
	for _, name := range programs {
		path, err := exec.LookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(bin, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), bash, "--restricted", "--norc", "-c", command)
	cmd.Dir, cmd.Env = dir, []string{"PATH=" + bin, "HOME=" + bin, "LC_ALL=C"}
	return cmd.CombinedOutput()
}

// paste runs a command in the jobs folder.
func (f *fixture) paste(command string) {
	f.t.Helper()
	if out, err := shell(f.t, f.cfg.Dir, command, "chmod", "cp"); err != nil {
		f.t.Errorf("%s: %v: %s", command, err, out)
	}
}

// So does what is said of a job that is lost.
func TestALostDropIsDroppedAgain(t *testing.T) {
	for _, name := range odd {
		if !utf8.ValidString(name) {
			continue // never taken
		}
		t.Run(fmt.Sprintf("%q", name), func(t *testing.T) {
			f, b, logs := keeper(t)
			id := job.NewID(time.Date(2026, 5, 1, 0, 0, 0, 0, time.UTC), 1)
			taken := filepath.Join("jobs", takenDir, string(id))
			b.cfg.Dir = filepath.Join(f.cfg.Dir, "jobs")
			f.write(filepath.Join(taken, name), "true\n")
			if err := os.MkdirAll(filepath.Join(f.cfg.State, "jobs", string(id), sourceDir, name), 0o700); err != nil {
				t.Fatal(err)
			}
			none := func() (map[job.ID]bool, error) { return nil, nil }
			if err := b.SayLost(t.Context(), func(context.Context) (map[job.ID]bool, error) { return none() }, none); err != nil {
				t.Fatal(err)
			}
			_, command, _ := strings.Cut(fmt.Sprint(logs.All()[0].ContextMap()["hint"]), "Drop it again: ")
			f.paste(command)
			if !there(b.cfg.Dir, name) {
				t.Errorf("%s: there is %q", command, list(t, b.cfg.Dir))
			}
		})
	}
}
