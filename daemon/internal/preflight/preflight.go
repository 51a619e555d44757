// Package preflight holds what the VMs are given, by .env and the Compose
// project, against what this host has, and says what will happen where it is
// too small, with the lines for .env that fit.
//
// [Check] is pure; [Look] reads the host.
package preflight

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A VM is what one builder's service is given, as it stands in its environment.
type VM struct {
	Name, Image              string
	Cores, Memory, Disk, KVM string // CPU_CORES, RAM_SIZE, DISK_SIZE, KVM
}

// Asked is what the settings ask of this host.
type Asked struct {
	VMs        []VM
	JobTimeout time.Duration // 0: no limit
}

// A Disk is a file system, in bytes. Size is 0 where that can't be told.
type Disk struct{ Free, Size int64 }

// Found is what this host has, in bytes. What can't be told is 0.
type Found struct {
	Memory, MemoryFree int64
	Cores              int
	Output             Disk // of output/
	Volumes            Disk // of Docker's volumes, on which the VM's disk grows
	OneDisk            bool // the two are one
	KVM                bool // there is a device; whether it works, the VM's container tries
	Arch               string
	Fresh              bool // no VM was started here yet
}

// A Line is one fact about this host.
type Line struct {
	What  string   // memory, cores, …
	Has   string   // what the host has
	Asked string   // what the settings ask for; empty where they ask for nothing
	Then  string   // what will happen, and what to do; empty where all is well
	Set   []string // lines for .env that fit this host
}

const (
	mib = 1 << 20
	gib = 1 << 30

	// As vmimage/qemu and qemux/qemu have it.
	spareMemory = 512 * mib // that a VM leaves the host
	leastMemory = 512 * mib // below it a VM does not start
	leastDisk   = gib

	wiseMemory = 2 * gib  // below it Nix runs out when it evaluates a configuration
	wiseImage  = 4 * gib  // that an image can have
	wiseDisk   = 10 * gib // what a VM takes for one configuration, and some
)

// Check returns a line for each thing that counts, those that are fine too.
func Check(a Asked, f Found) []Line {
	lines := []Line{memory(a, f), cores(a, f), output(f), volumes(f), dataDisk(a, f), kvm(a, f)}
	for i := range lines {
		slices.Sort(lines[i].Set)
		lines[i].Set = slices.Compact(lines[i].Set)
	}
	return lines
}

// asked says what each VM is given of one thing.
func asked(a Asked, variable string, value func(VM) string) string {
	var all []string
	for _, vm := range a.VMs {
		if v := value(vm); v != "" {
			all = append(all, variable+"="+v)
		}
	}
	if compact := slices.Compact(slices.Clone(all)); len(compact) == 1 && len(all) > 1 {
		return fmt.Sprintf("%s, of each of %d VMs", compact[0], len(all))
	}
	return strings.Join(all, ", ")
}

func memory(a Asked, f Found) Line {
	l := Line{What: "memory", Has: "can't be told", Asked: asked(a, "RAM_SIZE", func(vm VM) string { return vm.Memory })}
	fitting := fittingMemory(f.Memory, len(a.VMs))
	var want int64
	for _, vm := range a.VMs {
		n, ok := amount(vm.Memory, f.MemoryFree, true)
		switch {
		case vm.Memory == "":
		case !ok:
			l.Then = fmt.Sprintf("The VM does not start: RAM_SIZE=%s is no amount of memory.", vm.Memory)
		case n < leastMemory && !relative(vm.Memory):
			l.Then = "The VM does not start: it needs 512 MiB or more."
		case n < wiseMemory && l.Then == "" && !relative(vm.Memory):
			l.Then = "Nix runs out of memory with less than 2 GiB."
		}
		if !relative(vm.Memory) {
			want += n
		}
	}
	if f.Memory > 0 {
		l.Has = fmt.Sprintf("%s, %s free", size(f.Memory), size(f.MemoryFree))
		switch {
		case l.Then != "":
		case f.Memory < leastMemory+spareMemory:
			l.Then = "No VM starts: it needs 512 MiB, and the host as much."
			return l
		case f.Memory < wiseMemory+spareMemory:
			l.Then = "Nix runs out of memory in a VM of less than 2 GiB: this host is too small for NixOS configurations."
		case want+spareMemory > f.Memory:
			l.Then = fmt.Sprintf("The VM gets what is free when it starts, at most %s, and the host keeps little.", size(f.Memory-spareMemory))
		case f.Fresh && want+spareMemory > f.MemoryFree:
			l.Then = fmt.Sprintf("Less is free now: the VM gets what is free when it starts, about %s.", size(max(0, f.MemoryFree-spareMemory)))
			fitting = fittingMemory(f.MemoryFree+spareMemory, len(a.VMs))
		}
	}
	if l.Then != "" && fitting != "" {
		l.Set = []string{"RAM_SIZE=" + fitting}
	}
	return l
}

