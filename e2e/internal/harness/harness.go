//go:build e2e

// Package harness makes an installation for tests from outside, by the
// committed compose.yaml, and looks at it the way a user does: its own
// project name, free ports and temporary folders, so that one beside it is
// not touched. The scripts prepare engine, Compose and images, and say where
// they are through three variables:
//
//	OSBUILDER_E2E_COMPOSE   the Compose command, split at white space
//	OSBUILDER_E2E_ENV_FILE  the env file with COMPOSE_FILE and base images
//	OSBUILDER_E2E_IMAGES    what the names of our images begin with
package harness

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Bounds, generous: the VM runs without KVM on a machine shared with others.
const (
	BootTimeout = 10 * time.Minute
	JobTimeout  = 10 * time.Minute
	StepTimeout = 90 * time.Second
)

// A Project is one installation.
type Project struct {
	ComposeCommand []string // with its env file
	Env            []string
	Root           string     // of the checkout
	Dir            string     // of this run: jobs, output
	Images         string     // what the names of our images begin with
	Signer         ssh.Signer // of a person whose key is in AUTHORIZED_KEYS

	sshPort  int
	uid, gid int      // PUID and PGID
	disks    []string // file systems of its own
	added    int      // Compose files
}

// Main is a TestMain's: it makes an installation, has begin start it, runs the
// tests, and leaves nothing behind.
func Main(m *testing.M, begin func(ctx context.Context, p *Project) error, settings ...string) (code int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := New(ctx, settings...)
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 2
	}
	defer func() {
		if code != 0 {
			p.Explain(ctx)
		}
		if err := p.Remove(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "error: remove the installation:", err)
			code = max(code, 1)
		}
	}()
	if err := begin(ctx, p); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		return 1
	}
	return m.Run()
}

// New makes what an installation needs beside its containers: folders, ports,
// a person's key. The settings win over those that every test has.
func New(ctx context.Context, settings ...string) (*Project, error) {
	command := strings.Fields(os.Getenv("OSBUILDER_E2E_COMPOSE"))
	envFile := os.Getenv("OSBUILDER_E2E_ENV_FILE")
	images := os.Getenv("OSBUILDER_E2E_IMAGES")
	if len(command) == 0 || envFile == "" || images == "" {
		return nil, errors.New("OSBUILDER_E2E_COMPOSE, _ENV_FILE and _IMAGES are not set: run `make test`")
	}
	envFile, err := filepath.Abs(envFile)
	if err != nil {
		return nil, err
	}
	root, err := checkout()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "osbuilder-e2e-")
	if err != nil {
		return nil, err
	}
	p := &Project{
		ComposeCommand: append(command, "--env-file", envFile),
		Root:           root,
		Dir:            dir,
		Images:         images,
	}
	if err := os.Chmod(dir, 0o755); err != nil { // the containers' users pass through it
		return nil, err
	}
	// By it the scripts find what a test that was ended left behind.
	if err := os.WriteFile(filepath.Join(dir, ".checkout"), []byte(root), 0o644); err != nil {
		return nil, err
	}
	for _, name := range []string{"jobs", "output"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			return nil, err
		}
	}
	var ports [2]int
	for i := range ports {
		// Closed again before Compose opens it; nothing else on the machine
		// takes it in between but by rare chance, and then `up` says so.
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	p.sshPort = ports[0]
	if p.Signer, err = NewKey(); err != nil {
		return nil, err
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 1000, 1000
	}
	p.uid, p.gid = uid, gid
	p.Env = append(os.Environ(),
		"COMPOSE_PROJECT_NAME="+strings.ToLower(filepath.Base(dir)),
		"JOBS_DIR="+filepath.Join(dir, "jobs"),
		"OUTPUT_DIR="+filepath.Join(dir, "output"),
		"SSH_PORT="+strconv.Itoa(ports[0]),
		"VIEWER_PORT="+strconv.Itoa(ports[1]),
		"PUID="+strconv.Itoa(uid),
		"PGID="+strconv.Itoa(gid),
		"AUTHORIZED_KEYS="+strings.TrimSpace(string(ssh.MarshalAuthorizedKey(p.Signer.PublicKey())))+" person@e2e",
		"VM_NIX_CONF=# of the test\nlog-lines = 51",
		"CPU_CORES=2", "RAM_SIZE=2G", "DISK_SIZE=8G", "SLOTS=2",
		"LOG_FORMAT=json", "LOG_LEVEL=debug", "SETTLE=500ms", "RESCAN=2s",
	)
	p.Env = append(p.Env, settings...)
	return p, nil
}

