//go:build e2e

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"osbuilder/e2e/internal/harness"
)

// The fixture stands in for nixpkgs where no Nix cache can be reached: it makes
// its image from the VM's own Debian. A script job puts it into the VM's store,
// and NIXPKGS names it there, as a user names any nixpkgs by a path.
var nixpkgs string

func useFixture(t *testing.T) {
	t.Helper()
	if nixpkgs != "" {
		return
	}
	nixpkgs = addToStore(t, "fakenixpkgs")
	set(t, "NIXPKGS="+nixpkgs)
}

// addToStore puts a folder of testdata/ into the VM's store and returns its path.
func addToStore(t *testing.T, name string) string {
	t.Helper()
	p := installation
	p.Drop(t, "add-"+name+".sh", "base64 -d <<'TAR' | tar -xz\n"+archive(t, filepath.Join(p.Root, "testdata", name))+
		"\nTAR\nln -s \"$(nix-store --add '"+name+"')/default.nix\" \"$OUT/default.nix\"\nreadlink \"$OUT/default.nix\"\n")
	r := p.Outcome(t, "add-"+name)
	path := regexp.MustCompile(`/nix/store/[^/\s]+`).FindString(r.Log)
	if r.Status != "succeeded" || path == "" {
		t.Fatalf("%s is not in the VM's store: %s, %s\n%s", name, r.Status, r.Reason, r.Log)
	}
	return path
}

