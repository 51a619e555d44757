//go:build e2e

package e2e

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"osbuilder/e2e/internal/harness"
)

// The attacks are tried by a real job in the real VM. Each prints BREACH when
// it works; the control at the end shows that the script came so far.
const attacks = `
try() { what=$1; shift; if "$@" 2>/dev/null; then echo "BREACH: $what"; else echo "refused: $what"; fi; }
forge() { echo '{"seq":1,"type":"finished","job":"x"}' >> /nexus_bootstrap/pipe_out; }
request() { echo 'echo forged' > /nexus_bootstrap/pipe_in; }
readany() { cat "$@" > /dev/null; }
others() {
  ls /data/jobs && return
  ls "/data/jobs/$VICTIM-1" && return
  cat "/data/jobs/$VICTIM-1/out/secret" && return
  grep -rl THE_VICTIMS_SECRET /proc/[0-9]*/environ /tmp /var/tmp /dev/shm
}
try 'forge an event' forge
try 'write a request' request
try 'read the events' readany /nexus_bootstrap/pipe_out
try 'read the host key' readany /run/osbuilder/ssh_host_ed25519_key
try 'read the host key from the firmware' readany /sys/firmware/qemu_fw_cfg/by_name/opt/org.osbuilder/ssh_host_ed25519_key/raw
try 'list the spool' ls /data/spool
try 'list the artifacts' ls /data/artifacts
try 'read the files of another job' others
try 'read the shadow file' readany /etc/shadow
try 'see a process of another user' test -e /proc/1/status
try 'become root' sudo -n true
try 'become another slot' setpriv --reuid=job-2 --regid=jobs --clear-groups true
try 'write to the system' touch /usr/bin/mine
try 'kill the runner' pkill pipe-runner
echo "attacked as $(id -un)"
`

func TestJobCanNotBreakOut(t *testing.T) {
	p := installation
	// A victim runs beside the attacker, with a secret in its files and its environment.
	p.Drop(t, "victim.sh", `export SECRET=THE_VICTIMS_SECRET
echo THE_VICTIMS_SECRET | tee secret "$TMPDIR/secret" > "$OUT/secret"
bash -c 'echo ready; for i in $(seq 600); do sleep 0.1; done'
`)
	client := p.Connect(t)
	victim := ""
	harness.Eventually(t, harness.JobTimeout, "secret of the victim", func() bool {
		for _, e := range harness.Events(t, client) {
			if e.Type == "log" && e.Log.Text == "ready\n" {
				victim = e.Job
			}
		}
		return victim != ""
	})
	p.Drop(t, "attacker.sh", "VICTIM="+victim+"\n"+attacks)
	r := p.Outcome(t, "attacker")
	if r.Status != "succeeded" || !strings.Contains(r.Log, "attacked as job-") {
		t.Fatalf("the attacks did not run: %s, %s\n%s", r.Status, r.Reason, r.Log)
	}
	if strings.Contains(r.Log, "BREACH") {
		t.Errorf("an attack worked:\n%s", r.Log)
	}
	if got, want := strings.Count(r.Log, "refused: "), strings.Count(attacks, "\ntry '"); got != want {
		t.Errorf("%d attacks refused, %d tried:\n%s", got, want, r.Log)
	}
	if p.Results(t, "victim") != nil {
		t.Error("the victim had ended before the attacks did: they proved nothing")
	}

	// What was attacked is there.
	out, err := harness.OnVM(t, client, "ls -ld /run/osbuilder/ssh_host_ed25519_key /nexus_bootstrap/pipe_out /data/spool /data/jobs/"+victim+
		"-1 /sys/firmware/qemu_fw_cfg/by_name/opt/org.osbuilder")
	if err != nil {
		t.Errorf("a target of the attacks does not exist: %v\n%s", err, out)
	}
}