// checkout is the folder with go.mod, above the one that a test runs in.
func checkout() (string, error) {
	dir, err := os.Getwd()
	for err == nil {
		if _, err = os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if errors.Is(err, fs.ErrNotExist) && parent != dir {
			dir, err = parent, nil
		}
	}
	return "", fmt.Errorf("find the checkout: %w", err)
}

// ComposeFiles are those that the env file names, in their order.
func (p *Project) ComposeFiles() ([]string, error) {
	path := p.ComposeCommand[len(p.ComposeCommand)-1]
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(text)) {
		if files, ok := strings.CutPrefix(strings.TrimSpace(line), "COMPOSE_FILE="); ok {
			return strings.Split(files, ":"), nil
		}
	}
	return nil, fmt.Errorf("no COMPOSE_FILE in %s", path)
}

// Override lays what a Compose file can say over those that there are. The
// sidecar, which reads the project by COMPOSE_FILE, sees none of it.
func (p *Project) Override(content any) error {
	data, err := json.Marshal(content)
	if err != nil {
		return err
	}
	var files []string
	if p.added == 0 { // with the first --file Compose forgets COMPOSE_FILE
		if files, err = p.ComposeFiles(); err != nil {
			return err
		}
	}
	p.added++
	path := filepath.Join(p.Dir, fmt.Sprintf("override-%d.json", p.added))
	if err := os.WriteFile(path, data, 0o644); err != nil {
		return err
	}
	for _, file := range append(files, path) {
		p.ComposeCommand = append(p.ComposeCommand, "--file", file)
	}
	return nil
}

// Disk makes a folder of the project's a small file system of its own, in
// memory. That takes root.
func (p *Project) Disk(ctx context.Context, name string, size int64) (path string, err error) {
	path = filepath.Join(p.Dir, name)
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d,mode=0755", size), "e2e", path).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mount %s: %w\n%s", path, err, out)
	}
	p.disks = append(p.disks, path)
	return path, nil
}

// StorageDisk gives the VM's storage a small file system of its own: the disk
// of the host beneath the VM's. It returns where that is.
func (p *Project) StorageDisk(ctx context.Context, size int64) (path string, err error) {
	path, err = p.Disk(ctx, "storage", size)
	if err != nil {
		return "", err
	}
	return path, p.Override(map[string]any{"volumes": map[string]any{"vm-storage": map[string]any{
		"driver_opts": map[string]string{"type": "none", "o": "bind", "device": path},
	}}})
}

// Fill leaves no room on a disk that [Project.Disk] made, until what it returns
// is called. It makes the disk smaller, which takes no memory.
func Fill(ctx context.Context, disk string) (free func() error, err error) {
	var was unix.Statfs_t
	if err := unix.Statfs(disk, &was); err != nil {
		return nil, fmt.Errorf("look at %s: %w", disk, err)
	}
	remount := func(ctx context.Context, blocks uint64) error {
		out, err := exec.CommandContext(ctx, "mount", "-o", fmt.Sprintf("remount,size=%d", blocks*uint64(was.Bsize)), disk).CombinedOutput()
		if err != nil {
			return fmt.Errorf("resize %s: %w\n%s", disk, err, out)
		}
		return nil
	}
	// What is written meanwhile makes it too small for what it holds: refused.
	for tries := 0; ; tries++ {
		var now unix.Statfs_t
		if err := unix.Statfs(disk, &now); err != nil {
			return nil, fmt.Errorf("look at %s: %w", disk, err)
		}
		if err = remount(ctx, max(1, now.Blocks-now.Bfree)); err == nil {
			return func() error { return remount(context.WithoutCancel(ctx), was.Blocks) }, nil
		}
		if tries == 50 {
			return nil, err
		}
	}
}

// Command returns a Compose command of the project.
func (p *Project) Command(ctx context.Context, args ...string) *exec.Cmd {
	all := append(append([]string{}, p.ComposeCommand[1:]...), args...)
	cmd := exec.CommandContext(ctx, p.ComposeCommand[0], all...)
	cmd.Dir, cmd.Env = p.Root, p.Env
	return cmd
}

