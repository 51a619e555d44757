package vmimage

import (
	"cmp"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"
)

// What the hook says of KVM, for each reason that there can be, and what it
// does then. Its device, processor and programs are the test's.
func TestKVM(t *testing.T) {
	const (
		slow    = "KVM: no, the VM will be slow: "
		xorriso = `case $* in *-find*) echo "'/boot/vmlinuz-6'" ;; *-extract*) touch "${!#}" ;; esac`
		boots   = `for word; do case $word in file:*) echo "Kernel panic: Unable to mount root fs" >"${word#file:}" ;; esac; done`
	)
	for name, tt := range map[string]struct {
		env     []string
		device  func(t *testing.T) string // nil: one that opens
		mknod   string
		xorriso string
		qemu    string
		machine string // x86_64 if empty
		noISO   bool
		status  int
		says    string // STORAGE is where the ISO lies
		state   string // what the sidecar is told
	}{
		"it boots a kernel":             {xorriso: xorriso, qemu: boots, says: "KVM: yes"},
		"the node is made":              {device: absent, mknod: `touch "$3"`, xorriso: xorriso, qemu: boots, says: "KVM: yes"},
		"no node, and none can be made": {device: absent, says: slow + "the container has no /dev/kvm and may not make it (give it the device, or the capability MKNOD)"},
		"the host has none":             {device: socket, says: slow + "this host offers no KVM (switched off in its firmware, or a VM without nested virtualisation)"},
		"the container may not":         {device: forbidden, says: slow + `Docker does not let the container open /dev/kvm (give it device_cgroup_rules "c 10:232 rwm")`},
		"another reason":                {device: folder, says: slow + "/dev/kvm does not open: Is a directory"},
		"no ISO":                        {noISO: true, says: slow + "there is no kernel in the missing boot.iso to try it with"},
		"no kernel in the ISO":          {says: slow + "there is no kernel in STORAGE/boot.iso to try it with"},
		"QEMU refuses":                  {xorriso: xorriso, qemu: "echo 'qemu: no vcpu' >&2; echo more >&2; exit 1", says: slow + "QEMU cannot use it: qemu: no vcpu"},
		"the kernel hangs": {
			xorriso: xorriso, qemu: "echo 'qemu: terminating on signal 15' >&2; exit 1",
			says: slow + "this host has /dev/kvm, but a Linux kernel does not start under it (tried for 20 seconds)",
		},
		"qemux/qemu on a CPU without it": {env: []string{"OSB_PROC=qemu/status.sh", "OSB_CPUINFO=/dev/null", "STATUS_DIR="}, says: slow + "the CPU shows neither vmx nor svm"},
		"an arm64 host":                  {machine: "aarch64", says: slow + "this host is an arm64 one and the VM is not; compose.arm64.yaml runs an arm64 VM"},
		"N":                              {env: []string{"KVM=off"}, says: slow + "KVM=N is set"},
		"Y":                              {env: []string{"KVM=Y"}, says: "KVM: yes (KVM=Y is set; not tried)"},
		"Y without it": {
			env: []string{"KVM=yes"}, device: absent, status: 88,
			says:  "KVM: not usable, but KVM=Y is set: the container has no /dev/kvm and may not make it (give it the device, or the capability MKNOD). Leave KVM empty to do without.",
			state: "ended KVM is not usable, but KVM=Y is set: the container has no /dev/kvm and may not make it (give it the device, or the capability MKNOD)",
		},
		"neither": {
			env: []string{"KVM=perhaps"}, status: 64, says: "KVM=perhaps is not understood: Y, N, or empty to find out",
			state: "ended KVM=perhaps is not understood: Y, N, or empty to find out",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			boot := iso(true, false)
			if tt.noISO {
				boot = nil
			}
			m := newMachine(t, boot, tt.qemu)
			for program, script := range map[string]string{
				"uname": "echo " + cmp.Or(tt.machine, "x86_64"), "mknod": cmp.Or(tt.mknod, "exit 1"), "xorriso": cmp.Or(tt.xorriso, "exit 1"),
			} {
				if err := os.WriteFile(filepath.Join(m.bin, program), []byte("#!/bin/bash\n"+script+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			if tt.device == nil {
				tt.device = opens
			}
			// Root may open whatever is there, unless it gives that up.
			program := []string{"bash", "-euo", "pipefail", "-c", `. qemu/start-hook.sh; echo "then KVM is $KVM"`}
			if os.Getuid() == 0 {
				program = append([]string{"setpriv", "--bounding-set", "-dac_override,-dac_read_search"}, program...)
			}
			out, status := m.output(append([]string{"KVM=", "OSB_LIB=qemu", "OSB_KVM=" + tt.device(t)}, tt.env...), program...)
			want := strings.ReplaceAll(tt.says, "STORAGE", m.storage) + "\n"
			if tt.status == 0 {
				want += "then KVM is " + map[bool]string{true: "Y", false: "N"}[strings.HasPrefix(want, "KVM: yes")] + "\n"
			}
			if diff := gocmp.Diff(want, out); diff != "" || status != tt.status {
				t.Errorf("status %d, want %d; it says (-want +got):\n%s", status, tt.status, diff)
			}
			if diff := gocmp.Diff(tt.state, m.state()); diff != "" {
				t.Errorf("the sidecar is told (-want +got):\n%s", diff)
			}
		})
	}
}

// Devices, as they open or don't.

func opens(t *testing.T) string { return write(t, filepath.Join(t.TempDir(), "kvm"), nil) }

func absent(t *testing.T) string { return filepath.Join(t.TempDir(), "kvm") }

func folder(t *testing.T) string { return t.TempDir() }

func forbidden(t *testing.T) string {
	file := opens(t)
	if err := os.Chmod(file, 0); err != nil {
		t.Fatal(err)
	}
	return file
}

// socket is a file without a device behind it, as a kernel without KVM has it.
func socket(t *testing.T) string {
	dir, err := os.MkdirTemp("", "k") //nolint:usetesting // a short name: it is a socket's
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "kvm")
	listener, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return path
}
