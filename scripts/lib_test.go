// Package scripts holds what make runs. Its test is of the shell that the
// scripts share.
package scripts

import (
	"bufio"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

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
FROM_SHELL=$HOME/a-${HOME}
FROM_FILE="$PLAIN and ${PLAIN}s"
HOME_TWICE=$HOME$HOME
QUOTED='$HOME ${HOME}'
DOLLARS=a$$b$$HOME
ESCAPED_NAME="\$HOME/\${HOME}"
NOT_SET=x${NOBODY_SETS_THIS}y
EMPTY_IN_SHELL=a${SET_TO_NOTHING}b
SET_TO_NOTHING=something
LATER=$AFTER
AFTER=last
`
	root := t.TempDir()
	lib, err := os.ReadFile("lib.sh")
	err = errors.Join(err, os.Mkdir(filepath.Join(root, "scripts"), 0o755),
		os.WriteFile(filepath.Join(root, "scripts", "lib.sh"), lib, 0o644), os.WriteFile(filepath.Join(root, ".env"), []byte(text), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	shell := map[string]string{"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/home/me & \\1", "SET_TO_NOTHING": ""}
	want, err := dotenv.GetEnvFromFile(shell, []string{filepath.Join(root, ".env")})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for name := range want {
		cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", `. scripts/lib.sh && value=$(setting "$1" && echo .) && printf %s "${value%.}"`, "bash", name)
		cmd.Dir = root
		for key, value := range shell {
			cmd.Env = append(cmd.Env, key+"="+value)
		}
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

// A script that is told to end does so at once, and nothing that it started
// goes on.
func TestKillable(t *testing.T) {
	root := t.TempDir()
	lib, err := os.ReadFile("lib.sh")
	err = errors.Join(err, os.Mkdir(filepath.Join(root, "scripts"), 0o755), os.WriteFile(filepath.Join(root, "scripts", "lib.sh"), lib, 0o644))
	if err != nil {
		t.Fatal(err)
	}
	// What it started holds its standard output, whose end is therefore theirs.
	cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", `. scripts/lib.sh
long() { echo begun; sleep 1000 | cat; }
trap 'end_killable; echo tidied up' EXIT
trap 'exit 143' INT TERM HUP
killable true
killable false || echo "status $?"
killable long
echo not reached`)
	cmd.Dir, cmd.Env = root, []string{"PATH=/usr/local/bin:/usr/bin:/bin"}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var said []string
	// Whatever goes on all the same is not waited for.
	late := time.AfterFunc(30*time.Second, func() { _ = out.Close() })
	for lines := bufio.NewScanner(out); lines.Scan(); {
		said = append(said, lines.Text())
		if lines.Text() == "begun" {
			if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
		}
	}
	late.Stop()
	_ = cmd.Wait() // what counts is the code
	if diff := cmp.Diff([]string{"status 1", "begun", "tidied up"}, said); diff != "" || cmd.ProcessState.ExitCode() != 143 {
		t.Errorf("exit code %d (-want +got):\n%s", cmd.ProcessState.ExitCode(), diff)
	}
}
