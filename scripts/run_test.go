package scripts

import (
	"bytes"
	"crypto/sha256"
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
)

// These tests run the scripts that people run, with an engine that only says
// what the real one would. They run with this machine's Bash and tools;
// OSBUILDER_TEST_BASH and OSBUILDER_TEST_TOOLS, a folder, name others: an old
// Bash, another system's tools. docs/testing.md says with which they were.

// A folder is a clone of the project, as far as the scripts look at it.
type folder struct {
	t    *testing.T
	root string
	fake string
	path string
	bash string
	env  []string
}

func newFolder(t *testing.T) *folder {
	t.Helper()
	top := t.TempDir()
	f := &folder{t: t, root: filepath.Join(top, "clone with a space"), fake: filepath.Join(top, "fake")}
	for _, dir := range []string{f.fake, filepath.Join(f.root, "jobs"), filepath.Join(f.root, "output"), filepath.Join(top, "bin")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range append([]string{"compose.yaml", ".env.example", "examples/hello-iso.sh", "vmimage/nixos/Dockerfile", "vmimage/qemu/compose.yaml"}, prefixed("scripts/", userScripts)...) {
		text, err := os.ReadFile(filepath.Join("..", filepath.FromSlash(name)))
		if err == nil {
			err = errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(f.root, name)), 0o755), os.WriteFile(filepath.Join(f.root, name), text, 0o755))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f.bash = "/bin/bash"
	if bash := os.Getenv("OSBUILDER_TEST_BASH"); bash != "" {
		f.bash = bash
	}
	tools := "/usr/bin:/bin:/usr/sbin:/sbin"
	if folder := os.Getenv("OSBUILDER_TEST_TOOLS"); folder != "" {
		tools = folder
	}
	bin := filepath.Join(top, "bin")
	docker, err := filepath.Abs(filepath.Join("testdata", "bin", "docker"))
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.Symlink(f.bash, filepath.Join(bin, "bash")), os.Symlink(docker, filepath.Join(bin, "docker")))
	// No network, and a system that is not Debian: macOS, as far as the scripts ask.
	for name, text := range map[string]string{
		"curl":               "exit 7",
		"uname":              `case $1 in -s) echo Darwin ;; -m) echo x86_64 ;; esac`,
		"qemu-system-x86_64": "exit 1",
	} {
		err = errors.Join(err, os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+text+"\n"), 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	f.path = bin + ":" + tools
	return f
}

func prefixed(prefix string, names []string) []string {
	var out []string
	for _, name := range names {
		out = append(out, prefix+name)
	}
	return out
}

