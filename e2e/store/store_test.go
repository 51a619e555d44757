//go:build e2e

// Package store tests the script that gives the NixOS VM its Nix store, in real
// QEMU guests: Debian's kernel and tools, from the ISO of the Debian flavour,
// and images whose closures are made here. The script is the committed one,
// unchanged.
//
// OSBUILDER_E2E_IMAGES says what the names of our container images begin with:
// those of the Debian flavour (boot.iso), of its root file system (Nix and
// mksquashfs) and of QEMU are used. Nothing needs a network.
package store

import (
	"bytes"
	"crypto/sha256"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bootLimit is generous: no KVM, on a machine shared with others. A boot takes
// about ten seconds.
const bootLimit = 10 * time.Minute

const mib = 1 << 20

// What a good boot says, in the words of testdata/main.
var (
	persistent = []string{"start", "0", "mounts", "/data /nix /nix/store /nexus_bootstrap /tmp /var/tmp "}
	verified   = []string{"store", "1", "verify", "0 0 1", "requisites", "0", "odd", "0"}
	inRAM      = []string{"mounts", "", "gc", ""}
)

func stopped(version string) []string { return []string{"stop", "0", "ext4", "0", "system", version} }

func image(version string) disk { return disk{"image" + version, "image" + version, true} }

// data is the builder's disk.
func data(file string) disk { return disk{file: file, serial: "builderdata"} }

func TestStore(t *testing.T) {
	b := newBench(t)
	for name, test := range map[string]func(*testing.T, *bench){
		"life": testLife, "killed": testKilled, "full": testFull, "choice": testChoice,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, b)
		})
	}
}

// testLife is what a data disk goes through, one boot after the other.
func testLife(t *testing.T, b *bench) {
	step := func(name string, f func(*testing.T)) {
		if !t.Run(name, f) {
			t.FailNow() // the next one begins with this one's disk
		}
	}

	step("blank disk", func(t *testing.T) {
		b.resize(t, "data", 512*mib)
		o := b.run(t, boot{disks: []disk{image("1"), data("data")}, do: `
			boot_image 1; start; verify
			build_job 1
			echo a former boot >/tmp/file
			echo request >/nexus_bootstrap/pipe_in
			stop`})
		o.want(t, persistent, verified, stopped("1"))
		o.want(t, []string{"state", "persistent: /dev/vdc"})
		o.says(t, "osbuilder: store: copying 22 paths")
		b.wantClean(t, "data")
	})

	step("second boot", func(t *testing.T) {
		o := b.run(t, boot{disks: []disk{image("1"), data("data")}, do: `
			boot_image 1; start; verify
			dmesg | grep -i 'recover'
			value job "$(nix-store --check-validity /nix/var/nix/gcroots/job; echo $?)"
			value tmp "$(ls /tmp /var/tmp | tr '\n' ' ')"
			value pipe "$(cat /nexus_bootstrap/pipe_in)"
			fill_disk; stop`})
		o.want(t, persistent, verified, stopped("1"))
		o.want(t, []string{"job", "0", "tmp", "/tmp:  /var/tmp: ", "pipe", "request", "free", "0"})
		o.silent(t, "copying", "recover", "needs repair")
		b.wantClean(t, "data")
	})

	// No block is free. What is there of the image, and a job's, must stay.
	step("new image version on a full disk", func(t *testing.T) {
		o := b.run(t, boot{disks: []disk{image("2"), data("data")}, do: `
			boot_image 2; start; verify
			value job "$(cmp /nix/var/nix/gcroots/job/data /nix/var/nix/gcroots/job/own/data; echo $?)"
			value valid "$(nix-store -qR /nix/var/nix/gcroots/job | xargs nix-store --check-validity; echo $?)"
			value pins "$(ls -d /nix/var/nix/gcroots/image 2>/dev/null)"
			rm /data/ballast
			stop`})
		o.want(t, persistent, verified, stopped("2"))
		o.want(t, []string{"job", "0", "valid", "0", "pins", ""})
		o.says(t, "collecting garbage")
		o.says(t, "osbuilder: store: copying 2 paths") // the parts are shared
		b.wantClean(t, "data")
	})

	if !everything {
		return
	}

	step("grown disk", func(t *testing.T) {
		b.resize(t, "data", 1024*mib)
		o := b.run(t, boot{disks: []disk{image("2"), data("data")}, do: `
			boot_image 2; start
			value size $(($(df --output=size -B 1M /data | tail -n 1) > 900))
			# Without the job nothing needs the old image any more.
			rm /nix/var/nix/gcroots/job
			nix-store --gc >/dev/null 2>&1
			value old "$(ls /nix/store | grep -c -e -system-1 -e own-1)"
			verify; stop`})
		o.want(t, persistent, verified, stopped("2"))
		o.want(t, []string{"size", "1", "old", "0"})
		if gc := o.values["gc"]; !strings.HasPrefix(gc, "min-free = 6") {
			t.Errorf("the limits are %q, want a sixteenth of the disk first", gc)
		}
		b.wantClean(t, "data")
	})

	step("damaged disk", func(t *testing.T) {
		o := b.run(t, boot{disks: []disk{image("2"), data("data")}, do: `
			boot_image 2
			part=$(echo /nix/.ro-store/*-part-3)
			debugfs -w -R "clri /nix/store/${part##*/}" /dev/vdc
			debugfs -w -R "ssv state 2" /dev/vdc # seen to be in error
			start; verify; stop`})
		o.want(t, persistent, verified, stopped("2"))
		o.says(t, "osbuilder: store: /dev/vdc was repaired")
		o.says(t, "osbuilder: store: copying 1 paths")
		b.wantClean(t, "data")
	})

	step("killed while running", func(t *testing.T) {
		b.run(t, boot{disks: []disk{image("2"), data("data")}, kill: "power fails", do: `
			boot_image 2; start
			build_job 2
			echo power fails; sleep 100`})
		o := b.run(t, boot{disks: []disk{image("2"), data("data")}, do: `
			boot_image 2; start; verify
			value job "$(nix-store --check-validity /nix/var/nix/gcroots/job; echo $?)"
			stop`})
		o.want(t, persistent, verified, stopped("2"))
		o.want(t, []string{"job", "0"})
		b.wantClean(t, "data")
	})
}

