//go:build e2e

package chaos

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"osbuilder/e2e/internal/harness"
)

// command runs a program to its end and returns what it printed.
func command(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// nixpkgs is where the VM has what stands in for nixpkgs.
const nixpkgs = "/usr/lib/chaos/nixpkgs"

// bootISO makes, in dir, a copy of the product's boot image with more in its
// initramfs: the agent, what systemd needs to start it, and the stand-in for
// nixpkgs. The product's file system image is in it as it is.
func bootISO(ctx context.Context, p *harness.Project, dir string) (string, error) {
	overlay := filepath.Join(dir, "overlay")
	if err := os.CopyFS(overlay, os.DirFS(filepath.Join(p.Root, "e2e", "chaos", "vm"))); err != nil {
		return "", err
	}
	if err := os.CopyFS(filepath.Join(overlay, nixpkgs), os.DirFS(filepath.Join(p.Root, "testdata", "fakenixpkgs"))); err != nil {
		return "", err
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(overlay, "usr/lib/chaos/agent"), "./e2e/chaos/agent")
	build.Dir, build.Env = p.Root, append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the agent: %w\n%s", err, out)
	}
	// The product's own init has no place for guests: it gets one line more.
	init, err := os.ReadFile(filepath.Join(p.Root, "vmimage", "debian", "build", "init"))
	if err != nil {
		return "", err
	}
	const before = "for d in dev proc sys run; do mount -o move"
	if bytes.Count(init, []byte(before)) != 1 {
		return "", fmt.Errorf("vmimage/debian/build/init has no line «%s»", before)
	}
	init = bytes.Replace(init, []byte(before), []byte("cp -a /chaos/. /new/\n"+before), 1)
	if err := os.WriteFile(filepath.Join(dir, "init"), init, 0o755); err != nil {
		return "", err
	}
	if _, err := command(ctx, "docker", "run", "--rm", "--network", "none", "--volume", dir+":/iso",
		"--entrypoint", "cp", p.Images+"/vmimage-debian", "/image/boot.iso", "/iso/product.iso"); err != nil {
		return "", err
	}
	// Of two archives in one initramfs the second counts, where both have a file. It begins at a multiple of 4.
	_, err = command(ctx, "docker", "run", "--rm", "--network", "none", "--volume", dir+":/iso", p.Images+"/vm-rootfs", "bash", "-ec", `
mkdir /tmp/more
cp -R --no-dereference --preserve=mode /iso/overlay /tmp/more/chaos
cp /iso/init /tmp/more/init
chmod -R u=rwX,go=rX /tmp/more
chmod 755 /tmp/more/init /tmp/more/chaos/usr/lib/chaos/*
xorriso -osirrox on -indev /iso/product.iso -extract /live/initrd /tmp/initrd
chmod u+w /tmp/initrd
truncate -s %4 /tmp/initrd
(cd /tmp/more && find . | cpio --quiet -R 0:0 -o -H newc) >>/tmp/initrd
xorriso -indev /iso/product.iso -outdev /iso/boot.iso -boot_image any replay -update /tmp/initrd /live/initrd
chmod 644 /iso/boot.iso
rm /iso/product.iso`)
	return filepath.Join(dir, "boot.iso"), err
}

// A machine is the installation as those see it who break it.
type machine struct {
	p           *harness.Project
	vm, sidecar string // containers
	network     string
	storage     string // the disk beneath the VM's; empty: it has none of its own
}

// storageSize is that of the disk beneath the VM's, whose own is larger, and
// mostly holes. To go on after it was full takes 512 MiB: see watch-vm.sh.
const storageSize = 4 << 30

// start has the installation run, with the agent in its VM and output/ on a
// disk of that size, and waits for the agent.
func (m *machine) start(ctx context.Context, size int64) error {
	if err := m.prepare(ctx, size); err != nil {
		return err
	}
	if err := m.p.Up(ctx); err != nil {
		return err
	}
	for service, id := range map[string]*string{"vm": &m.vm, "sidecar": &m.sidecar} {
		out, err := m.p.Compose(ctx, "ps", "--all", "--quiet", service)
		if err != nil {
			return err
		}
		*id = strings.TrimSpace(out)
	}
	m.network = filepath.Base(m.p.Dir) + "_default"
	_, err := m.agent(ctx, "true")
	return err
}

