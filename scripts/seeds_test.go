package scripts

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A fuzz test without seeds is found, though it passes and though it has a
// line that would add some.
func TestFuzzSeedsAreMissed(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	scripts, err := filepath.Glob("*.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range scripts {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		write(filepath.Join("scripts", name), string(text))
	}
	write("go.mod", "module seeds\n")
	fuzz := func(name, before string) string {
		return "func " + name + "(f *testing.F) {\n" + before + "\tf.Fuzz(func(t *testing.T, s string) {})\n}\n"
	}
	const head = "package seeds\n\nimport \"testing\"\n\n"
	write("a/a_test.go", head+fuzz("FuzzAdded", "\tf.Add(\"x\")\n")+fuzz("FuzzFile", ""))
	write("a/testdata/fuzz/FuzzFile/one", "go test fuzz v1\nstring(\"x\")\n")
	check := func() string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "bash", "scripts/checks.sh", "seeds")
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		if (err != nil) != strings.Contains(string(out), "has no seeds") {
			t.Fatalf("%v\n%s", err, out)
		}
		return string(out)
	}
	if out, err := exec.CommandContext(t.Context(), "git", "-C", root, "init", "-q").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out := check(); out != "" {
		t.Errorf("all have seeds, and it says: %s", out)
	}
	write("b/b_test.go", head+fuzz("FuzzBare", "")+fuzz("FuzzAdded", "\tf.Add(\"x\")\n"))
	write("c/c_test.go", strings.Replace(head, "import", "import \"path/filepath\"\n\nimport", 1)+
		fuzz("FuzzLost", "\tfiles, _ := filepath.Glob(\"testdata/*.json\")\n\tfor _, name := range files {\n\t\tf.Add(name)\n\t}\n"))
	out := check()
	for _, want := range []string{"seeds/b: FuzzBare has no seeds", "seeds/c: FuzzLost has no seeds"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in: %s", want, out)
		}
	}
	if n := strings.Count(out, "\n"); n != 2 {
		t.Errorf("%d lines, want 2: %s", n, out)
	}
}
