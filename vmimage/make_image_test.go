package vmimage

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// A making is make-image without its container: the real script, an image-build
// and a Nix that do what the test wants.
type making struct {
	t   *testing.T
	dir string
}

// imageBuild makes an ISO of what SOURCE is, or fails as FAILS says. The ISO
// before and the one that it makes are known to Nix by their roots.
const imageBuild = `#!/bin/bash
while (($# > 1)); do
  if [[ $1 = --out ]]; then out=$2; fi
  shift
done
echo "evaluating configuration.nix"
case ${FAILS:-} in
  '') ;;
  [0-9]*) exit "$FAILS" ;;
  *) echo '{"error": {"class": "'"$FAILS"'"}}' >"$REPORT" && exit 1 ;;
esac
{ head -c 32769 /dev/zero; printf 'CD001 '; cat "$1/configuration.nix"; } >"$out/builder.iso"
mkdir -p roots
ln -sfn "/nix/store/${MADE:-one}-iso" roots/image
`

func newMaking(t *testing.T) *making {
	t.Helper()
	m := &making{t, t.TempDir()}
	var err error
	for _, name := range []string{"osbuilder/nixos/programs", "bin", "storage", "status", "nix"} {
		err = errors.Join(err, os.MkdirAll(filepath.Join(m.dir, name), 0o755))
	}
	for from, to := range map[string]string{"nixos/make-image": "nixos/make-image", "install-image.sh": "install-image.sh"} {
		text, readErr := os.ReadFile(from)
		err = errors.Join(err, readErr, os.WriteFile(filepath.Join(m.dir, "osbuilder", to), text, 0o755))
	}
	err = errors.Join(err, os.WriteFile(filepath.Join(m.dir, "osbuilder", "nixos", "programs", "image-build"), []byte(imageBuild), 0o755),
		os.WriteFile(filepath.Join(m.dir, "bin", "nix-store"), []byte("#!/bin/sh\n"), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	m.change("first")
	return m
}

// change makes the ISO's sources others than they were.
func (m *making) change(text string) {
	m.t.Helper()
	write(m.t, filepath.Join(m.dir, "osbuilder", "nixos", "configuration.nix"), []byte(text))
}

func (m *making) run(env []string, words ...string) (string, error) {
	m.t.Helper()
	cmd := exec.CommandContext(m.t.Context(), filepath.Join(m.dir, "osbuilder", "nixos", "make-image"), words...)
	cmd.Env = append([]string{
		"PATH=" + filepath.Join(m.dir, "bin") + ":/usr/local/bin:/usr/bin:/bin", "STORAGE=" + filepath.Join(m.dir, "storage"),
		"STATUS_DIR=" + filepath.Join(m.dir, "status"), "NIX_VOLUME=" + filepath.Join(m.dir, "nix"),
		"GIVEN_ISO=/dev/null", "DISK_NEEDED=0",
	}, env...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (m *making) read(name string) string {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, name))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		m.t.Fatal(err)
	}
	return string(text)
}

// A VM that has an ISO starts with it when a newer one can't be made, unless
// that is for what it is made from, or somebody asked for it.
func TestMakingFails(t *testing.T) {
	for _, tt := range []struct {
		name, env, says string
		stays           bool
	}{
		{"no network", "FAILS=network", "behind a proxy", true},
		{"no cache", "FAILS=cache", "needs cache.nixos.org", true},
		{"no room before", "DISK_NEEDED=99999999", "needed, by estimate: 99999999 MiB", true},
		{"no room meanwhile", "FAILS=disk", "free now: ", true},
		{"no memory", "FAILS=memory", "evaluating needs about 1.5 GiB of memory", true},
		{"killed", "FAILS=killed", "evaluating needs about 1.5 GiB of memory", true},
		{"image-build itself killed", "FAILS=137", "evaluating needs about 1.5 GiB of memory", true},
		{"the configuration", "FAILS=evaluation", "was not made (evaluation)", false},
		{"a package", "FAILS=build", "was not made (build)", false},
		{"a hash", "FAILS=hash", "was not made (hash)", false},
		{"another fault", "FAILS=2", "was not made; the reason", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := newMaking(t)
			if out, err := m.run([]string{tt.env}); err == nil || !strings.Contains(out, tt.says) || !strings.HasPrefix(m.read("status/image"), "failed ") {
				t.Errorf("without an ISO: %v: %s", err, out)
			}
			if out, err := m.run(nil); err != nil || !strings.Contains(m.read("storage/boot.iso"), "first") {
				t.Fatal(err, out)
			}
			m.change("second")
			out, err := m.run([]string{tt.env})
			if (err == nil) != tt.stays || !strings.Contains(out, tt.says) || strings.Contains(out, "the VM starts with the one that is there") != tt.stays {
				t.Errorf("with an older ISO: %v: %s", err, out)
			}
			if told := m.read("status/image"); strings.HasPrefix(told, "ready") != tt.stays {
				t.Errorf("the sidecar is told %q", told)
			}
			if out, err := m.run([]string{tt.env}, "renew"); err == nil || m.read("status/image") != "ready\n" {
				t.Errorf("a renewal: %v: %s", err, out)
			}
			if got := m.read("storage/boot.iso"); !strings.HasSuffix(got, "first") {
				t.Errorf("the ISO is another one, of %d bytes", len(got))
			}
			if out, err := m.run(nil); err != nil || !strings.HasSuffix(m.read("storage/boot.iso"), "second") {
				t.Errorf("made at last: %v: %s", err, out)
			}
		})
	}
}

// The ISO before is deleted from the store, unless it is the one that was made.
func TestMakingDeletesTheFormerISO(t *testing.T) {
	m := newMaking(t)
	if err := os.WriteFile(filepath.Join(m.dir, "bin", "nix-store"), []byte(`#!/bin/sh
echo "$*" >>"$ASKED"
echo "cannot delete" >&2
exit 1
`), 0o755); err != nil {
		t.Fatal(err)
	}
	asked := filepath.Join(m.dir, "asked")
	for i, step := range []struct{ made, asked string }{
		{"one", ""},
		{"one", ""}, // the same, of other sources
		{"two", "--delete /nix/store/one-iso\n"},
	} {
		m.change(fmt.Sprint("number ", i))
		write(t, asked, nil)
		out, err := m.run([]string{"MADE=" + step.made, "ASKED=" + asked})
		if err != nil || !strings.HasSuffix(m.read("storage/boot.iso"), fmt.Sprint("number ", i)) || strings.Contains(out, "cannot delete") {
			t.Fatalf("%s: %v: %s", step.made, err, out)
		}
		if got := m.read("asked"); got != step.asked {
			t.Errorf("%s: Nix is asked %q, want %q", step.made, got, step.asked)
		}
	}
}