// A link out of $OUT is no artifact, whatever it points at.
func TestForeignFilesAreNotShipped(t *testing.T) {
	p := installation
	for name, make := range map[string]string{
		"link-shadow": `ln -s /etc/shadow "$OUT/image.iso"`,
		"link-key":    `ln -s /run/osbuilder/ssh_host_ed25519_key "$OUT/image.iso"`,
		"link-folder": `ln -s /etc "$OUT/folder"`,
		"hard-link":   `echo mine > a && ln a "$OUT/image.iso"`,
		"fifo":        `mkfifo "$OUT/image.iso"`,
	} {
		p.Drop(t, name+".sh", make+" || exit 99\n")
	}
	for _, name := range []string{"link-shadow", "link-key", "link-folder", "hard-link", "fifo"} {
		r := p.Outcome(t, name)
		if r.ExitCode != nil && *r.ExitCode == 99 {
			t.Errorf("%s: could not be set up", name)
		}
		if r.Status != "failed" || len(r.Artifacts) > 0 || !strings.Contains(r.Reason, "OUT") {
			t.Errorf("%s: status %s, artifacts %v, reason %q", name, r.Status, r.Artifacts, r.Reason)
		}
	}
}

// Nobody enters without the right key, and nobody as root.
func TestWhoMayLogIn(t *testing.T) {
	p := installation
	p.Connect(t)
	stranger, err := harness.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	for name, try := range map[string]struct {
		user string
		auth ssh.AuthMethod
	}{
		"a stranger's key": {"builder", ssh.PublicKeys(stranger)},
		"root":             {"root", ssh.PublicKeys(p.Signer)},
		"a slot user":      {"job-1", ssh.PublicKeys(p.Signer)},
		"a password":       {"builder", ssh.Password("builder")},
		"no password":      {"builder", ssh.Password("")},
	} {
		if c, err := p.Dial(t, try.user, try.auth); err == nil {
			c.Close()
			t.Errorf("%s may log in", name)
		} else if !strings.Contains(err.Error(), "unable to authenticate") {
			t.Errorf("%s: %v; want a refusal", name, err)
		}
	}
}

func TestSidecarIsConfined(t *testing.T) {
	p := installation
	id := p.Container(t, "sidecar")
	var c []struct {
		Config     struct{ User string }
		HostConfig struct {
			ReadonlyRootfs bool
			Privileged     bool
			CapAdd         []string
			CapDrop        []string
			SecurityOpt    []string
			Binds          []string
		}
		State struct {
			Pid    int
			Health struct{ Status string }
		}
		Mounts []struct{ Source, Destination string }
	}
	if err := json.Unmarshal([]byte(harness.Docker(t, "inspect", id)), &c); err != nil {
		t.Fatal(err)
	}
	h := c[0].HostConfig
	if user := c[0].Config.User; user == "" || strings.HasPrefix(user, "0") {
		t.Errorf("it runs as %q", user)
	}
	if !h.ReadonlyRootfs || h.Privileged || len(h.CapAdd) > 0 || strings.Join(h.CapDrop, ",") != "ALL" {
		t.Errorf("read-only %t, privileged %t, added %v, dropped %v", h.ReadonlyRootfs, h.Privileged, h.CapAdd, h.CapDrop)
	}
	for _, m := range c[0].Mounts {
		if strings.Contains(m.Source, "docker.sock") {
			t.Errorf("it has the engine's socket: %v", m)
		}
	}
	// What the kernel says of the process itself.
	status := harness.Docker(t, "run", "--rm", "--pid", "container:"+id, "--network", "none", "--entrypoint", "cat", p.Images+"/qemu", "/proc/1/status")
	for _, want := range []string{"CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(status, want) {
			t.Errorf("the process lacks %q:\n%s", want, status)
		}
	}
	harness.Eventually(t, harness.StepTimeout, "healthy sidecar", func() bool {
		return strings.TrimSpace(harness.Docker(t, "inspect", "--format", "{{.State.Health.Status}}", id)) == "healthy"
	})
}

