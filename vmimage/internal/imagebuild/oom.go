package imagebuild

import (
	"os"
	"strconv"
	"strings"
)

// daemonMemory is where the kernel counts what it killed among nix-daemon's
// builds for their memory.
const daemonMemory = "/sys/fs/cgroup/system.slice/nix-daemon.service/memory.events"

// oomKills is that count, 0 where it isn't to be had.
func oomKills() int {
	text, _ := os.ReadFile(daemonMemory) // then it isn't known, and a guess is said to be one
	for line := range strings.SplitSeq(string(text), "\n") {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			kills, _ := strconv.Atoi(n)
			return kills
		}
	}
	return 0
}
