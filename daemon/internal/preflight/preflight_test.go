package preflight

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const tib = 1 << 40

// defaults are those of compose.yaml, on a host that has enough of everything.
func defaults() (Asked, Found) {
	room := Disk{Free: 400 * gib, Size: 500 * gib}
	return Asked{VMs: []VM{{Name: "vm", Image: "qemux/qemu:7.48", Cores: "4", Memory: "16G", Disk: "128G"}}, JobTimeout: 6 * time.Hour},
		Found{Memory: 31 * gib, MemoryFree: 28 * gib, Cores: 8, Output: room, Volumes: room, OneDisk: true, KVM: true, Arch: "amd64", Fresh: true}
}

// Each case is what differs from enough of everything: what is said, by what it
// is about, and the lines for .env.
func TestCheck(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*Asked, *Found)
		then map[string]string // a part of what is said
		set  string
	}{
		{"all is there", func(*Asked, *Found) {}, nil, ""},
		{
			"16 GB on a host of 8 GB", func(_ *Asked, f *Found) { f.Memory, f.MemoryFree = 7900*mib, 6*gib },
			map[string]string{"memory": "at most 7.2 GiB, and the host keeps little"},
			"RAM_SIZE=4G",
		},
		{
			"16 GB on a host of 16 GB", func(_ *Asked, f *Found) { f.Memory, f.MemoryFree = 15900*mib, 13*gib },
			map[string]string{"memory": "at most 15.0 GiB"},
			"RAM_SIZE=9G",
		},
		{
			"16 GB on a host of 4 GB", func(_ *Asked, f *Found) { f.Memory, f.MemoryFree = 3900*mib, 3*gib },
			map[string]string{"memory": "at most 3.3 GiB"},
			"RAM_SIZE=2G",
		},
		{
			"16 GB on a host of 2 GB", func(_ *Asked, f *Found) { f.Memory, f.MemoryFree = 1900*mib, 1*gib },
			map[string]string{"memory": "too small for NixOS configurations"},
			"RAM_SIZE=1140M",
		},
		{
			"16 GB on a host of 1 GB", func(_ *Asked, f *Found) { f.Memory, f.MemoryFree = 900*mib, 300*mib },
			map[string]string{"memory": "No VM starts"},
			"",
		},
		{
			"enough memory, in use by others", func(_ *Asked, f *Found) { f.MemoryFree = 10 * gib },
			map[string]string{"memory": "Less is free now: the VM gets what is free when it starts, about 9.5 GiB"},
			"RAM_SIZE=6G",
		},
		{"the same, when it may be the VM that uses it", func(_ *Asked, f *Found) { f.MemoryFree, f.Fresh = 10*gib, false }, nil, ""},
		{
			"a VM of 1 GB", func(a *Asked, _ *Found) { a.VMs[0].Memory = "1024M" },
			map[string]string{"memory": "less than 2 GiB"},
			"RAM_SIZE=16G",
		},
		{
			"a VM of 100 MB", func(a *Asked, _ *Found) { a.VMs[0].Memory = "100M" },
			map[string]string{"memory": "does not start: it needs 512 MiB"},
			"RAM_SIZE=16G",
		},
		{
			"memory that is none", func(a *Asked, _ *Found) { a.VMs[0].Memory = "lots" },
			map[string]string{"memory": "does not start: RAM_SIZE=lots"},
			"RAM_SIZE=16G",
		},
		{"half of what there is", func(a *Asked, _ *Found) { a.VMs[0].Memory, a.VMs[0].Cores, a.VMs[0].Disk = "half", "max", "max" }, nil, ""},
		{
			"two VMs that are too many", func(a *Asked, _ *Found) { a.VMs = append(a.VMs, a.VMs[0]) },
			map[string]string{"memory": "at most 30.5 GiB"},
			"RAM_SIZE=9G",
		},
		{"4 cores of 2", func(_ *Asked, f *Found) { f.Cores = 2 }, map[string]string{"cores": "The VM gets 2."}, "CPU_CORES=2"},
		{"cores that are none", func(a *Asked, _ *Found) { a.VMs[0].Cores = "0" }, map[string]string{"cores": "does not start: CPU_CORES=0"}, "CPU_CORES=8"},
		{
			"128 GB on a small disk", func(_ *Asked, f *Found) { f.Volumes.Free = 40 * gib },
			map[string]string{"disk of the VM": "It may grow to 128.0 GiB and Docker's has 40.0 GiB free"},
			"DISK_SIZE=20G",
		},
		{
			"128 GB on a disk with little room", func(_ *Asked, f *Found) { f.Volumes.Free, f.Output.Free = 9*gib, 9*gib },
			map[string]string{"disk of the VM": "stands still until there is room", "disk of Docker's volumes": "about 10 GiB"},
			"DISK_SIZE=8G",
		},
		{"the same, and the VM has its disk already", func(_ *Asked, f *Found) { f.Volumes.Free, f.Fresh = 9*gib, false }, nil, ""},
		{
			"a full disk", func(_ *Asked, f *Found) { f.Volumes.Free, f.Output.Free, f.Fresh = 0, 0, false },
			map[string]string{"disk of Docker's volumes": "docker system df", "disk of output/": "OUTPUT_DIR"},
			"",
		},
		{
			"a full disk at the first start", func(_ *Asked, f *Found) { f.Volumes.Free = 0 },
			map[string]string{"disk of Docker's volumes": "docker system df", "disk of the VM": "0 MiB free"},
			"DISK_SIZE=1G",
		},
		{
			"a disk that is none", func(a *Asked, _ *Found) { a.VMs[0].Disk = "large" },
			map[string]string{"disk of the VM": "does not start: DISK_SIZE=large is no size"},
			"DISK_SIZE=128G",
		},
		{"a disk without a unit", func(a *Asked, _ *Found) { a.VMs[0].Disk = "128" }, nil, ""},
		{
			"a disk of nothing", func(a *Asked, _ *Found) { a.VMs[0].Disk = "10M" },
			map[string]string{"disk of the VM": "1 GiB or more"},
			"DISK_SIZE=128G",
		},
		{
			"no KVM", func(_ *Asked, f *Found) { f.KVM = false },
			map[string]string{"KVM": "emulated: it works, several times slower. KVM wants"},
			"JOB_TIMEOUT=24h",
		},
		{"no KVM, and time enough", func(a *Asked, f *Found) { f.KVM, a.JobTimeout = false, 0 }, map[string]string{"KVM": "emulated"}, ""},
		{"KVM asked for and absent", func(a *Asked, f *Found) { f.KVM, a.VMs[0].KVM = false, "Y" }, map[string]string{"KVM": "does not start"}, "KVM="},
		{"KVM refused", func(a *Asked, _ *Found) { a.VMs[0].KVM = "n" }, nil, ""},
		{"KVM misspelt", func(a *Asked, _ *Found) { a.VMs[0].KVM = "maybe" }, map[string]string{"KVM": "KVM=maybe is not understood"}, "KVM="},
		{
			"a foreign processor", func(_ *Asked, f *Found) { f.Arch = "arm64" },
			map[string]string{"KVM": "many times slower"},
			"COMPOSE_FILE=compose.yaml:compose.arm64.yaml",
		},
		{"an arm64 host with its own VM", func(a *Asked, f *Found) { f.Arch, a.VMs[0].Image = "arm64", "qemux/qemu-arm:7.48" }, nil, ""},
		{
			"all too small", func(_ *Asked, f *Found) {
				f.Memory, f.MemoryFree, f.Cores, f.Volumes.Free, f.KVM = 7900*mib, 6*gib, 2, 60*gib, false
			},
			map[string]string{"memory": "at most", "cores": "gets 2", "disk of the VM": "may grow", "KVM": "emulated"},
			"RAM_SIZE=4G CPU_CORES=2 DISK_SIZE=30G JOB_TIMEOUT=24h",
		},
		{"nothing can be told", func(_ *Asked, f *Found) { *f = Found{KVM: true, Arch: "amd64", Fresh: true} }, nil, ""},
		{"nothing is asked for", func(a *Asked, _ *Found) { a.VMs = nil }, nil, ""},
		{"a builder of one's own", func(a *Asked, _ *Found) { a.VMs[0] = VM{Name: "vm"} }, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, f := defaults()
			tt.edit(&a, &f)
			lines := Check(a, f)
			var set []string
			for _, l := range lines {
				set = append(set, l.Set...)
				if (l.Then == "") != (tt.then[l.What] == "") || !strings.Contains(l.Then, tt.then[l.What]) {
					t.Errorf("%s: %q, want %q", l.What, l.Then, tt.then[l.What])
				}
				if l.Has == "" || len(l.Set) > 0 && l.Then == "" {
					t.Errorf("%+v", l)
				}
			}
			if got := strings.Join(set, " "); got != tt.set {
				t.Errorf(".env: %s, want %s", got, tt.set)
			}
		})
	}
}

