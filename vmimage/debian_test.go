package vmimage

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/internal/testenv"
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

// What a former boot left of builds and in /tmp is moved away, not copied, on a
// full disk too; each time to a place of its own, for what is there may be half
// removed. Under the script is a root of its own with a real mount for /data.
func TestDebianSetsAsideWhatAFormerBootLeft(t *testing.T) {
	const enter = `set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$ROOT"
cd "$ROOT"
mkdir -p etc data nix nexus_bootstrap tmp var/tmp stubs sys/vdz
echo nixbld:x:30000: >etc/group
for dir in bin sbin lib lib64 usr dev proc; do
  if [ -L "/$dir" ]; then cp -P "/$dir" .; elif [ -d "/$dir" ]; then mkdir "$dir"; mount --rbind "/$dir" "$dir"; fi
done
mount --bind "$STUBS" stubs
cp "$SCRIPT" data-disk
echo builderdata >sys/vdz/serial
echo 2097152 >sys/vdz/size
mount -t tmpfs -o size=1m tmpfs data
for boot in 1 2; do
  rm -f data/fill
  mkdir -p data/nix/var/nix/builds/dead data/tmp
  echo "$boot" >data/nix/var/nix/builds/dead/file
  echo "$boot" >data/tmp/file
  ls -i data/nix/var/nix/builds/dead/file data/tmp/file | cut -d ' ' -f 1 >want
  cat /dev/zero >data/fill 2>/dev/null || :
  chroot . /bin/bash /data-disk mount >said 2>&1 || { cat said; exit 1; }
  find data/trash -name file -exec grep -lx "$boot" {} + | xargs ls -i | cut -d ' ' -f 1 | sort >got
  sort want | diff - got
  [ -d data/nix/var/nix/builds ] && [ -z "$(ls -A data/nix/var/nix/builds data/tmp | grep -v :)" ]
  umount tmp var/tmp nix nexus_bootstrap
done
`
	if out, err := exec.CommandContext(t.Context(), "unshare", "--mount", "true").CombinedOutput(); err != nil {
		testenv.Lacks(t, "no mounts of its own can be had here: %v: %s", err, out)
	}
	bin := programs(t, map[string]string{
		"blkid": "echo LABEL=osbuilder; echo TYPE=ext4", "e2fsck": "", "resize2fs": "",
		"mount": `[ "$2" = ext4 ] || exec /bin/mount "$@"`,
		"rm":    `[ "$*" = "-rf /data/trash" ] || exec /bin/rm "$@"`, // what is to be removed is looked at
	})
	script, err := filepath.Abs(debian + "data-disk")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "--mount", "sh", "-c", enter)
	cmd.Env = []string{
		"PATH=/stubs:/usr/sbin:/usr/bin:/sbin:/bin", "ROOT=" + t.TempDir(), "STUBS=" + bin, "SCRIPT=" + script,
		"RUN_DIR=/run", "SYS_BLOCK=/sys",
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
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
