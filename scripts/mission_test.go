package scripts

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// What the VM built counts as shown when it is what SHA256SUMS says, and that
// says something.
func TestMissionHoldsTheImageToItsSums(t *testing.T) {
	root := t.TempDir()
	text, err := os.ReadFile("boot-nixos.sh")
	lib, libErr := os.ReadFile("lib.sh")
	if err := errors.Join(err, libErr, os.Mkdir(filepath.Join(root, "scripts"), 0o755), os.WriteFile(filepath.Join(root, "scripts", "lib.sh"), lib, 0o644)); err != nil {
		t.Fatal(err)
	}
	mission := regexp.MustCompile(`(?ms)^mission\(\) \{\n.*?^\}\n`).FindString(string(text))
	if mission == "" {
		t.Fatal("boot-nixos.sh has no mission any more")
	}
	sum := fmt.Sprintf("%x", sha256.Sum256([]byte("an image")))
	for name, tt := range map[string]struct {
		sums string
		fine bool
	}{
		"as it says":    {sum + "  x.iso\n", true},
		"another image": {sum[1:] + "0  x.iso\n", false},
		"no such file":  {sum + "  y.iso\n", false},
		"empty":         {"", false},
	} {
		t.Run(name, func(t *testing.T) {
			job, folder := t.TempDir(), t.TempDir()
			for file, text := range map[string]string{"x.iso": "an image", "build.log": "built\n", "result.json": "{}\n", "SHA256SUMS": tt.sums} {
				err = errors.Join(err, os.WriteFile(filepath.Join(job, file), []byte(text), 0o644))
			}
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", `. scripts/lib.sh
boot() { :; }
run_job() { :; }
keep_console() { :; }
saw() { echo "$@"; }
`+mission+`mission || exit 3`)
			cmd.Dir, cmd.Env = root, []string{"PATH=/usr/local/bin:/usr/bin:/bin", "JOB=" + job, "FOLDER=" + folder, "EXAMPLE=/dev/null"}
			out, err := cmd.CombinedOutput()
			if _, kept := os.Stat(filepath.Join(folder, "minimal.iso")); (err == nil) != tt.fine || (kept == nil) != tt.fine {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
