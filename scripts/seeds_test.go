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
	write("go.mod", "module seeds\n")
	fuzz := func(name, before string) string {
		return "func " + name + "(f *testing.F) {\n" + before + "\tf.Fuzz(func(t *testing.T, s string) {})\n}\n"
	}
	const head = "package seeds\n\nimport \"testing\"\n\n"
	write("a/a_test.go", head+fuzz("FuzzAdded", "\tf.Add(\"x\")\n")+fuzz("FuzzFile", ""))
	write("a/testdata/fuzz/FuzzFile/one", "go test fuzz v1\nstring(\"x\")\n")
	seeded, err := filepath.Abs("seeded.sh")
	if err != nil {
		t.Fatal(err)
	}
	check := func() (string, error) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), "go", "test", "-exec", "'"+seeded+"'", "./...")
		cmd.Dir = root
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	if out, err := check(); err != nil || strings.Contains(out, "no seeds") {
		t.Errorf("all have seeds, and it says: %v\n%s", err, out)
	}
	write("b/b_test.go", head+fuzz("FuzzBare", "")+fuzz("FuzzAdded", "\tf.Add(\"x\")\n"))
	write("c/c_test.go", strings.Replace(head, "import", "import \"path/filepath\"\n\nimport", 1)+
		fuzz("FuzzLost", "\tfiles, _ := filepath.Glob(\"testdata/*.json\")\n\tfor _, name := range files {\n\t\tf.Add(name)\n\t}\n"))
	out, err := check()
	if err == nil {
		t.Errorf("it passes: %s", out)
	}
	for _, want := range []string{"FuzzBare has no seeds", "FuzzLost has no seeds", "FAIL\tseeds/b", "FAIL\tseeds/c"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in: %s", want, out)
		}
	}
	if n := strings.Count(out, "has no seeds"); n != 2 {
		t.Errorf("said %d times, want 2: %s", n, out)
	}
}