// run runs a script with nobody to answer questions, and returns what it said.
func (f *folder) run(script string, args ...string) (said string, err error) {
	f.t.Helper()
	cmd := exec.CommandContext(f.t.Context(), f.bash, append([]string{"scripts/" + script}, args...)...)
	cmd.Dir = f.root
	cmd.Env = append([]string{"PATH=" + f.path, "FAKE=" + f.fake, "HOME=" + f.fake}, f.env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 20 * time.Second
	err = cmd.Run()
	for _, odd := range []string{"unbound variable", "bad substitution", "syntax error", "command not found", "illegal option", "invalid option", "usage:", "not a valid identifier"} {
		if strings.Contains(out.String(), odd) {
			f.t.Errorf("%s: %s", script, out.String())
			break
		}
	}
	return out.String(), err
}

func (f *folder) calls() string {
	f.t.Helper()
	return f.read(filepath.Join("..", "fake", "calls"))
}

func (f *folder) read(name string) string {
	f.t.Helper()
	text, err := os.ReadFile(filepath.Join(f.root, name))
	if err != nil {
		f.t.Fatal(err)
	}
	return string(text)
}

func (f *folder) write(name, text string) {
	f.t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

func contains(t *testing.T, what, text string, wants ...string) {
	t.Helper()
	for _, want := range wants {
		if !strings.Contains(text, want) {
			t.Errorf("%s lacks %q:\n%s", what, want, text)
		}
	}
}

// All that they have is understood, where they are not run here.
func TestScriptsParse(t *testing.T) {
	f := newFolder(t)
	for _, name := range userScripts {
		if out, err := exec.CommandContext(t.Context(), f.bash, "-n", name).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", name, err, out)
		}
	}
}

func TestDemoDownClean(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	said, err := f.run("demo.sh")
	if err != nil {
		t.Fatal(err, said)
	}
	contains(t, "make demo", said, "This machine:", "the VM runs Debian", "asked for: CPU_CORES=4", "hello-iso | Writing hello.iso\n",
		"Done: a small test image", "size    8 bytes (8 bytes)", "computed again on this machine: the same", "qemu-system-x86_64 -m 512")
	if strings.ContainsAny(said, "\x1b\r") {
		t.Errorf("control characters in %q", said)
	}
	settings, err := os.ReadFile(filepath.Join(f.root, ".osbuilder", "demo.env"))
	if err != nil {
		t.Fatal(err)
	}
	contains(t, "demo.env", string(settings), "CPU_CORES=2\n", "RAM_SIZE=4G\n", "VM_FLAVOUR=debian\n")
	if env := f.read(".env"); env != string(settings) {
		t.Errorf("Compose alone would have the settings %q", env)
	}
	contains(t, "make demo", said, "settings    .env; after a change: docker compose up -d\n", "follow it   docker compose logs -f sidecar\n")
	if left, err := os.Readlink(filepath.Join(f.root, ".osbuilder", "running")); err == nil {
		t.Errorf("the lock stayed: %s", left)
	}

	// Again, with an outcome that is there already, and a job that fails.
	f.write(filepath.Join(f.fake, "status"), "failed")
	if err := os.RemoveAll(filepath.Join(f.root, "output", "hello-iso")); err != nil {
		t.Fatal(err)
	}
	said, err = f.run("demo.sh")
	if err == nil {
		t.Error("a job that failed is a success")
	}
	contains(t, "make demo of a job that fails", said, "error: the job did not succeed: no room", "What it said: ./output/hello-iso/1/build.log")

	said, err = f.run("down.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make down", said, "Stopped. Jobs, images", "Go on: make demo, or docker compose up -d\n")
	contains(t, "what Compose was asked for", f.calls(), "\ncompose down\n", "\ncompose --progress plain build\n", "\ncompose up -d\n")

	said, err = f.run("clean.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make clean", said, "Removed.", "Kept: ./output and ./jobs.")
	contains(t, "what Docker was asked for", f.calls(), "image rm osbuilder/sidecar:latest\n", "image rm osbuilder/vmimage-debian:latest\n", "down --volumes --remove-orphans\n")
	if strings.Contains(f.calls(), "image rm other/image") {
		t.Error("another's image was removed")
	}
	for _, name := range []string{".osbuilder", ".env"} {
		if _, err := os.Stat(filepath.Join(f.root, name)); err == nil {
			t.Error(name, "is left")
		}
	}
	if _, err := os.Stat(filepath.Join(f.root, "output", "hello-iso", "1", "hello.iso")); err != nil {
		t.Error("the image is gone: ", err)
	}
}

// What the demo wrote is written anew by the next one, until the user has
// changed it: then it is his, and wins.
func TestSettingsOfTheDemo(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	demo := func() string {
		t.Helper()
		if err := os.RemoveAll(filepath.Join(f.root, "output", "hello-iso")); err != nil {
			t.Fatal(err)
		}
		said, err := f.run("demo.sh")
		if err != nil {
			t.Fatal(err, said)
		}
		return said
	}
	demo()
	first := f.read(".env")
	contains(t, ".env", first, "# Written by make demo", "\nVM_FLAVOUR=debian\n", "\nBASE_DEBIAN=debian:trixie-slim\n")
	f.env = []string{"BASE_DEBIAN=other"}
	said := demo()
	f.env = nil
	contains(t, ".env of the second demo", f.read(".env"), "\nBASE_DEBIAN=other\n")
	if strings.Contains(said, "as VM_FLAVOUR says") {
		t.Error("its own choice passes for the user's:", said)
	}

	mine := strings.Replace(f.read(".env"), "CPU_CORES=2", "CPU_CORES=1", 1)
	f.write(filepath.Join(f.root, ".env"), mine)
	contains(t, "the demo with a changed .env", demo(), "as VM_FLAVOUR says", "settings    .env; after a change: docker compose up -d\n")
	said, err := f.run("down.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make down", said, "Go on: make demo, or docker compose up -d\n")
	if strings.Contains(f.calls(), "--env-file") {
		t.Error("Compose was told what .env says by itself")
	}
	said, err = f.run("clean.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make clean", said, "Kept: .env, which has settings of yours.")
	if got := f.read(".env"); got != mine {
		t.Errorf(".env became %q", got)
	}
}

// A .env of the user's is left as it is, and he is told what it lacks.
func TestDemoBesideAnEnv(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write(filepath.Join(f.root, ".env"), "CPU_CORES=1\n")
	said, err := f.run("demo.sh")
	if err != nil {
		t.Fatal(err, said)
	}
	contains(t, "make demo", said, "settings    .env, which lacks some of .osbuilder/demo.env", "follow it   docker compose --env-file .osbuilder/demo.env --env-file .env logs -f sidecar\n")
	said, err = f.run("down.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make down", said, "Go on: make demo. .env lacks some of .osbuilder/demo.env")
	contains(t, "what Compose was asked for", f.calls(), "demo.env --env-file "+f.root+"/.env up -d\n")
	if _, err := f.run("clean.sh"); err != nil {
		t.Error(err)
	}
	if got := f.read(".env"); got != "CPU_CORES=1\n" {
		t.Errorf(".env became %q", got)
	}
}

// In a rootless engine the user is root.
func TestDemoInARootlessEngine(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write(filepath.Join(f.fake, "rootless"), "")
	if said, err := f.run("demo.sh"); err != nil {
		t.Fatal(err, said)
	}
	contains(t, ".env", f.read(".env"), "\nPUID=0\nPGID=0\n")
}

// A base image of our own that .env names is made again when it is gone.
func TestOwnBaseImageIsMadeAgain(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	f.write(filepath.Join(f.root, ".env"), "BASE_DEBIAN=osbuilder-base/debian:trixie-slim\n")
	f.write(filepath.Join(f.fake, "no-own-images"), "")
	f.write(filepath.Join(filepath.Dir(f.fake), "bin", "mmdebstrap"), "#!/bin/sh\necho made it >>\"$FAKE/calls\"\nexit 1\n")
	if err := os.Chmod(filepath.Join(filepath.Dir(f.fake), "bin", "mmdebstrap"), 0o755); err != nil {
		t.Fatal(err)
	}
	said, err := f.run("demo.sh")
	if err == nil {
		t.Error("no error")
	}
	contains(t, "make demo", said, "Making a Debian base image")
	contains(t, "what was run", f.calls(), "made it\n")
}

func TestVMISO(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	said, err := f.run("vm-iso.sh", "to here")
	if err == nil {
		t.Error("there is no image with Nix, and it went on")
	}
	contains(t, "make vm-iso", said, "error: the image with Nix, nixos/nix:", "can't be pulled: Error response from daemon: no such host")
	f.write(filepath.Join(f.root, ".env"), "BASE_NIX=mine # of ours\n")
	said, err = f.run("vm-iso.sh", "to here", "renew")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make vm-iso", said, "The ISO is "+f.root+"/to here/boot.iso")
	contains(t, "what Docker was asked for", f.calls(), "build vmimage\n", "-v "+f.root+"/to here:/storage", "osbuilder/vmimage-nixos renew\n")
}

// What goes wrong before anything is done is said with what to do.
func TestScriptsSayWhatIsWrong(t *testing.T) {
	for _, tt := range []struct {
		name, script string
		prepare      func(*folder)
		want         []string
	}{
		{
			"no engine", "demo.sh", func(f *folder) { f.write(filepath.Join(f.fake, "no-engine"), "") },
			[]string{"error: the Docker engine does not answer.", "Start it (Docker Desktop"},
		},
		{
			"no engine to stop", "down.sh", func(f *folder) { f.write(filepath.Join(f.fake, "no-engine"), "") },
			[]string{"error: the Docker engine does not answer, so nothing of it is running."},
		},
		{
			"no Compose", "demo.sh", func(f *folder) { f.write(filepath.Join(f.fake, "no-compose"), "") },
			[]string{"error: Docker Compose 2.24.4 or later is not installed.", "update that"},
		},
		{
			"another clone", "demo.sh", func(f *folder) { f.write(filepath.Join(f.fake, "other-folder"), "/other/clone\n") },
			[]string{"error: the project osbuilder on this machine belongs to another folder: /other/clone", "COMPOSE_PROJECT_NAME=osbuilder-2"},
		},
		{
			"a flavour that is none", "demo.sh", func(f *folder) { f.write(filepath.Join(f.root, ".env"), "VM_FLAVOUR=arch\n") },
			[]string{"error: VM_FLAVOUR=arch is not known.", "It is nixos or debian."},
		},
		{
			"NixOS without its image", "demo.sh", func(f *folder) { f.write(filepath.Join(f.root, ".env"), "VM_FLAVOUR=nixos\n") },
			[]string{"error: making the NixOS VM needs nixos/nix:"},
		},
		{
			"a folder's name that only Compose understands", "demo.sh", func(f *folder) { f.write(filepath.Join(f.root, ".env"), "JOBS_DIR=${ROOM:-/srv}/jobs\n") },
			[]string{"error: JOBS_DIR=${ROOM:-/srv}/jobs can't be read by the scripts", "Write the path out in .env."},
		},
		{
			"rootless, and somebody else", "demo.sh", func(f *folder) {
				f.write(filepath.Join(f.fake, "rootless"), "")
				f.write(filepath.Join(f.root, ".env"), "PUID=1000\n")
			},
			[]string{"error: Docker is rootless here, and PUID=1000 is not you in it.", "PUID=0 and PGID=0"},
		},
		{"a make that runs", "clean.sh", func(f *folder) {
			// A process that has the name of the script, as its own has.
			sleeper := filepath.Join(f.fake, "demo.sh")
			f.write(sleeper, "read -r _\n")
			cmd := exec.CommandContext(f.t.Context(), f.bash, sleeper)
			hold, err := cmd.StdinPipe()
			if err == nil {
				err = cmd.Start()
			}
			if err != nil {
				f.t.Fatal(err)
			}
			f.t.Cleanup(func() {
				_ = hold.Close()
				_ = cmd.Wait()
			})
			if err := errors.Join(os.MkdirAll(filepath.Join(f.root, ".osbuilder"), 0o755),
				os.Symlink(strings.Join([]string{strconv.Itoa(cmd.Process.Pid), "demo.sh", "make demo"}, " "), filepath.Join(f.root, ".osbuilder", "running"))); err != nil {
				f.t.Fatal(err)
			}
		}, []string{"error: make demo is running in this folder (process "}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			f := newFolder(t)
			tt.prepare(f)
			said, err := f.run(tt.script)
			if err == nil {
				t.Error("no error")
			}
			contains(t, tt.script, said, tt.want...)
		})
	}
}

