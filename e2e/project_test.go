//go:build e2e

// Package e2e tests the whole project from outside: real containers, a real
// VM, the committed compose.yaml. `make test` prepares engine, Compose and
// images, and says where they are through three variables:
//
//	OSBUILDER_E2E_COMPOSE   the Compose command, split at white space
//	OSBUILDER_E2E_ENV_FILE  the env file with COMPOSE_FILE and base images
//	OSBUILDER_E2E_IMAGES    what the names of our images begin with
//
// One installation serves all tests: its own project name, free ports and
// temporary folders, so that one beside it is not touched.
package e2e

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
)

// Bounds, generous: the VM runs without KVM on a machine shared with others.
const (
	bootTimeout = 5 * time.Minute
	jobTimeout  = 4 * time.Minute
	stepTimeout = 90 * time.Second
)

// A project is one installation.
type project struct {
	compose []string // command
	env     []string
	root    string // of the checkout
	dir     string // of this run: jobs, output, keys
	images  string // what the names of our images begin with
	sshPort int
	signer  ssh.Signer // of a person whose key is in AUTHORIZED_KEYS
}

var installation *project

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) (code int) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p, err := newProject(ctx)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 2
	}
	installation = p
	defer func() {
		if code != 0 {
			p.explain(ctx)
		}
		if err := p.remove(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: remove the installation:", err)
			code = max(code, 1)
		}
	}()
	if err := p.up(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		return 1
	}
	return m.Run()
}

func newProject(ctx context.Context) (*project, error) {
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
	root, err := filepath.Abs("..")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "osbuilder-e2e-")
	if err != nil {
		return nil, err
	}
	p := &project{
		compose: append(command, "--env-file", envFile),
		root:    root,
		dir:     dir,
		images:  images,
	}
	if err := os.Chmod(dir, 0o755); err != nil { // the containers' users pass through it
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
	if p.signer, err = newKey(); err != nil {
		return nil, err
	}
	uid, gid := os.Getuid(), os.Getgid()
	if uid == 0 {
		uid, gid = 1000, 1000
	}
	p.env = append(os.Environ(),
		"COMPOSE_PROJECT_NAME="+strings.ToLower(filepath.Base(dir)),
		"JOBS_DIR="+filepath.Join(dir, "jobs"),
		"OUTPUT_DIR="+filepath.Join(dir, "output"),
		"SSH_PORT="+strconv.Itoa(ports[0]),
		"VIEWER_PORT="+strconv.Itoa(ports[1]),
		"PUID="+strconv.Itoa(uid),
		"PGID="+strconv.Itoa(gid),
		"AUTHORIZED_KEYS="+strings.TrimSpace(string(ssh.MarshalAuthorizedKey(p.signer.PublicKey())))+" person@e2e",
		"VM_NIX_CONF=# of the test\nlog-lines = 51",
		"CPU_CORES=2", "RAM_SIZE=2G", "DISK_SIZE=8G", "SLOTS=2",
		"LOG_FORMAT=json", "LOG_LEVEL=debug", "SETTLE=500ms", "RESCAN=2s",
	)
	return p, nil
}

// command returns a Compose command of the project.
func (p *project) command(ctx context.Context, args ...string) *exec.Cmd {
	all := append(append([]string{}, p.compose[1:]...), args...)
	cmd := exec.CommandContext(ctx, p.compose[0], all...)
	cmd.Dir, cmd.Env = p.root, p.env
	return cmd
}

