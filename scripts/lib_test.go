// Package scripts holds what make runs. Its test is of the shell that the
// scripts share.
package scripts

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/google/go-cmp/cmp"
)

// The scripts read .env as Compose does.
func TestSettingIsComposes(t *testing.T) {
	const text = `# PLAIN=commented
PLAIN=first
PLAIN=a value # and a comment
export EXPORTED=yes
EMPTY=
ONLY_COMMENT= # nothing
HASH=a#b
DOUBLE="one line" # and a comment
SINGLE='it # is $one'
VM_NIX_CONF="extra-substituters = https://cache.example.org
# in it
PLAIN=no
extra-trusted-public-keys = cache.example.org-1:AAAA="
AUTHORIZED_KEYS='ssh-ed25519 AAAA a
ssh-ed25519 BBBB b'
ESCAPED="say \"a\\b\" \$c\nd"
AFTER=last
`
	root := t.TempDir()
	lib, err := os.ReadFile("lib.sh")
	err = errors.Join(err, os.Mkdir(filepath.Join(root, "scripts"), 0o755),
		os.WriteFile(filepath.Join(root, "scripts", "lib.sh"), lib, 0o644), os.WriteFile(filepath.Join(root, ".env"), []byte(text), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	want, err := dotenv.Read(filepath.Join(root, ".env"))
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for name := range want {
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", `. scripts/lib.sh && value=$(setting "$1" && echo .) && printf %s "${value%.}"`, "bash", name)
		cmd.Dir, cmd.Env = root, []string{"PATH=/usr/local/bin:/usr/bin:/bin"}
		value, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatal(name, err, string(value))
		}
		got[name] = string(value)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error("Compose (-), the scripts (+):", diff)
	}
}