// fittingMemory is six tenths of the host's, in whole GiB, for each of n VMs.
func fittingMemory(host int64, n int) string {
	switch each := host * 6 / 10 / int64(max(n, 1)); {
	case host == 0:
		return "4G"
	case each >= wiseMemory:
		return fmt.Sprintf("%dG", min(each/gib, 16))
	case host >= (wiseMemory+spareMemory)*int64(max(n, 1)):
		return "2G"
	case each >= leastMemory:
		return fmt.Sprintf("%dM", each/mib)
	}
	return ""
}

func cores(a Asked, f Found) Line {
	l := Line{What: "cores", Has: "can't be told", Asked: asked(a, "CPU_CORES", func(vm VM) string { return vm.Cores })}
	if f.Cores > 0 {
		l.Has = strconv.Itoa(f.Cores)
	}
	fitting := []string{fmt.Sprintf("CPU_CORES=%d", max(f.Cores, 1))}
	for _, vm := range a.VMs {
		if vm.Cores == "" || relative(vm.Cores) {
			continue
		}
		switch n, err := strconv.Atoi(vm.Cores); {
		case err != nil || n < 1 || n > 9999:
			l.Then, l.Set = fmt.Sprintf("The VM does not start: CPU_CORES=%s is no number of cores.", vm.Cores), fitting
		case f.Cores > 0 && n > f.Cores && l.Then == "":
			l.Then, l.Set = fmt.Sprintf("The VM gets %d.", f.Cores), fitting
		}
	}
	return l
}

func output(f Found) Line {
	l := Line{What: "disk of output/", Has: f.Output.String()}
	if f.Output.Size > 0 && f.Output.Free < wiseImage {
		l.Then = "An image can be larger: what does not fit waits in the VM until there is room. Make room, or have OUTPUT_DIR in .env name a folder on a larger disk."
	}
	return l
}

func volumes(f Found) Line {
	l := Line{What: "disk of Docker's volumes", Has: f.Volumes.String()}
	if f.OneDisk {
		l.Has += ", the same as that of output/"
	}
	least := int64(wiseImage)
	if f.Fresh {
		least = wiseDisk
	}
	if f.Volumes.Size > 0 && f.Volumes.Free < least {
		l.Then = "A VM with its first build takes about 10 GiB of it. When it is full the VM stands still until there is room. Make room: docker system df says what Docker holds."
	}
	return l
}

// dataDisk looks at what the VM's disk may grow to. Of one that is there
// already nobody in here knows how much it holds, and it never shrinks.
func dataDisk(a Asked, f Found) Line {
	l := Line{What: "disk of the VM", Asked: asked(a, "DISK_SIZE", func(vm VM) string { return vm.Disk })}
	l.Has = "grows on that of Docker's volumes; what is free in it, the VM says when it is up"
	var want int64
	for _, vm := range a.VMs {
		n, ok := amount(vm.Disk, f.Volumes.Free, false)
		switch {
		case vm.Disk == "" || relative(vm.Disk):
			continue
		case !ok:
			l.Then = fmt.Sprintf("The VM does not start: DISK_SIZE=%s is no size.", vm.Disk)
		case n < leastDisk:
			l.Then = "The VM does not start: its disk has 1 GiB or more."
		}
		want += n
	}
	if f.Volumes.Size > 0 && f.Fresh && l.Then == "" && want > f.Volumes.Free {
		l.Then = fmt.Sprintf("It may grow to %s and Docker's has %s free: when that is used up the VM stands still until there is room. "+
			"The size counts from the VM's first start; later it can grow, not shrink.", size(want), size(f.Volumes.Free))
	}
	if l.Then != "" {
		l.Set = []string{"DISK_SIZE=" + fittingDisk(f.Volumes.Free, len(a.VMs))}
	}
	return l
}

// fittingDisk is half of what is free, so that images and Docker have room.
func fittingDisk(free int64, n int) string {
	each := free / int64(max(n, 1)) / gib
	return fmt.Sprintf("%dG", max(1, min(128, max(each/2, min(8, each-1)))))
}