func (p *project) composeRun(ctx context.Context, args ...string) (string, error) {
	out, err := p.command(ctx, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("compose %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

func (p *project) up(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	_, err := p.composeRun(ctx, "up", "--detach", "--no-build")
	return err
}

// explain prints what a person would look at.
func (p *project) explain(ctx context.Context) {
	for _, service := range []string{"vm", "sidecar", "init", "vmimage"} {
		out, _ := p.composeRun(ctx, "logs", "--no-color", "--tail", "80", service)
		fmt.Fprintf(os.Stderr, "--- logs of %s\n%s\n", service, out)
	}
}

func (p *project) remove(ctx context.Context) error {
	_, err := p.composeRun(ctx, "down", "--volumes", "--remove-orphans", "--timeout", "20")
	return errors.Join(err, os.RemoveAll(p.dir))
}

func (p *project) jobs(name ...string) string {
	return filepath.Join(append([]string{p.dir, "jobs"}, name...)...)
}

func (p *project) output(name ...string) string {
	return filepath.Join(append([]string{p.dir, "output"}, name...)...)
}

// drop puts a script into the jobs folder the way a careful person does: it
// appears whole, under its name.
func (p *project) drop(t *testing.T, name, script string) {
	t.Helper()
	tmp := p.jobs("." + name + ".tmp")
	if err := os.WriteFile(tmp, []byte(script), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(tmp, p.jobs(name)); err != nil {
		t.Fatal(err)
	}
}

// A result is what result.json says of a job.
type result struct {
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

	folder string
	log    string
}

// results returns the outcomes in output/NAME.
func (p *project) results(t *testing.T, name string) []result {
	t.Helper()
	paths, err := filepath.Glob(p.output(name, "*", "result.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all []result
	for _, path := range paths {
		folder := filepath.Dir(path)
		if !isOutcome(folder) {
			continue
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r := result{folder: folder}
		if err := json.Unmarshal(data, &r); err != nil {
			t.Fatalf("%s: %v\n%s", path, err, data)
		}
		log, err := os.ReadFile(filepath.Join(folder, "build.log"))
		if err != nil {
			t.Fatal(err)
		}
		r.log = string(log)
		all = append(all, r)
	}
	return all
}

// isOutcome reports that a folder in output/NAME is a job's: neither the link
// "latest" nor the hidden name that it is made under.
func isOutcome(folder string) bool {
	name := filepath.Base(folder)
	return name != "latest" && !strings.HasPrefix(name, ".")
}

// outcome waits for the one outcome of the job that was dropped as NAME.sh.
func (p *project) outcome(t *testing.T, name string) result {
	t.Helper()
	var all []result
	eventually(t, jobTimeout, "an outcome of "+name, func() bool {
		all = p.results(t, name)
		return len(all) > 0
	})
	if len(all) != 1 {
		t.Fatalf("%s has %d outcomes", name, len(all))
	}
	return all[0]
}

// eventually waits until done says so.
func eventually(t *testing.T, bound time.Duration, what string, done func() bool) {
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

// logged reports whether a line of the sidecar's log holds all the parts. The
// engine keeps the log over restarts of the container; a command that follows
// it can miss one.
func (p *project) logged(t *testing.T, parts ...string) bool {
	t.Helper()
next:
	for line := range strings.Lines(docker(t, "logs", p.container(t, "sidecar"))) {
		for _, part := range parts {
			if !strings.Contains(line, part) {
				continue next
			}
		}
		return true
	}
	return false
}

// dial opens a person's SSH connection to the VM, with the host key pinned to
// the one that init made.
func (p *project) dial(t *testing.T, user string, auth ...ssh.AuthMethod) (*ssh.Client, error) {
	t.Helper()
	if len(auth) == 0 {
		auth = []ssh.AuthMethod{ssh.PublicKeys(p.signer)}
	}
	addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(p.sshPort))
	return ssh.Dial("tcp", addr, &ssh.ClientConfig{
		User: user, Auth: auth, HostKeyCallback: ssh.FixedHostKey(p.hostKey(t)), Timeout: 30 * time.Second,
	})
}

// hostKey reads the VM's public host key out of the sidecar's known_hosts.
func (p *project) hostKey(t *testing.T) ssh.PublicKey {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "docker", "cp", p.container(t, "sidecar")+":/keys/known_hosts", "-").Output()
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

// connect opens a person's connection and keeps trying while the VM boots.
func (p *project) connect(t *testing.T) *ssh.Client {
	t.Helper()
	var client *ssh.Client
	eventually(t, bootTimeout, "SSH connection to the VM", func() bool {
		var err error
		client, err = p.dial(t, "builder")
		return err == nil
	})
	t.Cleanup(func() { client.Close() })
	return client
}

// onVM runs a command as the VM's SSH user.
func onVM(t *testing.T, c *ssh.Client, command string) (string, error) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := s.CombinedOutput(command)
	return string(out), err
}

// An event is what a client of the pipe reads of a line of pipe_out.
type event struct {
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

// events reads the current pipe_out.
func events(t *testing.T, c *ssh.Client) []event {
	t.Helper()
	out, err := onVM(t, c, "cat /nexus_bootstrap/pipe_out")
	if err != nil {
		t.Fatalf("read pipe_out: %v", err)
	}
	var all []event
	for line := range strings.Lines(out) {
		var e event
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

// id waits until a drop was taken, and returns the id of its job.
func (p *project) id(t *testing.T, drop string) string {
	t.Helper()
	var taken []string
	eventually(t, stepTimeout, "taken drop "+drop, func() bool {
		var err error
		taken, err = filepath.Glob(p.jobs(".taken", "*", drop))
		return err == nil && len(taken) > 0
	})
	return filepath.Base(filepath.Dir(taken[0]))
}

// container returns the id of a service's container.
func (p *project) container(t *testing.T, service string) string {
	t.Helper()
	out, err := p.composeRun(t.Context(), "ps", "--all", "--quiet", service)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// docker runs a docker command that must work.
func docker(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "docker", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("docker %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// kill9 ends the sidecar the hard way and starts it again.
func (p *project) kill9(t *testing.T) {
	t.Helper()
	id := p.container(t, "sidecar")
	docker(t, "kill", "--signal", "KILL", id)
	docker(t, "start", id)
}

// privateKeyPEM is the header that every private key in a file begins with.
func privateKeyPEM(data []byte) bool {
	for {
		i := bytes.Index(data, []byte("-----BEGIN "))
		if i < 0 {
			return false
		}
		data = data[i:]
		if block, _ := pem.Decode(data); block != nil && strings.HasSuffix(block.Type, "PRIVATE KEY") {
			return true
		}
		data = data[1:]
	}
}

// newKey makes a key that nobody knows.
func newKey() (ssh.Signer, error) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	return ssh.NewSignerFromKey(key)
}