// Compose runs a Compose command of the project, and returns what it printed.
func (p *Project) Compose(ctx context.Context, args ...string) (string, error) {
	out, err := p.Command(ctx, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("compose %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// Up starts the installation from images that are there.
func (p *Project) Up(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, BootTimeout)
	defer cancel()
	_, err := p.Compose(ctx, "up", "--detach", "--no-build")
	return err
}

// Explain prints what a person would look at.
func (p *Project) Explain(ctx context.Context) {
	for _, service := range []string{"vm", "sidecar", "init", "vmimage"} {
		out, _ := p.Compose(ctx, "logs", "--no-color", "--tail", "80", service)
		fmt.Fprintf(os.Stderr, "--- logs of %s\n%s\n", service, out)
	}
}

// Remove leaves nothing behind.
func (p *Project) Remove(ctx context.Context) error {
	_, err := p.Compose(ctx, "down", "--volumes", "--remove-orphans", "--timeout", "20")
	for _, path := range p.disks {
		if out, umountErr := exec.CommandContext(ctx, "umount", path).CombinedOutput(); umountErr != nil {
			err = errors.Join(err, fmt.Errorf("umount %s: %w\n%s", path, umountErr, out))
		}
	}
	return errors.Join(err, os.RemoveAll(p.Dir))
}

// Jobs is a path in the folder of jobs.
func (p *Project) Jobs(name ...string) string {
	return filepath.Join(append([]string{p.Dir, "jobs"}, name...)...)
}

// Output is a path in the folder of outcomes.
func (p *Project) Output(name ...string) string {
	return filepath.Join(append([]string{p.Dir, "output"}, name...)...)
}

// Drop puts a script into the jobs folder the way a careful person does: it
// appears whole, under its name.
func (p *Project) Drop(t testing.TB, name, script string) {
	t.Helper()
	tmp := p.Jobs("." + name + ".tmp")
	if err := os.WriteFile(tmp, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, p.Jobs(name)); err != nil {
		t.Fatal(err)
	}
}

// DropFolder does the same with a folder. Whoever may move it owns it.
func (p *Project) DropFolder(t testing.TB, name string, files map[string][]byte) {
	t.Helper()
	tmp := p.Jobs("." + name + ".tmp")
	if err := os.Mkdir(tmp, 0o755); err != nil {
		t.Fatal(err)
	}
	for file, data := range files {
		if err := os.WriteFile(filepath.Join(tmp, file), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	err := os.Chown(tmp, p.uid, p.gid)
	if err == nil {
		err = os.Rename(tmp, p.Jobs(name))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A Result is what result.json says of a job.
type Result struct {
	Job       string   `json:"job"`
	Name      string   `json:"name"`
	Status    string   `json:"status"`
	ExitCode  *int     `json:"exit_code"`
	Reason    string   `json:"reason"`
	LastLines []string `json:"last_lines"`
	Attempts  int      `json:"attempts"`
	Artifacts []struct {
		Name   string `json:"name"`
		Size   int64  `json:"size"`
		SHA256 string `json:"sha256"`
	} `json:"artifacts"`

	Folder string `json:"-"` // in output/
	Log    string `json:"-"` // build.log
}

// Results returns the outcomes in output/NAME.
func (p *Project) Results(t *testing.T, name string) []Result {
	t.Helper()
	paths, err := filepath.Glob(p.Output(name, "*", "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all []Result
	for _, path := range paths {
		folder := filepath.Dir(path)
		if !IsOutcome(folder) {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r := Result{Folder: folder}
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatalf("%s: %v\n%s", path, err, data)
		}
		log, err := os.ReadFile(filepath.Join(folder, "build.log"))
		if err != nil {
			t.Fatal(err)
		}
		r.Log = string(log)
		all = append(all, r)
	}
	return all
}

// IsOutcome reports that a folder in output/NAME is a job's: neither the link
// "latest" nor the hidden name that it is made under.
func IsOutcome(folder string) bool {
	name := filepath.Base(folder)
	return name != "latest" && !strings.HasPrefix(name, ".")
}

// Outcome waits for the one outcome of the job that was dropped as NAME.sh.
func (p *Project) Outcome(t *testing.T, name string) Result {
	t.Helper()
	var all []Result
	Eventually(t, JobTimeout, "an outcome of "+name, func() bool {
		all = p.Results(t, name)
		return len(all) > 0
	})
	if len(all) != 1 {
		t.Fatalf("%s has %d outcomes", name, len(all))
	}
	return all[0]
}

// Eventually waits until done says so.
func Eventually(t testing.TB, bound time.Duration, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bound)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("no %s within %s", what, bound)
		case <-tick.C:
		}
	}
}

// Logged reports whether a line of the sidecar's log holds all the parts. The
// engine keeps the log over restarts of the container; a command that follows
// it can miss one.
func (p *Project) Logged(t *testing.T, parts ...string) bool {
	t.Helper()
next:
	for line := range strings.Lines(Docker(t, "logs", p.Container(t, "sidecar"))) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue next
			}
		}
		return true
	}
	return false
}

// Dial opens a person's SSH connection to the VM, with the host key pinned to
// the one that init made.
func (p *Project) Dial(t testing.TB, user string, auth ...ssh.AuthMethod) (*ssh.Client, error) {
	t.Helper()
	if len(auth) == 0 {
		auth = []ssh.AuthMethod{ssh.PublicKeys(p.Signer)}
	}
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(p.sshPort))
	return ssh.Dial("tcp", addr, &ssh.ClientConfig{
		User: user, Auth: auth, HostKeyCallback: ssh.FixedHostKey(p.HostKey(t)), Timeout: 30 * time.Second,
	})
}

// HostKey reads the VM's public host key out of the sidecar's known_hosts.
func (p *Project) HostKey(t testing.TB) ssh.PublicKey {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "docker", "cp", p.Container(t, "sidecar")+":/keys/known_hosts", "-").Output()
	if err != nil {
		t.Fatalf("read known_hosts: %v", err)
	}
	i := bytes.Index(out, []byte("vm "))
	if i < 0 {
		t.Fatalf("known_hosts has no line for vm:\n%s", out)
	}
	_, _, key, _, _, err := ssh.ParseKnownHosts(out[i:])
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// Connect opens a person's connection and keeps trying while the VM boots.
func (p *Project) Connect(t testing.TB) *ssh.Client {
	t.Helper()
	var client *ssh.Client
	Eventually(t, BootTimeout, "SSH connection to the VM", func() bool {
		var err error
		client, err = p.Dial(t, "builder")
		return err == nil
	})
	t.Cleanup(func() { client.Close() })
	return client
}

// OnVM runs a command as the VM's SSH user.
func OnVM(t testing.TB, c *ssh.Client, command string) (string, error) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := s.CombinedOutput(command)
	return string(out), err
}