// No image holds a private key or a password, in any layer.
func TestNoSecretInAnyImage(t *testing.T) {
	for _, image := range []string{"sidecar", "qemu", "vmimage-debian"} {
		image = installation.Images + "/" + image
		seen := make(map[string]bool)
		cmd := exec.CommandContext(t.Context(), "docker", "save", image)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		err = eachFile(out, func(name string, data []byte) {
			name = path.Clean(name)
			seen[name] = true
			// Libraries hold the keys of their self-tests, known to all the world.
			if !bytes.HasPrefix(data, []byte("\x7fELF")) && privateKeyPEM(data) {
				t.Errorf("%s: %s holds a private key", image, name)
			}
			if name == "etc/shadow" {
				checkShadow(t, image, string(data))
			}
		})
		if err := errors.Join(err, cmd.Wait()); err != nil {
			t.Errorf("save %s: %v", image, err)
		}
		// That the layers were looked into at all.
		want := "etc/shadow"
		if strings.HasSuffix(image, "/sidecar") {
			want = "bin/osbuilder"
		}
		if !seen[want] {
			t.Errorf("%s: %s was not among the %d files that were looked at", image, want, len(seen))
		}
	}
}

// The same of the VM's own root file system, as it lies in its boot image.
func TestNoSecretInTheVM(t *testing.T) {
	p := installation
	p.Drop(t, "secrets.sh", `set -e
unsquashfs -quiet -no-progress -no-xattrs -d root /run/osbuilder/iso/live/root.squashfs \
  etc root home srv opt var/lib usr/local usr/lib/osbuilder usr/lib/systemd usr/share/keyrings
echo "$(find root -type f | wc -l) files, $(find root/etc/ssh -type f | wc -l) of ssh"
grep -rlaE -e '-----BEGIN [A-Z ]*PRIVATE KEY-----' root | sed 's/^/PRIVATE KEY: /'
sed 's/^/SHADOW /' root/etc/shadow
`)
	r := p.Outcome(t, "secrets")
	if r.Status != "succeeded" || !strings.Contains(r.Log, " of ssh\n") {
		t.Fatalf("status %s: %s\n%s", r.Status, r.Reason, r.Log)
	}
	if strings.Contains(r.Log, "PRIVATE KEY") || strings.Contains(r.Log, "\n0 files") {
		t.Errorf("the VM's root file system:\n%s", r.Log)
	}
	var shadow strings.Builder
	for line := range strings.Lines(r.Log) {
		if entry, ok := strings.CutPrefix(line, "SHADOW "); ok {
			shadow.WriteString(entry)
		}
	}
	checkShadow(t, "the VM", shadow.String())
}

// eachFile calls f for every regular file in a tar and in the layers in it,
// which are tars too, by whatever name and however packed the engine saves
// them.
func eachFile(r io.Reader, f func(name string, data []byte)) error {
	archive := tar.NewReader(r)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		file := bufio.NewReader(archive)
		if magic, _ := file.Peek(2); bytes.Equal(magic, []byte{0x1f, 0x8b}) && strings.HasPrefix(h.Name, "blobs/") {
			unpacked, err := gzip.NewReader(file)
			if err != nil {
				return err
			}
			file = bufio.NewReader(unpacked)
		}
		if head, _ := file.Peek(262); len(head) == 262 && string(head[257:]) == "ustar" {
			if err := eachFile(file, f); err != nil {
				return err
			}
			continue
		}
		if h.Size > 64<<20 {
			continue // the boot image: TestNoSecretInTheVM looks into it
		}
		data, err := io.ReadAll(file)
		if err != nil {
			return err
		}
		f(h.Name, data)
	}
}

// checkShadow wants entries, and none with a password or without a lock.
func checkShadow(t *testing.T, where, data string) {
	t.Helper()
	if !strings.Contains(data, "root:") {
		t.Errorf("%s: no entry for root: %q", where, data)
	}
	for line := range strings.Lines(data) {
		fields := strings.Split(line, ":")
		if len(fields) > 1 && !strings.HasPrefix(fields[1], "!") && !strings.HasPrefix(fields[1], "*") {
			t.Errorf("%s: %s has a password, or needs none", where, fields[0])
		}
	}
}