// Whoever sets what is said is told nothing more.
func TestWhatIsSaidHelps(t *testing.T) {
	a, f := defaults()
	for _, memory := range []int64{4000, 5000, 7900, 12_000, 15_900, 64_000} {
		for _, free := range []int64{12, 40, 129, 1000} {
			for _, vms := range []int{1, 2} {
				a.VMs, f.Cores, f.KVM = []VM{a.VMs[0]}, 2, false
				a.VMs[0].Memory, a.VMs[0].Cores, a.VMs[0].Disk, a.JobTimeout = "16G", "4", "128G", 6*time.Hour
				for len(a.VMs) < vms {
					a.VMs = append(a.VMs, a.VMs[0])
				}
				f.Memory, f.MemoryFree = memory*mib, memory*mib*9/10
				f.Volumes = Disk{Free: free * gib, Size: 2 * tib}
				for _, l := range Check(a, f) {
					for _, s := range l.Set {
						for i := range a.VMs {
							switch variable, value, _ := strings.Cut(s, "="); variable {
							case "RAM_SIZE":
								a.VMs[i].Memory = value
							case "CPU_CORES":
								a.VMs[i].Cores = value
							case "DISK_SIZE":
								a.VMs[i].Disk = value
							case "JOB_TIMEOUT":
								a.JobTimeout = 24 * time.Hour
							default:
								t.Fatal(s)
							}
						}
					}
				}
				for _, l := range Check(a, f) {
					if tooSmall := vms == 2 && memory < 6000; len(l.Set) > 0 && !tooSmall {
						t.Errorf("%d MiB, %d GiB, %d VMs: set as said, and yet %+v", memory, free, vms, l)
					}
				}
			}
		}
	}
}