// An Event is what a client of the pipe reads of a line of pipe_out.
type Event struct {
	Type     string `json:"type"`
	Job      string `json:"job"`
	Attempt  int    `json:"attempt"`
	Accepted struct {
		Request string `json:"request"`
	} `json:"accepted"`
	Started struct {
		Name string `json:"name"`
		User string `json:"user"`
	} `json:"started"`
	Log struct {
		Text string `json:"text"`
	} `json:"log"`
	Artifact struct {
		Name   string `json:"name"`
		SHA256 string `json:"sha256"`
	} `json:"artifact"`
}

// Events reads the current pipe_out.
func Events(t *testing.T, c *ssh.Client) []Event {
	t.Helper()
	out, err := OnVM(t, c, "cat /nexus_bootstrap/pipe_out")
	if err != nil {
		t.Fatalf("read pipe_out: %v", err)
	}
	var all []Event
	for line := range strings.Lines(out) {
		var e Event
		if !strings.HasSuffix(line, "\n") {
			break // it is being written
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Errorf("not an event: %q", line)
		}
		all = append(all, e)
	}
	return all
}

// ID waits until a drop was taken, and returns the id of its job.
func (p *Project) ID(t *testing.T, drop string) string {
	t.Helper()
	var taken []string
	Eventually(t, StepTimeout, "taken drop "+drop, func() bool {
		var err error
		taken, err = filepath.Glob(p.Jobs(".taken", "*", drop))
		return err == nil && len(taken) > 0
	})
	return filepath.Base(filepath.Dir(taken[0]))
}

// Container returns the id of a service's container.
func (p *Project) Container(t testing.TB, service string) string {
	t.Helper()
	out, err := p.Compose(t.Context(), "ps", "--all", "--quiet", service)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// Docker runs a docker command that must work.
func Docker(t testing.TB, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "docker", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// Osbuilder asks the running daemon, as a person does. It must work.
func (p *Project) Osbuilder(t *testing.T, args ...string) string {
	t.Helper()
	out, err := p.Compose(t.Context(), append([]string{"exec", "-T", "sidecar", "osbuilder"}, args...)...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Kill9 ends the sidecar the hard way and starts it again.
func (p *Project) Kill9(t *testing.T) {
	t.Helper()
	id := p.Container(t, "sidecar")
	Docker(t, "kill", "--signal", "KILL", id)
	Docker(t, "start", id)
}

// NewKey makes a key that nobody knows.
func NewKey() (ssh.Signer, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	return ssh.NewSignerFromKey(key)
}