// testKilled lets the power fail at each point of seeding, each time on what the
// time before left on the disk; at last a boot must make it good.
func testKilled(t *testing.T, b *bench) {
	const marker = "power fails"
	// A tool that hangs before it does its work.
	const hang = "#!/bin/bash\necho " + marker + " >/dev/console; sleep 100\n"
	b.resize(t, "killed", 512*mib)
	for _, test := range []struct{ name, tool, text string }{
		{"in the middle of copying", "unsquashfs", `#!/bin/bash
/usr/bin/unsquashfs "$@" &
until (($(find /data/seeding -type f 2>/dev/null | wc -l) > 100)); do sleep 0.1; done
kill -STOP $!; sync; echo ` + marker + ` >/dev/console; sleep 100
`},
		{"before it is synced", "sync", hang},
		{"half in place", "mv", `#!/bin/bash
[[ $1 == -t ]] || exec /usr/bin/mv "$@"
head -n 11 /run/osbuilder/store.work/names | xargs /usr/bin/mv -t /data/nix/store --
sync; echo ` + marker + ` >/dev/console; sleep 100
`},
		{"before it is registered", "nix-store", hang},
		{"after it is registered", "nix-store", "#!/bin/bash\n/usr/bin/nix-store \"$@\"\necho " + marker + " >/dev/console; sleep 100\n"},
	} {
		if !everything && test.name != "half in place" {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			o := b.run(t, boot{
				disks: []disk{image("1"), data("killed")}, wrap: map[string]string{test.tool: test.text},
				kill: marker, do: "boot_image 1; start",
			})
			o.says(t, "osbuilder: store: copying 22 paths")
		})
	}
	o := b.run(t, boot{disks: []disk{image("1"), data("killed")}, do: `
		boot_image 1; start; verify; stop
		mount -o ro /dev/vdc /data; value left "$(ls /data | tr '\n' ' ')"; umount /data`})
	o.want(t, persistent, verified, stopped("1"))
	o.want(t, []string{"left", "lost+found nexus_bootstrap nix tmp "})
	b.wantClean(t, "killed")
}

// testFull: the disk is too small for the image, which is known before or met
// while copying; the VM stays in RAM, and takes the disk once there is room.
func testFull(t *testing.T, b *bench) {
	for _, test := range []struct {
		name string
		wrap map[string]string
	}{
		{"known before", nil},
		{"met while copying", map[string]string{"df": "#!/bin/bash\necho; echo 9999999999\n"}},
	} {
		if !everything && test.wrap == nil {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			b.resize(t, "full", 64*mib)
			o := b.run(t, boot{disks: []disk{image("1"), data("full")}, wrap: test.wrap, do: `
				boot_image 1; start
				value system "$(cat /run/current-system/own/version)"
				value ext4 "$(grep -c ' ext4 ' /proc/mounts)"
				nix-store --load-db </nix/store/nix-path-registration
				nix-store --verify >/dev/null 2>&1; value verify "$?"`})
			o.want(t, inRAM, []string{"start", "1", "system", "1", "ext4", "0", "verify", "0"})
			if !strings.HasPrefix(o.values["state"], "ephemeral: ") {
				t.Errorf("the state is %q, want ephemeral with a reason", o.values["state"])
			}
			o.says(t, "everything is in RAM")
			b.wantClean(t, "full")
		})
	}
	t.Run("room at last", func(t *testing.T) {
		b.resize(t, "full", 512*mib)
		o := b.run(t, boot{disks: []disk{image("1"), data("full")}, do: "boot_image 1; start; verify; stop"})
		o.want(t, persistent, verified, stopped("1"))
		b.wantClean(t, "full")
	})
}