func TestAmount(t *testing.T) {
	for v, want := range map[string]int64{
		"16G": 16 * gib, "16g": 16 * gib, "16GB": 16 * gib, "16 G": 16 * gib, "512M": 512 * mib, "1.5T": 3 * tib / 2,
		"4": 4 * gib, "1.5": 3 * gib / 2, "129.5": 129*gib + gib/2, "130": 130 * mib, "2048": 2 * gib, "8192M": 8 * gib, "max": 8 * gib, "Half": 4 * gib, "0G": 0,
		"": -1, "G": -1, "B": -1, "-1G": -1, "1e3G": -1, "1..5G": -1, "16X": -1, "lots": -1, "99999999999999G": -1, "99999999999999": -1, "16i": -1,
	} {
		got, ok := amount(v, 8*gib, true)
		if !ok {
			got = -1
		}
		if got != want {
			t.Errorf("%q is %d bytes, want %d", v, got, want)
		}
	}
	for v, want := range map[string]int64{"128": 128 * gib, "1.5": 3 * gib / 2, "2048": 2 * tib, "64M": 64 * mib} {
		if got, ok := amount(v, 0, false); !ok || got != want {
			t.Errorf("a disk of %q is %d bytes, want %d", v, got, want)
		}
	}
}

func FuzzAmount(f *testing.F) {
	for _, seed := range []string{"16G", "", "1.5TB", "max", "99999999T", "\x00", "G"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, v string) {
		if n, ok := amount(v, gib, true); ok && n < 0 {
			t.Errorf("%q is %d", v, n)
		}
	})
}

func TestText(t *testing.T) {
	a, f := defaults()
	f.Memory, f.MemoryFree, f.Cores, f.KVM = 7900*mib, 6*gib, 2, false
	want := `    memory                    7.7 GiB, 6.0 GiB free; asked for: RAM_SIZE=16G
                              ! The VM gets what is free when it starts, at most 7.2 GiB, and the host keeps little.
    cores                     2; asked for: CPU_CORES=4
                              ! The VM gets 2.
    disk of output/           400.0 GiB free of 500.0 GiB
    disk of Docker's volumes  400.0 GiB free of 500.0 GiB, the same as that of output/
    disk of the VM            grows on that of Docker's volumes; what is free in it, the VM says when it is up; asked for: DISK_SIZE=128G
    KVM                       no device
                              ! The VM is emulated: it works, several times slower. KVM wants virtualisation switched on in the host's firmware, or nested virtualisation if the host is a VM itself. A large configuration can then take longer than JOB_TIMEOUT=6h.
    For this machine, in .env:
        RAM_SIZE=4G
        CPU_CORES=2
        JOB_TIMEOUT=24h
`
	if diff := cmp.Diff(want, Text(Check(a, f))); diff != "" {
		t.Error(diff)
	}
}

func TestLook(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"meminfo": "MemTotal:        8000000 kB\nMemFree: 1 kB\nMemAvailable:    5000000 kB\nodd\n",
		"misc":    " 57 userfaultfd\n232 kvm\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f := look(dir, dir, dir)
	if f.Memory != 8000000<<10 || f.MemoryFree != 5000000<<10 || !f.KVM || f.Cores != runtime.NumCPU() || !f.OneDisk {
		t.Errorf("%+v", f)
	}
	if f.Output.Size <= 0 || f.Output.Free < 0 || f.Output.Free > f.Output.Size || f.Output != f.Volumes {
		t.Errorf("disks %+v, %+v", f.Output, f.Volumes)
	}
	none := look(filepath.Join(dir, "none"), filepath.Join(dir, "none"), filepath.Join(dir, "none"))
	if want := (Found{Cores: runtime.NumCPU(), Arch: runtime.GOARCH}); none != want {
		t.Errorf("of nothing it tells %+v", none)
	}
	if f := Look(dir, dir, "osbuilder.db"); !f.Fresh || f.Memory == 0 {
		t.Errorf("%+v", f)
	}
}