// A folder's name may have blanks; the engine here has the usual one for it.
func TestDemoIntoAFolderWithABlank(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	if err := errors.Join(os.Rename(filepath.Join(f.root, "output"), filepath.Join(f.root, "my output")), os.Symlink("my output", filepath.Join(f.root, "output"))); err != nil {
		t.Fatal(err)
	}
	f.write(filepath.Join(f.root, ".env"), "OUTPUT_DIR='./my output'\n")
	said, err := f.run("demo.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "make demo", said, "image   ./my output/hello-iso/1/hello.iso\n", `-cdrom ./my\ output/hello-iso/1/hello.iso`+"\n", "images appear in ./my output.")
}

// A folder in the home, as Compose takes it: at the end, and by make clean.
func TestFolderInTheHome(t *testing.T) {
	t.Parallel()
	for _, value := range []string{"~/images", "$HOME/images", `"${HOME}/images"`, "~images"} {
		f := newFolder(t)
		there := filepath.Join(f.fake, "images")
		if err := errors.Join(os.Rename(filepath.Join(f.root, "output"), there), os.Symlink(there, filepath.Join(f.root, "output"))); err != nil {
			t.Fatal(err)
		}
		f.write(filepath.Join(f.root, ".env"), "OUTPUT_DIR="+value+"\n")
		said, err := f.run("demo.sh")
		if err != nil {
			t.Error(err)
		}
		contains(t, "make demo with OUTPUT_DIR="+value, said, "image   "+there+"/hello-iso/1/hello.iso\n", "images appear in "+there+".")
		said, err = f.run("clean.sh")
		if err != nil {
			t.Error(err)
		}
		contains(t, "make clean with OUTPUT_DIR="+value, said, "Kept: "+there+" and ./jobs.")
	}
}

// A port that another program has is told before anything is built.
func TestPortInUse(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	listener, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := strconv.Itoa(listener.Addr().(*net.TCPAddr).Port)
	f.write(filepath.Join(f.root, ".env"), "SSH_PORT="+port+"\n")
	said, err := f.run("demo.sh")
	if err == nil {
		t.Error("no error")
	}
	contains(t, "make demo", said, "error: port "+port+" of this machine is in use by another program.", "SSH_PORT=NUMBER in .env")
	if strings.Contains(f.calls(), " build") {
		t.Error("something was built")
	}
}

// The functions that differ from system to system, alone.
func TestSharedFunctions(t *testing.T) {
	t.Parallel()
	f := newFolder(t)
	big := strings.Repeat("x", 3<<20)
	f.write(filepath.Join(f.root, "big"), big)
	f.write(filepath.Join(f.root, "scripts", "try.sh"), `set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/lib.sh
. scripts/world.sh
. scripts/project.sh
try() { printf '%s: ' "$1"; shift; "$@" && echo " yes" || echo " no, $?"; }
try older at_least 1.2.3 1.10
try same at_least v1.10.0-rc1 1.10
try newer at_least 2 1.10.9
try time bounded 1 sleep 5
try in-time bounded 5 true
try fails bounded 5 false
try sum sha256 big
try size human_size 3145728
try small human_size 17
try setting setting NOT_SET
compose_of() { COMPOSE=(printf '<%s>'); PROJECT_ENV=(); compose a "b c"; }
try empty-list compose_of
try shown shown_compose
ask_no() { ask question </dev/null; }
try nobody-there ask_no
dirty() { printf 'a\033[31mb\033[0m\007'"$C1"'c\r\nd\te\n' | plain; }
try plain dirty
free=$(megabytes_free .)
[ "$free" -gt 0 ]
: >"$LOGS/times"
try step step name "What" sh -c 'echo said'
try failing step name "What" sh -c 'printf "bad\033[2J\n"; exit 3'
try heartbeat is_running $$ try.sh
try other is_running $$ other.sh
`)
	// BSD's tools on glibc take no bytes above 127 in the locale C, which on BSD they do.
	f.env = append(f.env, "C1=")
	if os.Getenv("OSBUILDER_TEST_TOOLS") == "" {
		f.env[0] += `\302\233`
	}
	said, err := f.run("try.sh")
	if err != nil {
		t.Error(err)
	}
	contains(t, "try.sh", said, "older:  no, 1\n", "same:  yes\n", "newer:  yes\n", "time:  no, 124\n", "in-time:  yes\n", "fails:  no, 1\n",
		fmt.Sprintf("sum: %x\n yes\n", sha256.Sum256([]byte(big))), "size: 3.0 MiB yes\n", "small: 17 bytes yes\n", "setting:  yes\n",
		"empty-list: <a><b c> yes\n", "nobody-there:  yes\n", "plain: abc\nd\te\n yes\n", "step: ==> What\n",
		"    | bad\n no, 3\n", "heartbeat:  yes\n", "other:  no, 1\n")
	if strings.ContainsAny(said, "\x1b\r\x07") {
		t.Errorf("control characters in %q", said)
	}
}