// testChoice: which disk is taken, and that no other is touched.
func testChoice(t *testing.T, b *bench) {
	const size = 80 * mib
	foreign := bytes.Repeat([]byte("somebody's data\n"), size/16)
	for _, test := range []struct {
		name  string
		disks []disk
		bytes map[string][]byte // of the disks that stay as they are
		state string
	}{
		{
			name: "none", state: "ephemeral: no data disk",
		},
		{
			name: "foreign", disks: []disk{data("foreign")}, bytes: map[string][]byte{"foreign": foreign},
			state: "ephemeral: /dev/vdc is neither blank nor the builder's (unknown data): it was left alone; give the VM another disk, or wipe this one yourself",
		},
		{
			name: "foreign behind zeros", disks: []disk{{file: "behind"}},
			bytes: map[string][]byte{"behind": append(make([]byte, 2*mib), foreign...)},
			state: "ephemeral: no data disk: vdc was left alone, since it is neither blank nor the builder's",
		},
		{
			name: "two blank", disks: []disk{{file: "blank1"}, {file: "blank2"}},
			bytes: map[string][]byte{"blank1": make([]byte, size), "blank2": make([]byte, size)},
			state: "ephemeral: several blank disks (vdc vdd): none was taken; give the one for the builder the serial number builderdata",
		},
		{
			name: "two blank, one named", disks: []disk{{file: "other"}, data("named")},
			bytes: map[string][]byte{"other": make([]byte, size)},
			state: "persistent: /dev/vdd",
		},
		{
			name: "too small", disks: []disk{data("small")}, bytes: map[string][]byte{"small": make([]byte, 32*mib)},
			state: "ephemeral: /dev/vdc is blank, but too small: 32 MiB, and 64 MiB are the least",
		},
	} {
		if !everything && test.name != "foreign" && test.name != "two blank, one named" {
			continue
		}
		t.Run(test.name, func(t *testing.T) {
			for _, d := range test.disks {
				b.resize(t, d.file, 512*mib)
			}
			for name, data := range test.bytes {
				b.write(t, name, data)
			}
			o := b.run(t, boot{disks: append([]disk{image("1")}, test.disks...), do: "boot_image 1; start"})
			o.want(t, []string{"start", "0", "state", test.state})
			if strings.HasPrefix(test.state, "ephemeral") {
				o.want(t, inRAM)
			}
			for name, want := range test.bytes {
				got, err := os.ReadFile(filepath.Join(b.dir, name))
				if err != nil {
					t.Fatal(err)
				}
				if sha256.Sum256(got) != sha256.Sum256(want) {
					t.Errorf("%s was written to", name)
				}
			}
		})
	}
}

// newBench fetches kernel, initrd and ISO out of the container images, and makes
// the stores of two versions of the VM's image.
func newBench(t *testing.T) *bench {
	t.Helper()
	images := os.Getenv("OSBUILDER_E2E_IMAGES")
	if images == "" {
		t.Fatal("OSBUILDER_E2E_IMAGES is not set: run `make test`")
	}
	script, err := os.ReadFile("../../vmimage/nixos/store/store")
	if err != nil {
		t.Fatal(err)
	}
	testdata, err := filepath.Abs("testdata")
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{dir: t.TempDir(), qemu: images + "/qemu", script: script}
	if err := os.Chmod(b.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	id := docker(t, "create", images+"/vmimage-debian")
	defer docker(t, "rm", id)
	docker(t, "cp", id+":/image/boot.iso", filepath.Join(b.dir, "boot.iso"))
	docker(t, "run", "--rm", "--network", "none", "--volume", b.dir+":/guest", "--entrypoint", "xorriso", b.qemu,
		"-osirrox", "on", "-indev", "/guest/boot.iso", "-extract", "/live/vmlinuz", "/guest/vmlinuz",
		"-extract", "/live/initrd", "/guest/initrd")
	t.Log(docker(t, "run", "--rm", "--network", "none", "--volume", testdata+":/testdata:ro", "--volume", b.dir+":/guest",
		images+"/vm-rootfs", "bash", "/testdata/make-images", "/guest"))
	return b
}

// docker runs a docker command that must work.
func docker(t *testing.T, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	cmd := exec.CommandContext(t.Context(), "docker", args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("docker %v: %v\n%s", args, err, &stderr)
	}
	return strings.TrimSpace(string(out))
}
