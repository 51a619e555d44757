package preflight

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Look reads what the host has, from within a container: memory, cores and
// KVM's device are the host's there. output and state are folders on the disks
// that count; database is there once a sidecar has run.
func Look(output, state, database string) Found {
	f := look("/proc", output, state)
	_, err := os.Stat(filepath.Join(state, database))
	f.Fresh = errors.Is(err, fs.ErrNotExist)
	return f
}

func look(proc, output, state string) Found {
	f := Found{Cores: runtime.NumCPU(), Arch: runtime.GOARCH}
	f.Memory, f.MemoryFree = meminfo(filepath.Join(proc, "meminfo"))
	f.Output, f.Volumes = room(output), room(state)
	var a, b unix.Stat_t
	if unix.Stat(output, &a) == nil && unix.Stat(state, &b) == nil {
		f.OneDisk = a.Dev == b.Dev
	}
	// The device itself is none of this container's.
	if misc, err := os.ReadFile(filepath.Join(proc, "misc")); err == nil {
		for line := range strings.Lines(string(misc)) {
			if fields := strings.Fields(line); len(fields) == 2 && fields[1] == "kvm" {
				f.KVM = true
			}
		}
	}
	return f
}

// meminfo returns what there is and what is free of it, in bytes.
func meminfo(path string) (total, free int64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0
	}
	values := map[string]int64{}
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 {
			continue
		}
		if n, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
			values[fields[0]] = n << 10
		}
	}
	return values["MemTotal:"], values["MemAvailable:"]
}

func room(path string) Disk {
	var s unix.Statfs_t
	if unix.Statfs(path, &s) != nil {
		return Disk{}
	}
	return Disk{Free: int64(s.Bavail) * s.Bsize, Size: int64(s.Blocks) * s.Bsize}
}
