package vmimage

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A machine is QEMU's container without its container: the real scripts, and a
// QEMU that does what the test wants.
type machine struct {
	t                         *testing.T
	bin, storage, status, run string
}

// newMachine makes one with an ISO in its storage, if it is not nil, and a QEMU
// that is that script.
func newMachine(t *testing.T, iso []byte, qemu string) *machine {
	t.Helper()
	if _, err := os.Stat("/boot.iso"); err == nil {
		t.Fatal("this machine has a /boot.iso, which QEMU's scripts would boot: move it away for this test")
	}
	dir := t.TempDir()
	m := &machine{t, filepath.Join(dir, "bin"), filepath.Join(dir, "storage"), filepath.Join(dir, "status", "vm"), filepath.Join(dir, "run")}
	for _, d := range []string{m.bin, m.storage, filepath.Dir(m.status)} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if iso != nil {
		write(t, filepath.Join(m.storage, "boot.iso"), iso)
	}
	for name, script := range map[string]string{
		"qemu-system-x86_64": qemu,
		"socat":              "cat >/dev/null",
		"sleep":              "exec cat", // what watches QEMU doesn't come to its first round
	} {
		if err := os.WriteFile(filepath.Join(m.bin, name), []byte("#!/bin/bash\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return m
}

// command is one of the container, which ends with all that it started.
func (m *machine) command(ctx context.Context, env []string, program ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, program[0], program[1:]...)
	cmd.Env = append([]string{
		"PATH=" + m.bin + ":/usr/local/bin:/usr/bin:/bin", "STORAGE=" + m.storage, "RUN_DIR=" + m.run, "STATUS_DIR=" + m.status,
		"KVM=N", "RAM_SIZE=512M", "RAM_CHECK=N", "DISK_SIZE=1G", "TIMEOUT=1",
	}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// output runs it, and returns what it said and with which status it ended.
func (m *machine) output(env []string, program ...string) (string, int) {
	m.t.Helper()
	ctx, cancel := context.WithCancel(m.t.Context())
	defer cancel()
	out := filepath.Join(m.t.TempDir(), "out") // not a pipe: what is left running would hold it
	file, err := os.Create(out)
	if err != nil {
		m.t.Fatal(err)
	}
	defer file.Close()
	cmd := m.command(ctx, env, program...)
	cmd.Stdout, cmd.Stderr = file, file
	_ = cmd.Run()                                       // its status is returned
	_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // as the container's end does
	text, err := os.ReadFile(out)
	if err != nil {
		m.t.Fatal(err)
	}
	return string(text), cmd.ProcessState.ExitCode()
}

// state returns what the sidecar is told.
func (m *machine) state() string {
	m.t.Helper()
	text, err := os.ReadFile(filepath.Join(m.status, "state"))
	if err != nil && !os.IsNotExist(err) {
		m.t.Fatal(err)
	}
	return strings.TrimSuffix(string(text), "\n")
}

// iso is as much of one as is looked at.
func iso(bootRecord, bootSector bool) []byte {
	data := make([]byte, 40<<10)
	copy(data[32768:], "\x01CD001\x01")
	if bootRecord {
		copy(data[34816:], "\x00CD001\x01EL TORITO SPECIFICATION")
	}
	if bootSector {
		copy(data[510:], "\x55\xaa")
	}
	return data
}

// What the sidecar is told by QEMU's container, and what stands in its log.
func TestWhatTheSidecarIsToldOfQEMU(t *testing.T) {
	junk := bytes.Repeat([]byte("junk "), 10000)
	for name, tt := range map[string]struct {
		iso    []byte
		qemu   string
		env    []string
		status int
		says   string
		state  string // STORAGE is where the VM's lies
	}{
		"no image": {
			nil, "", nil, 64, "qemu: there is neither /boot.iso nor STORAGE/boot.iso: run the service",
			"image there is neither /boot.iso nor STORAGE/boot.iso: run the service that makes the VM's ISO (docker compose up vmimage)",
		},
		"an empty image": {[]byte{}, "", nil, 64, "is no file or empty", "image STORAGE/boot.iso is no file or empty: run the service that makes the VM's ISO again (docker compose up vmimage)"},
		"junk":           {junk, "", nil, 64, "is no ISO image", "unusable STORAGE/boot.iso is no ISO image: remove it, then make it again (docker compose up vmimage)"},
		"nothing to boot from": {
			iso(false, false), "", nil, 64, "has nothing to boot from",
			"unusable STORAGE/boot.iso has nothing to boot from: neither a boot record nor a boot sector: remove it, then make it again (docker compose up vmimage)",
		},
		"a setting":                   {iso(true, false), "", []string{"CPU_CORES=many"}, 64, "CPU_CORES=many is no number", "ended CPU_CORES=many is no number of cores: 4, say, or half, or max"},
		"no such KVM":                 {iso(true, false), "", []string{"KVM=perhaps"}, 64, "KVM=perhaps is not understood", "ended KVM=perhaps is not understood: Y, N, or empty to find out"},
		"QEMU fails":                  {iso(false, true), "echo could not open >&2; exit 1", nil, 1, "QEMU ended with status 1", "ended QEMU ended with status 1: its message is above"},
		"it powers off":               {iso(true, true), "exit 0", nil, 0, "qemu: the VM is off", "off"},
		"nobody to tell":              {iso(true, true), "exit 0", []string{"STATUS_DIR="}, 0, "qemu: the VM is off", ""},
		"no such folder":              {iso(true, true), "exit 0", []string{"STATUS_DIR=/proc/none"}, 0, "qemu: the VM is off", ""},
		"nobody to tell and no image": {nil, "", []string{"STATUS_DIR="}, 64, "there is neither", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, tt.iso, tt.qemu)
			out, status := m.output(tt.env, "bash", "qemu/entrypoint.sh")
			place := strings.NewReplacer("STORAGE", m.storage)
			if status != tt.status || !strings.Contains(out, place.Replace(tt.says)) {
				t.Errorf("status %d, want %d; it says: %s", status, tt.status, out)
			}
			if diff := cmp.Diff(place.Replace(tt.state), m.state()); diff != "" {
				t.Errorf("the sidecar is told (-want +got):\n%s", diff)
			}
		})
	}
}

// Without settings the VM gets the default ones, and what this machine makes of
// them is said with their values.
func TestDefaultsOfQEMU(t *testing.T) {
	for _, setting := range []struct {
		name  string
		unset []string // or empty, as Compose passes on what is not set
		env   []string
	}{
		{"unset", []string{"env", "-u", "RAM_SIZE", "-u", "DISK_SIZE", "-u", "RAM_CHECK", "-u", "CPU_CORES"}, nil},
		{"empty", nil, []string{"RAM_SIZE=", "DISK_SIZE=", "RAM_CHECK=", "CPU_CORES="}},
	} {
		t.Run(setting.name, func(t *testing.T) {
			m := newMachine(t, iso(true, false), "exit 0")
			// A container that may have 2 GiB, and a data disk from when DISK_SIZE was larger.
			cat := "case ${1:-} in */memory.max) echo 2147483648 ;; */memory.current) echo 0 ;; *) exec /bin/cat \"$@\" ;; esac"
			write(t, filepath.Join(m.bin, "cat"), []byte("#!/bin/bash\n"+cat+"\n"))
			write(t, filepath.Join(m.storage, "data.img"), nil)
			if err := errors.Join(os.Chmod(filepath.Join(m.bin, "cat"), 0o755), os.Truncate(filepath.Join(m.storage, "data.img"), 65<<30)); err != nil {
				t.Fatal(err)
			}
			out, status := m.output(setting.env, append(setting.unset, "bash", "qemu/entrypoint.sh")...)
			for _, want := range []string{"warning: RAM_SIZE=2G, but ", " are free here: the VM gets ", "warning: DISK_SIZE=64G is less than the data disk has, 65 GiB", "the VM is off"} {
				if status != 0 || !strings.Contains(out, want) {
					t.Errorf("status %d, want %q: %s", status, want, out)
				}
			}
		})
	}
}

// Amounts with and without a unit, as qemux/qemu takes them.
func TestAmountsOfQEMU(t *testing.T) {
	for setting, says := range map[string]string{
		"DISK_SIZE=1":     "data disk: made, 1 GiB",
		"DISK_SIZE=130":   "data disk: made, 130 GiB",
		"DISK_SIZE=2.5":   "data disk: made, 2 GiB",
		"DISK_SIZE=3 GB":  "data disk: made, 3 GiB",
		"DISK_SIZE=2048M": "data disk: made, 2 GiB",
		"DISK_SIZE=large": "DISK_SIZE=large is no size",
		"RAM_SIZE=1":      ", 1024 MiB of memory",
		"RAM_SIZE=1.5":    ", 1536 MiB of memory",
		"RAM_SIZE=129":    ", 132096 MiB of memory",
		"RAM_SIZE=600":    ", 600 MiB of memory",
		"RAM_SIZE=4096":   ", 4096 MiB of memory",
		"RAM_SIZE=700.5":  ", 700 MiB of memory",
		"RAM_SIZE=1GB":    ", 1024 MiB of memory",
		"RAM_SIZE=lots":   "RAM_SIZE=lots is no amount of memory",
	} {
		t.Run(setting, func(t *testing.T) {
			m := newMachine(t, iso(true, false), "exit 0")
			if out, _ := m.output([]string{setting}, "bash", "qemu/entrypoint.sh"); !strings.Contains(out, says) {
				t.Errorf("want %q: %s", says, out)
			}
		})
	}
}

// QEMU is told to write the console to a file that begins anew with it, and
// that it runs is known before it does.
func TestConsoleOfQEMU(t *testing.T) {
	const qemu = `cp "$STATUS_DIR/state" "$STATUS_DIR/state-at-start"
for word; do
  case $word in stdio,id=console,*) log=${word#*logfile=} ;; esac
done
[[ $log == *,logappend=on ]] || exit 9
echo "Linux version" >>"${log%,logappend=on}"`
	m := newMachine(t, iso(true, false), qemu)
	if err := os.MkdirAll(m.status, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(m.status, "console"), []byte("of the last one\n"))
	if out, status := m.output(nil, "bash", "qemu/entrypoint.sh"); status != 0 {
		t.Fatalf("status %d: %s", status, out)
	}
	for name, want := range map[string]string{"console": "Linux version\n", "state-at-start": "running\n"} {
		if got, err := os.ReadFile(filepath.Join(m.status, name)); string(got) != want {
			t.Errorf("%s: %q, want %q (%v)", name, got, want, err)
		}
	}
}

// Without KVM the processor claims no fast `rep movsb`, in our container and in
// qemux/qemu, which adds CPU_FLAGS to its own; what the user adds comes last.
func TestCPUFlags(t *testing.T) {
	if runtime.GOARCH != "amd64" {
		t.Log("the flags are an x86_64 processor's")
		return
	}
	for env, want := range map[string]string{
		"CPU_FLAGS=":        "erms=off,fsrm=off",
		"CPU_FLAGS=pmu=off": "erms=off,fsrm=off,pmu=off",
	} {
		m := newMachine(t, iso(true, false), `echo "$*"`)
		for name, script := range map[string][]string{
			"entrypoint": {"bash", "qemu/entrypoint.sh"},
			"hook":       {"bash", "-c", `. qemu/start-hook.sh; bash -c 'echo "-cpu max,$CPU_FLAGS -"'`},
		} {
			out, status := m.output([]string{env, "OSB_LIB=qemu"}, script...)
			if status != 0 || !strings.Contains(out, "-cpu max,"+want+" -") {
				t.Errorf("%s, %s: status %d, want the flags %s: %s", name, env, status, want, out)
			}
		}
	}
}

// In qemux/qemu the hook does all that, and its entry script goes on with what
// the hook set. The script here stands for that one: it ends as ours says.
func TestHookInQemux(t *testing.T) {
	const entry = `set -Eeuo pipefail
. "$HOOK"
echo "serial ${SERIAL:-unset}"
echo "arguments ${ARGUMENTS:-}"
cp "$STATUS_DIR/state" "$STATUS_DIR/state-at-start" 2>/dev/null || :
exit "$END"`
	for name, tt := range map[string]struct {
		iso          []byte
		end          string
		env          []string
		serial, args string // STATUS is the folder
		start, state string
	}{
		"it runs": {
			iso(true, false), "0", nil, "chardev:osbconsole",
			"-monitor unix:RUN/m.sock,server=on,wait=off -chardev stdio,id=osbconsole,signal=off,logfile=STATUS/console,logappend=on -fw_cfg one",
			"running\n", "off",
		},
		"it is stopped":  {iso(true, false), "143", []string{"SERIAL=pty"}, "pty", "-monitor unix:RUN/m.sock,server=on,wait=off -fw_cfg one", "running\n", "off"},
		"QEMU fails":     {iso(true, false), "1", []string{"SERIAL=pty"}, "pty", "-monitor unix:RUN/m.sock,server=on,wait=off -fw_cfg one", "running\n", "ended its container ended with status 1"},
		"no image":       {nil, "64", nil, "unset", "-fw_cfg one", "image there is neither /boot.iso nor STORAGE/boot.iso\n", "image there is neither /boot.iso nor STORAGE/boot.iso"},
		"junk":           {bytes.Repeat([]byte("junk "), 10000), "0", nil, "unset", "-fw_cfg one", "unusable STORAGE/boot.iso is no ISO image\n", "unusable STORAGE/boot.iso is no ISO image"},
		"the hook alone": {iso(true, false), "0", []string{"OSB_LIB=/none"}, "unset", "-fw_cfg one", "", ""},
		"nobody to tell": {iso(true, false), "0", []string{"STATUS_DIR="}, "unset", "-fw_cfg one", "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, tt.iso, "")
			lib, err := filepath.Abs("qemu")
			if err != nil {
				t.Fatal(err)
			}
			env := append([]string{
				"HOOK=" + filepath.Join(lib, "start-hook.sh"), "OSB_LIB=" + lib, "OSB_PROC=" + write(t, filepath.Join(t.TempDir(), "proc.sh"), nil),
				"OSB_MONITOR=" + m.run + "/m.sock", "ARGUMENTS=-fw_cfg one", "END=" + tt.end,
			}, tt.env...)
			out, status := m.output(env, "bash", "-c", entry)
			place := strings.NewReplacer("STORAGE", m.storage, "STATUS", m.status, "RUN", m.run)
			want := place.Replace("serial " + tt.serial + "\narguments " + tt.args + "\n")
			if status == 0 != (tt.end == "0") || !strings.Contains(strings.Join(strings.Fields(out), " "), strings.Join(strings.Fields(want), " ")) {
				t.Errorf("status %d; it says:\n%swant in it:\n%s", status, out, want)
			}
			if diff := cmp.Diff(place.Replace(tt.state), m.state()); diff != "" {
				t.Errorf("the sidecar is told (-want +got):\n%s", diff)
			}
			start, err := os.ReadFile(filepath.Join(m.status, "state-at-start"))
			if string(start) != place.Replace(tt.start) {
				t.Errorf("at the start it is told %q, want %q (%v)", start, place.Replace(tt.start), err)
			}
		})
	}
}

// While no image is there the sidecar says what becomes of it.
func TestWhatTheSidecarIsToldOfTheImage(t *testing.T) {
	s := newStorage(t)
	told := t.TempDir()
	state := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(told, "image"))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSuffix(string(text), "\n")
	}
	file := write(t, filepath.Join(t.TempDir(), "one"), []byte("an image"))
	run := func(key, file string, env ...string) {
		t.Helper()
		write(t, filepath.Join(s.shims, "count"), []byte("0"))
		if out, err := s.command(t.Context(), key, file, append(env, "KILLED=0", "STATUS_DIR="+told)...).CombinedOutput(); err != nil {
			t.Logf("%v: %s", err, out)
		}
	}
	run("key 1", file+"-not")
	if got := state(); got != "failed cannot read "+file+"-not" {
		t.Errorf("told %q", got)
	}
	run("key 1", file)
	if got := state(); got != "ready" {
		t.Errorf("put in place, told %q", got)
	}
	write(t, filepath.Join(told, "image"), []byte("making step 1 of 5: x\n")) // by one that was killed
	run("key 1", file)
	if got := state(); got != "ready" {
		t.Errorf("up to date, told %q", got)
	}
	// The VM waits for no renewal: it has its image.
	run("key 2", file+"-not", "renewal=yes")
	if got := state(); got != "ready" {
		t.Errorf("a renewal failed, told %q", got)
	}
	run("key 2", file+"-not")
	if got := state(); got != "failed cannot read "+file+"-not" {
		t.Errorf("what the VM waits for failed, told %q", got)
	}
	if err := os.Remove(filepath.Join(s.dir, "boot.iso")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(told, "image"), nil)
	run("key 2", file+"-not", "renewal=yes")
	if got := state(); got != "failed cannot read "+file+"-not" {
		t.Errorf("a renewal failed and there is no image, told %q", got)
	}
}

// A typing mistake changes nothing in what the sidecar is told of the image.
func TestUnknownWordOfMakeImage(t *testing.T) {
	told := t.TempDir()
	note := write(t, filepath.Join(told, "image"), []byte("ready\n"))
	cmd := exec.CommandContext(t.Context(), "nixos/make-image", "renwe")
	cmd.Env = []string{"PATH=/usr/local/bin:/usr/bin:/bin", "STORAGE=" + t.TempDir(), "STATUS_DIR=" + told}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "«renwe» is not known") {
		t.Errorf("%v: %s", err, out)
	}
	if text, err := os.ReadFile(note); err != nil || string(text) != "ready\n" {
		t.Errorf("told %q, %v", text, err)
	}
}