// archive is a folder as a compressed tar, in base64.
func archive(t *testing.T, dir string) string {
	t.Helper()
	var out bytes.Buffer
	lines := base64.NewEncoder(base64.StdEncoding, &out)
	zip := gzip.NewWriter(lines)
	w := tar.NewWriter(zip)
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, err := filepath.Rel(filepath.Dir(dir), path)
		if err != nil {
			return err
		}
		if d.Type()&os.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			return w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777})
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		_, err = w.Write(data)
		return err
	})
	for _, c := range []interface{ Close() error }{w, zip, lines} {
		if err == nil {
			err = c.Close()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// set changes settings of the installation and starts the sidecar with them.
func set(t *testing.T, settings ...string) {
	t.Helper()
	installation.Env = append(installation.Env, settings...)
	if _, err := installation.Compose(t.Context(), "up", "--detach", "--no-build", "--no-deps", "sidecar"); err != nil {
		t.Fatal(err)
	}
}

// dropFolder copies a folder into the jobs folder, as `cp -r` does.
func dropFolder(t *testing.T, name string, files map[string]string) {
	t.Helper()
	for file, text := range files {
		path := installation.Jobs(name, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A report is what image-build says of a job.
type report struct {
	Entry, Format, System, Method, Nix string
	Nixpkgs                            struct{ Source, Hash, Release, Path string }
	Times                              map[string]int64 `json:"times_ms"`
	Outputs, Overridden                []string
	Closure                            int64 `json:"closure_bytes"`
	Error                              *struct {
		Class, Summary, At, Advice string
		Lines                      []string
	}
}

func reportOf(t *testing.T, r harness.Result) report {
	t.Helper()
	var all struct{ Report report }
	data, err := os.ReadFile(filepath.Join(r.Folder, "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &all); err != nil {
		t.Fatalf("%v\n%s", err, data)
	}
	return all.Report
}

// From a dropped configuration to an image that boots.
func TestConfigurationBecomesImage(t *testing.T) {
	useFixture(t)
	p := installation
	p.Drop(t, "host.nix", `{ config, pkgs, ... }: {
  networking.hostName = "dropped-file";
  boot.marker = "MARKER of ${config.networking.hostName}";
}
`)
	image(t, p.Outcome(t, "host"), nixpkgs, "image.modules", "MARKER of dropped-file")
}

// The same from a folder, with a nixpkgs from before it made images by itself.
func TestFolderBecomesImage(t *testing.T) {
	useFixture(t)
	set(t, "NIXPKGS="+nixpkgs+"/old")
	defer set(t, "NIXPKGS="+nixpkgs)
	dropFolder(t, "machine", map[string]string{
		"configuration.nix": `{
  imports = [ ./parts/name.nix ];
  # Of the machine that it was written for.
  fileSystems."/" = { device = "/dev/disk/by-label/root"; fsType = "ext4"; };
  fileSystems."/boot" = { device = "/dev/disk/by-label/BOOT"; fsType = "vfat"; };
  swapDevices = [ { device = "/dev/sda3"; } ];
  boot.loader.systemd-boot.enable = true;
}
`,
		"parts/name.nix":      "{ networking.hostName = builtins.readFile ./name; boot.marker = \"MARKER of a folder\"; }\n",
		"parts/name":          "dropped-folder",
		"a file of no use.md": "With a space in its name.\n",
	})
	r := installation.Outcome(t, "machine")
	image(t, r, nixpkgs+"/old", "nixos-generators", "MARKER of a folder")
	overridden := strings.Join(reportOf(t, r).Overridden, "\n")
	for _, setting := range []string{"fileSystems.\"/\" (/dev/disk/by-label/root, ext4)", "fileSystems.\"/boot\"", "swapDevices (/dev/sda3)", "boot.loader.systemd-boot"} {
		if !strings.Contains(overridden, setting) || !strings.Contains(r.Log, setting) {
			t.Errorf("that %s gave way is not said: report %q, log\n%s", setting, overridden, r.Log)
		}
	}
}

// image checks the outcome of a configuration: one ISO, whole, that boots to
// the fixture's word and to marker, and a result.json that says how it came to be.
func image(t *testing.T, r harness.Result, from, method, marker string) {
	t.Helper()
	if r.Status != "succeeded" {
		t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
	}
	if len(r.Artifacts) != 1 || !strings.HasSuffix(r.Artifacts[0].Name, ".iso") {
		t.Fatalf("artifacts: %+v", r.Artifacts)
	}
	path := filepath.Join(r.Folder, r.Artifacts[0].Name)
	if sum, _ := digest(t, path); sum != r.Artifacts[0].SHA256 {
		t.Errorf("the image's digest is %s, announced was %s", sum, r.Artifacts[0].SHA256)
	}
	console, ok := boots(t, path, marker)
	if !ok || !strings.Contains(console, "FIXTURE") {
		t.Errorf("the image did not print FIXTURE and %q on its console:\n%s", marker, console)
	}
	said := reportOf(t, r)
	if !strings.HasSuffix(said.Format, "iso") || said.System != "x86_64-linux" || said.Nixpkgs.Path != from || said.Method != method || said.Nixpkgs.Hash == "" ||
		said.Nix == "" || said.Closure == 0 || len(said.Outputs) == 0 || said.Times["build"] == 0 || said.Error != nil {
		t.Errorf("report: %+v", said)
	}
	for _, c := range r.Log {
		if c < ' ' && c != '\n' && c != '\t' {
			t.Errorf("build.log has the control character %q:\n%q", c, r.Log)
			break
		}
	}
}

// What is wrong comes first: the line of the user's own file, or the derivation
// that failed with its last lines.
func TestConfigurationThatFails(t *testing.T) {
	failures(t, []failure{
		{"undefined", "{ ... }: {\n  networking.hostName = nobody;\n}\n", "evaluation", "undefined.nix:2", "undefined variable 'nobody'"},
		{"broken-build", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.broken ];\n}\n", "build", "", "broken"},
		{"world", "{ pkgs, ... }: {\n  environment.systemPackages = [ pkgs.fake-world ];\n}\n", "cache", "", "no binary cache can be reached"},
	})
}

// A failure is a configuration that fails, and what is said of it.
type failure struct{ name, text, class, at, says string }

func failures(t *testing.T, tests []failure) {
	t.Helper()
	useFixture(t)
	for _, tt := range tests { // as many at a time as there are slots
		installation.Drop(t, tt.name+".nix", tt.text)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := installation.Outcome(t, tt.name)
			said := reportOf(t, r)
			if r.Status != "failed" || len(r.Artifacts) > 0 || said.Error == nil {
				t.Fatalf("status %s, %d artifacts, error %+v\n%s", r.Status, len(r.Artifacts), said.Error, r.Log)
			}
			if said.Error.Class != tt.class || !strings.HasPrefix(said.Error.At, tt.at) || !strings.Contains(said.Error.Summary, tt.says) || said.Error.Advice == "" {
				t.Errorf("error: %+v", said.Error)
			}
			if !strings.Contains(r.Reason, tt.says) {
				t.Errorf("reason: %q", r.Reason)
			}
			if tt.class == "build" && !strings.Contains(strings.Join(said.Error.Lines, "\n"), "main.c:3: error: expected ';'") {
				t.Errorf("the builder's last lines are not told: %q", said.Error.Lines)
			}
		})
	}
}

// A job that ends, however it ends, leaves no builder of nix-daemon behind.
func TestNoBuilderIsLeft(t *testing.T) {
	p := installation
	client := p.Connect(t)
	t.Run("killed client", func(t *testing.T) {
		p.Drop(t, "killed-client.sh", endless+"kill -KILL $!\nwait\nexit 0\n")
		if r := p.Outcome(t, "killed-client"); r.Status != "succeeded" || !strings.Contains(r.Log, "it builds now") {
			t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
		untilIdle(t, client)
	})
	t.Run("cancelled", func(t *testing.T) {
		p.Drop(t, "cancelled.sh", endless+"wait\n")
		untilBuilding(t, client)
		// Up to the line that says that it builds, whatever is under way.
		harness.Eventually(t, harness.StepTimeout, "line of the build", func() bool { return p.Logged(t, `"job":"cancelled"`, "it builds now") })
		if out := p.Osbuilder(t, "jobs"); !strings.Contains(out, "  cancelled  running ") {
			t.Errorf("osbuilder jobs: %q", out)
		}
		asked := time.Now()
		if out := p.Osbuilder(t, "cancel", "cancelled.sh", "--reason", "by the test"); !strings.Contains(out, "is being cancelled") {
			t.Errorf("osbuilder cancel: %q", out)
		}
		r := p.Outcome(t, "cancelled")
		if r.Status != "cancelled" || r.Reason != "by the test" || r.Attempts != 1 || !strings.Contains(r.Log, "it builds now") {
			t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
		}
		untilIdle(t, client)
		t.Logf("cancelled, and no builder left, after %s", time.Since(asked).Round(time.Millisecond))
		if out := p.Osbuilder(t, "show", r.Job); !strings.Contains(out, "cancel-asked") || !strings.Contains(out, "published-cancelled") {
			t.Errorf("osbuilder show: %s", out)
		}
	})
}

func untilBuilding(t *testing.T, client *ssh.Client) {
	t.Helper()
	harness.Eventually(t, harness.StepTimeout, "running build", func() bool { return daemonProcesses(t, client) > 1 })
}

func untilIdle(t *testing.T, client *ssh.Client) {
	t.Helper()
	harness.Eventually(t, harness.StepTimeout, "end of the build", func() bool { return daemonProcesses(t, client) <= 1 })
}

// endless starts a build without an end and waits until it runs.
const endless = `cat >d.nix <<NIX
derivation { name = "endless-$JOB_ID"; system = builtins.currentSystem; builder = "/bin/sh"; args = [ "-c" "echo it builds now; while :; do :; done" ]; }
NIX
mkfifo said
nix-build --option substitute false d.nix >said 2>&1 &
exec 3<said
while read -r line <&3; do
  echo "$line"
  [[ $line != *"it builds now"* ]] || break
done
`

// daemonProcesses counts what is in nix-daemon's control group: the daemon, a
// process for each client, and all that these build. 0 if it isn't started.
func daemonProcesses(t *testing.T, client *ssh.Client) int {
	t.Helper()
	out, err := harness.OnVM(t, client, "cd /sys/fs/cgroup/system.slice && { [ ! -e nix-daemon.service ] || find nix-daemon.service -name cgroup.procs -exec cat {} +; } | wc -l")
	if err != nil {
		t.Fatalf("count the processes of nix-daemon: %v\n%s", err, out)
	}
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