func kvm(a Asked, f Found) Line {
	l := Line{What: "KVM", Asked: asked(a, "KVM", func(vm VM) string { return vm.KVM }), Has: "no device"}
	if f.KVM {
		l.Has = "a device; the VM's container tries whether it works"
	}
	for _, vm := range a.VMs {
		on, set := yesNo(vm.KVM)
		foreign := f.Arch == "arm64" && !strings.Contains(vm.Image, "arm")
		switch {
		case !set && vm.KVM != "":
			l.Then, l.Set = fmt.Sprintf("The VM does not start: KVM=%s is not understood.", vm.KVM), []string{"KVM="}
			return l
		case on && !f.KVM:
			l.Then, l.Set = "The VM does not start: KVM=Y is set, and there is none.", []string{"KVM="}
			return l
		case foreign:
			l.Then = "This host is arm64 and the VM is x86-64: all is emulated, many times slower. With the line below the VM is an arm64 one, which nobody has run yet."
			l.Set = []string{"COMPOSE_FILE=compose.yaml:compose.arm64.yaml"}
		case set && !on:
			l.Has = strings.Split(l.Has, ";")[0] + ", not used: KVM=N is set"
		case !f.KVM:
			l.Then = "The VM is emulated: it works, several times slower. KVM wants virtualisation switched on in the host's firmware, or nested virtualisation if the host is a VM itself."
			if a.JobTimeout > 0 && a.JobTimeout < 24*time.Hour {
				l.Then += fmt.Sprintf(" A large configuration can then take longer than JOB_TIMEOUT=%s.", hours(a.JobTimeout))
				l.Set = []string{"JOB_TIMEOUT=24h"}
			}
		}
	}
	return l
}

// hours shows a limit as people write it: 6h, not 6h0m0s.
func hours(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// yesNo reads KVM as the start hook of the VM's container does.
func yesNo(v string) (yes, set bool) {
	switch strings.ToLower(v) {
	case "y", "yes", "1", "true", "on":
		return true, true
	case "n", "no", "0", "false", "off":
		return false, true
	}
	return false, false
}

// relative reports that a value is a part of what there is, whatever that is.
func relative(v string) bool {
	v = strings.ToLower(v)
	return v == "max" || v == "half"
}

// amount reads a size as the VM's container does: 16G, 512M, 1.5T, with or
// without a B; "max" and "half" are of what there is. A bare number counts GiB;
// of memory, from 130 on, MiB.
func amount(v string, there int64, memory bool) (int64, bool) {
	v = strings.ToUpper(strings.ReplaceAll(v, " ", ""))
	switch v {
	case "MAX":
		return there, true
	case "HALF":
		return there / 2, true
	}
	if n, err := strconv.ParseFloat(v, 64); err == nil && strings.Trim(v, "0123456789.") == "" {
		if memory && n >= 130 {
			v += "M"
		} else {
			v += "G"
		}
	}
	v = strings.TrimSuffix(v, "B")
	if v == "" {
		return 0, false
	}
	shift := strings.IndexByte("KMGT", v[len(v)-1])
	number := v[:len(v)-1]
	if shift < 0 || strings.Trim(number, "0123456789.") != "" {
		return 0, false
	}
	f, err := strconv.ParseFloat(number, 64)
	if err != nil || f > 1<<20 {
		return 0, false
	}
	return int64(f * float64(int64(1)<<(10*(shift+1)))), true
}

func (d Disk) String() string {
	if d.Size == 0 {
		return "can't be told"
	}
	return fmt.Sprintf("%s free of %s", size(d.Free), size(d.Size))
}

func size(n int64) string {
	if n < gib {
		return fmt.Sprintf("%d MiB", n/mib)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/gib)
}

// Text is the block that people read, each line with what is below it.
func Text(lines []Line) string {
	var b strings.Builder
	var set []string
	for _, l := range lines {
		facts := l.Has
		if l.Asked != "" {
			facts += "; asked for: " + l.Asked
		}
		fmt.Fprintf(&b, "    %-25s %s\n", l.What, facts)
		if l.Then != "" {
			fmt.Fprintf(&b, "    %-25s %s\n", "", "! "+l.Then)
		}
		set = append(set, l.Set...)
	}
	if len(set) > 0 {
		b.WriteString("    For this machine, in .env:\n")
		for _, s := range set {
			fmt.Fprintf(&b, "        %s\n", s)
		}
	}
	return b.String()
}