func (m *machine) prepare(ctx context.Context, size int64) error {
	work := filepath.Join(m.p.Dir, "iso")
	if err := os.Mkdir(work, 0o755); err != nil {
		return err
	}
	iso, err := bootISO(ctx, m.p, work)
	if err != nil {
		return err
	}
	m.p.Env = append(m.p.Env, "BOOT_ISO="+iso)
	if os.Getuid() == 0 {
		if _, err := m.p.Disk(ctx, "output", size); err != nil {
			return err
		}
		if m.storage, err = m.p.StorageDisk(ctx, storageSize); err != nil {
			return err
		}
	}
	// The VM gets a second serial port, beside all that compose.yaml gives it.
	var project struct {
		Services struct {
			VM struct {
				Environment struct {
					Arguments string `json:"ARGUMENTS"`
				} `json:"environment"`
			} `json:"vm"`
		} `json:"services"`
	}
	out, err := m.p.Command(ctx, "config", "--format", "json").Output()
	if err != nil {
		return fmt.Errorf("compose config: %w", err)
	}
	if err := json.Unmarshal(out, &project); err != nil {
		return fmt.Errorf("compose config: %w", err)
	}
	arguments := project.Services.VM.Environment.Arguments
	if arguments == "" {
		return errors.New("compose config: the VM has no ARGUMENTS")
	}
	return m.p.Override(map[string]any{"services": map[string]any{"vm": map[string]any{"environment": map[string]string{
		"ARGUMENTS": arguments + " -chardev socket,id=agent,path=" + agentSocket + ",server=on,wait=off -serial chardev:agent",
	}}}})
}

// In the VM's container.
const (
	agentSocket   = "/run/osbuilder/agent.sock"
	monitorSocket = "/run/osbuilder/monitor.sock"
)

// agent has root in the VM run a Bash command, once it can: a VM that boots
// is waited for. It may run twice, if its answer was lost.
func (m *machine) agent(ctx context.Context, bash string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, harness.BootTimeout)
	defer cancel()
	for {
		// One that boots is asked often, and the question has no effect.
		out, err := m.askAgent(ctx, "true", 5)
		if err == nil {
			out, err = m.askAgent(ctx, bash, 60)
		}
		var failed *agentError
		if err == nil || errors.As(err, &failed) {
			return out, err
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("no answer of the agent in the VM: %w", err)
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// An agentError is the command's own.
type agentError struct{ text string }

func (e *agentError) Error() string { return e.text }

func (m *machine) askAgent(ctx context.Context, bash string, seconds int) (string, error) {
	id := strconv.FormatInt(time.Now().UnixNano(), 36)
	request, err := json.Marshal(map[string]string{"id": id, "bash": bash})
	if err != nil {
		return "", err
	}
	// QEMU serves one client at a time, so none may be left behind: the end of
	// its input ends it, and timeout(1) does where that gets lost.
	cmd := exec.CommandContext(ctx, "docker", "exec", "--interactive", m.vm,
		"timeout", strconv.Itoa(seconds), "socat", "-t", "0.1", "-", "UNIX-CONNECT:"+agentSocket)
	in, err := cmd.StdinPipe()
	if err != nil {
		return "", err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return "", err
	}
	if err := cmd.Start(); err != nil {
		return "", err
	}
	defer func() {
		_ = in.Close()
		_ = cmd.Wait()
	}()
	// A newline first: what an earlier client left unfinished ends here.
	if _, err := fmt.Fprintf(in, "\n%s\n", request); err != nil {
		return "", err
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 8<<20)
	for lines.Scan() {
		var answer struct{ ID, Output, Error string }
		if json.Unmarshal(lines.Bytes(), &answer) != nil || answer.ID != id {
			continue
		}
		if answer.Error != "" {
			return answer.Output, &agentError{fmt.Sprintf("in the VM: %s: %s\n%s", bash, answer.Error, answer.Output)}
		}
		return answer.Output, nil
	}
	return "", errors.Join(errors.New("the agent's port was closed"), lines.Err())
}

// monitor gives QEMU a command, and returns what it says. It has one listener
// at a time, and watch-vm.sh is one too: none stays long.
func (m *machine) monitor(ctx context.Context, line string) (string, error) {
	return command(ctx, "docker", "exec", m.vm, "bash", "-c", fmt.Sprintf("echo %s | socat -t 0.3 -T 2 - UNIX-CONNECT:%s", line, monitorSocket))
}

// executions reads what the jobs said of themselves in the VM.
func (m *machine) executions(ctx context.Context) ([]Execution, error) {
	out, err := m.agent(ctx, "cat /data/chaos/executions")
	if err != nil {
		return nil, err
	}
	var all []Execution
	for line := range strings.Lines(out) {
		var e Execution
		if n, err := fmt.Sscan(line, &e.Job, &e.Attempt, &e.Boot); n != 3 || err != nil {
			return nil, fmt.Errorf("count of executions: %q", line)
		}
		all = append(all, e)
	}
	return all, nil
}
