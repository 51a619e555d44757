package vmimage

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const debian = "debian/rootfs/usr/lib/osbuilder/"

// programs makes a folder of programs that are these scripts.
func programs(t *testing.T, scripts map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, script := range scripts {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// A disk that is absent, another's or damaged is left alone, and the note of it
// is what the sidecar tells.
func TestDebianNotesWhatBecameOfTheDataDisk(t *testing.T) {
	for name, tt := range map[string]struct {
		serial, blkid, e2fsck string
		note                  string
	}{
		"absent":  {"", "", "", "none: there is none: give QEMU a virtio-blk disk with serial=builderdata"},
		"another": {"a-disk", "", "", "none: there is none: give QEMU a virtio-blk disk with serial=builderdata"},
		"foreign": {
			"builderdata", "echo LABEL=photos; echo TYPE=ext4", "",
			"none: /dev/vdz is neither blank nor the builder's (LABEL=photos TYPE=ext4 ): it was left alone; give the VM another disk, or wipe this one yourself",
		},
		"damaged": {
			"builderdata", "echo LABEL=osbuilder; echo TYPE=ext4", "echo broken; exit 8",
			"none: /dev/vdz is damaged and could not be repaired: it was left alone; save what you need, then wipe it",
		},
	} {
		t.Run(name, func(t *testing.T) {
			sys, run := t.TempDir(), filepath.Join(t.TempDir(), "run")
			if tt.serial != "" {
				if err := os.Mkdir(filepath.Join(sys, "vdz"), 0o755); err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(sys, "vdz", "serial"), []byte(tt.serial))
				write(t, filepath.Join(sys, "vdz", "size"), []byte("2097152\n"))
			}
			bin := programs(t, map[string]string{
				"blkid": tt.blkid, "e2fsck": tt.e2fsck,
				// None of these may be reached.
				"mkfs.ext4": `echo "FORMATTED $*"`, "mount": `echo "MOUNTED $*"; exit 1`,
			})
			cmd := exec.CommandContext(t.Context(), "bash", debian+"data-disk", "mount")
			cmd.Env = []string{"PATH=" + bin + ":/usr/bin:/bin", "RUN_DIR=" + run, "SYS_BLOCK=" + sys}
			out, err := cmd.CombinedOutput()
			if err == nil || strings.Contains(string(out), "ED /") {
				t.Errorf("%v: %s", err, out)
			}
			note, err := os.ReadFile(filepath.Join(run, "store"))
			if string(note) != tt.note+"\n" {
				t.Errorf("noted %q, want %q (%v)", note, tt.note, err)
			}
			if said := strings.TrimPrefix(tt.note, "none: "); !strings.Contains(string(out), "osbuilder: data disk: "+said+"\n") {
				t.Errorf("the console says: %s", out)
			}
		})
	}
}

// The console says, once, that nobody gives an address.
func TestTheConsoleSaysThatThereIsNoAddress(t *testing.T) {
	dir := t.TempDir()
	console := filepath.Join(dir, "console")
	bin := programs(t, map[string]string{"ip": "", "awk": ""})
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Env = []string{"PATH=" + bin + ":/usr/bin:/bin", "CONSOLE=" + console, "RUN_DIR=" + dir, "interface=eth0"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", args, err, out)
		}
		return string(out)
	}
	for _, event := range []string{"deconfig", "leasefail", "leasefail"} {
		run("sh", debian+"dhcp-event", event)
	}
	text, err := os.ReadFile(console)
	if want := "osbuilder: the VM has no network address: nobody answers its requests by DHCP\n"; string(text) != want {
		t.Errorf("Debian says %q, want %q (%v)", text, want, err)
	}
	if got := run("bash", "nixos/scripts/address.sh"); got != "osbuilder: the VM has no network address\n" {
		t.Errorf("NixOS says %q", got)
	}
}
