//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"osbuilder/e2e/internal/harness"
	"osbuilder/internal/testenv"
)

// A checkout is a clone of the project in a user's hands, with its folders
// where compose.yaml has them. No VM is booted.
type checkout struct {
	*harness.Project
	uid uint32
}

func clone(t *testing.T, uid int, folders bool) checkout {
	t.Helper()
	p, err := harness.New(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			p.Explain(context.WithoutCancel(t.Context()))
		}
		if err := p.Remove(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	})
	files, err := p.ComposeFiles()
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(filepath.Join(p.Root, file))
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(p.Dir, file)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(p.Dir, file), data, 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p.Root = p.Dir
	// Nobody sets these; .env may.
	p.Env = slices.DeleteFunc(p.Env, func(setting string) bool {
		name, _, _ := strings.Cut(setting, "=")
		return slices.Contains([]string{"JOBS_DIR", "OUTPUT_DIR", "PUID", "PGID"}, name)
	})
	if !folders {
		if err := errors.Join(os.Remove(p.Jobs()), os.Remove(p.Output())); err != nil {
			t.Fatal(err)
		}
	}
	if err := filepath.WalkDir(p.Dir, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Chown(path, uid, uid))
	}); err != nil {
		t.Fatal(err)
	}
	return checkout{p, uint32(uid)}
}

// types runs in the clone what its user types.
func (c checkout) types(t *testing.T, command string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "bash", "-c", command)
	cmd.Dir, cmd.Env = c.Dir, append(os.Environ(), "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: c.uid, Gid: c.uid}}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// up has the installation run, by .env if there is one.
func (c checkout) up(t *testing.T) {
	t.Helper()
	args := []string{"up", "--detach", "--no-build", "sidecar"}
	if env := filepath.Join(c.Dir, ".env"); fileExists(env) {
		args = append([]string{"--env-file", env}, args...)
	}
	if _, err := c.Compose(t.Context(), args...); err != nil {
		t.Fatal(err)
	}
}

func fileExists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// works sees a job through from the drop to what its user does with its
// outcome: without a VM it ends as cancelled.
func (c checkout) works(t *testing.T, name string) {
	t.Helper()
	if out, err := c.types(t, fmt.Sprintf("echo true > jobs/%s.sh", name)); err != nil {
		t.Fatalf("the user can't drop a job: %v\n%s", err, out)
	}
	c.Osbuilder(t, "cancel", c.ID(t, name+".sh"))
	harness.Eventually(t, harness.StepTimeout, "outcome", func() bool { return fileExists(c.Output(name, "latest", "result.json")) })
	if out, err := c.types(t, fmt.Sprintf("grep -q cancelled output/%s/latest/result.json && rm -r output/%[1]s jobs/.taken/*", name)); err != nil {
		t.Errorf("the user can't do what he wants with the outcome: %v\n%s", err, out)
	}
}

// Whoever owns a clone, what README.md says to type works, or a line names the
// command that mends it.
func TestOwners(t *testing.T) {
	if os.Getuid() != 0 {
		testenv.Lacks(t, "only root can be several users")
	}
	t.Parallel() // each clone is an installation of its own
	const readme = `printf 'PUID=%s\nPGID=%s\n' "$(id -u)" "$(id -g)" > .env`
	for _, uid := range []int{1000, 1001} {
		for _, folders := range []bool{true, false} {
			t.Run(fmt.Sprintf("%d, folders %t", uid, folders), func(t *testing.T) {
				c := clone(t, uid, folders)
				if out, err := c.types(t, readme); err != nil {
					t.Fatal(err, out)
				}
				c.up(t)
				c.works(t, "mine")
			})
		}
	}
	t.Run("root, no .env", func(t *testing.T) {
		c := clone(t, 0, false)
		c.up(t)
		c.works(t, "mine")
		if info, err := os.Stat(c.Output()); err != nil || info.Sys().(*syscall.Stat_t).Uid != 1000 {
			t.Errorf("output/ is not the daemon's: %v", err)
		}
	})
	// A user who is not 1000 and has no .env, twice: with the folders of the clone, and with those that Docker makes. The
	// volumes are another's then, once he did as he was told.
	for _, folders := range []bool{true, false} {
		t.Run(fmt.Sprintf("1001, no .env, folders %t", folders), func(t *testing.T) {
			c := clone(t, 1001, folders)
			c.up(t)
			if out, err := c.types(t, "echo true > jobs/mine.sh"); err == nil || !strings.Contains(out, "Permission denied") {
				t.Fatalf("dropped into a folder of another's: %v, %s", err, out)
			}
			said, err := c.Compose(t.Context(), "logs", "--no-color", "init")
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(said, "set PUID=1001 and PGID=1001 in .env, then: docker compose up -d\n") {
				t.Fatalf("nobody says what to do: %s", said)
			}
			c.Drop(t, "before.sh", "true\n") // by root, as it happens
			id := c.ID(t, "before.sh")
			if out, err := c.types(t, `printf 'PUID=1001\nPGID=1001\n' > .env`); err != nil {
				t.Fatal(err, out)
			}
			c.up(t)
			c.works(t, "mine")
			if list := c.Osbuilder(t, "jobs", "--all"); !strings.Contains(list, id) {
				t.Errorf("what was recorded before is gone:\n%s", list)
			}
		})
	}
}
