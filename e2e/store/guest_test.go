//go:build e2e

package store

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
)

// A bench holds what all guests boot from, in one folder that the container of
// QEMU sees as /guest.
type bench struct {
	dir    string
	qemu   string // name of QEMU's image
	script []byte // the store's script, as it is in the repository
}

// A disk of a guest, in the bench's folder.
type disk struct {
	file, serial string
	readOnly     bool
}

// A boot is one start of a guest.
type boot struct {
	disks []disk
	do    string            // Bash, run by testdata/main
	wrap  map[string]string // tools that are put before the real ones on the script's PATH
	kill  string            // end QEMU at the line that begins so
}

// An outcome is what a guest said.
type outcome struct {
	console string
	values  map[string]string
	took    time.Duration
}

// run boots a guest, and waits until it is off or was killed.
func (b *bench) run(t *testing.T, what boot) outcome {
	t.Helper()
	name := fmt.Sprintf("osbuilder-store-%d-%s", os.Getpid(), strings.Map(letters, t.Name()))
	defer os.Remove(filepath.Join(b.dir, name+".initrd"))
	b.write(t, name+".initrd", b.initrd(t, what))
	args := []string{
		"run", "--rm", "--name", name, "--network", "none", "--volume", b.dir + ":/guest", "--workdir", "/guest",
		"--entrypoint", "qemu-system-x86_64", b.qemu,
		"-no-user-config", "-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-machine", "pc", "-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max,erms=off,fsrm=off", "-smp", "1", "-m", "768",
		"-kernel", "vmlinuz", "-initrd", name + ".initrd",
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 audit=0 no_timer_check cryptomgr.notests",
		"-drive", "file=boot.iso,if=none,id=iso,format=raw,readonly=on", "-device", "virtio-blk-pci,drive=iso,serial=iso",
	}
	for i, d := range what.disks {
		args = append(args,
			"-drive", fmt.Sprintf("file=%s,if=none,id=d%d,format=raw,discard=unmap,readonly=%s", d.file, i, onOff[d.readOnly]),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=d%d,serial=%s", i, d.serial))
	}
	start := time.Now()
	cmd := exec.CommandContext(t.Context(), "docker", args...)
	cmd.WaitDelay = 10 * time.Second
	console := &watched{find: what.kill, found: func() {
		// The power fails: nothing that the guest still holds reaches its disk.
		if err := exec.Command("docker", "kill", name).Run(); err != nil { //nolint:noctx // also when the test ends
			t.Errorf("kill the guest: %v", err)
		}
	}}
	cmd.Stdout, cmd.Stderr = console, console
	stop := time.AfterFunc(bootLimit, func() { exec.Command("docker", "kill", name).Run() }) //nolint:errcheck,noctx // the run below fails then
	err := cmd.Run()
	late := !stop.Stop()
	o := outcome{console: console.String(), values: map[string]string{}, took: time.Since(start)}
	for line := range strings.Lines(o.console) {
		line = strings.TrimRight(line, "\r\n")
		if rest, ok := strings.CutPrefix(line, "value "); ok {
			key, value, _ := strings.Cut(rest, " ")
			o.values[key] = value
		}
	}
	t.Logf("%s\n%s", o.took.Round(time.Second/10), o.console)
	switch {
	case late:
		t.Fatalf("the guest did not end within %s", bootLimit)
	case what.kill == "" && err != nil:
		t.Fatalf("run QEMU: %v", err)
	case what.kill != "" && !console.was():
		t.Fatalf("the guest never said %q", what.kill)
	}
	return o
}

var onOff = map[bool]string{true: "on", false: "off"}

func letters(r rune) rune {
	if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
		return r
	}
	return '-'
}

// want compares what the guest said with lists of KEY, VALUE, KEY, VALUE …
func (o outcome) want(t *testing.T, lists ...[]string) {
	t.Helper()
	for _, pairs := range lists {
		for i := 0; i < len(pairs); i += 2 {
			if got, said := o.values[pairs[i]]; !said || got != pairs[i+1] {
				t.Errorf("the guest's %s is %q, want %q", pairs[i], got, pairs[i+1])
			}
		}
	}
}

func (o outcome) says(t *testing.T, text string) {
	t.Helper()
	if !strings.Contains(o.console, text) {
		t.Errorf("the console does not say %q", text)
	}
}

func (o outcome) silent(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		if strings.Contains(o.console, text) {
			t.Errorf("the console says %q", text)
		}
	}
}

// initrd is Debian's own with our files appended: the kernel unpacks one after
// the other, and the later file wins.
func (b *bench) initrd(t *testing.T, what boot) []byte {
	t.Helper()
	base, err := os.ReadFile(filepath.Join(b.dir, "initrd"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{"guest/store": string(b.script), "guest/boot": what.do}
	for name, from := range map[string]string{"init": "testdata/init", "guest/main": "testdata/main", "guest/closure.nix": "testdata/closure.nix"} {
		data, err := os.ReadFile(from)
		if err != nil {
			t.Fatal(err)
		}
		files[name] = string(data)
	}
	for name, text := range what.wrap {
		files["guest/bin/"+name] = text
	}
	base = append(base, make([]byte, -len(base)&3)...)
	return append(base, cpio([]string{"guest", "guest/bin"}, files)...)
}

// cpio packs folders and files in the format of an initramfs ("newc").
func cpio(folders []string, files map[string]string) []byte {
	var b bytes.Buffer
	inode := 1
	add := func(name string, mode int, data string) {
		// inode mode uid gid links mtime size, device and rdevice twice, name's length, checksum
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.WriteString(data)
		b.Write(make([]byte, -b.Len()&3))
		inode++
	}
	for _, name := range folders {
		add(name, 0o40755, "")
	}
	for name, data := range files {
		add(name, 0o100755, data)
	}
	add("TRAILER!!!", 0, "")
	return b.Bytes()
}

// A watched console calls found, once, when a line begins with find.
type watched struct {
	find  string
	found func()

	mu   sync.Mutex // guards what follows
	text bytes.Buffer
	done bool
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.text.Write(p)
	if w.find != "" && !w.done && bytes.Contains(w.text.Bytes(), []byte("\n"+w.find)) {
		w.done = true
		w.found()
	}
	return len(p), nil
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.text.String()
}

func (w *watched) was() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.done
}

func (b *bench) write(t *testing.T, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(b.dir, name), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

// resize makes or grows a sparse disk.
func (b *bench) resize(t *testing.T, name string, bytes int64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(b.dir, name), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(bytes); err != nil {
		t.Fatal(err)
	}
}

// wantClean reads the ext4 superblock of a disk: a file system that was
// unmounted, or made read-only, has nothing left in its journal.
func (b *bench) wantClean(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(filepath.Join(b.dir, name))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	super := make([]byte, 1024)
	if _, err := io.ReadFull(io.NewSectionReader(f, 1024, 1024), super); err != nil {
		t.Fatal(err)
	}
	const magic, clean, needsRecovery = 0xef53, 1, 4
	state, incompat := binary.LittleEndian.Uint16(super[0x3a:]), binary.LittleEndian.Uint32(super[0x60:])
	if got := binary.LittleEndian.Uint16(super[0x38:]); got != magic {
		t.Fatalf("%s holds no ext4: magic number %#x", name, got)
	}
	if state != clean || incompat&needsRecovery != 0 {
		t.Errorf("%s was not unmounted cleanly: state %#x, features %#x", name, state, incompat)
	}
}
