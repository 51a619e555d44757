package runner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// Config says where a runner works and for whom. Pipe, Data and Units must be
// set; the zero value of all else has a meaning.
type Config struct {
	Pipe  string // folder of pipe_in and pipe_out; absolute
	Data  string // folder on the data disk; absolute
	Units Units  // what starts jobs: SystemdUnits, or ProcessUnits without systemd

	Slots   int    // how many jobs run at once; 0 is DefaultSlots
	Image   string // name and version of the VM's image, for hello
	Version string // of the runner, for hello

	// PipeUser is the user that writes requests and fetches artifacts.
	// UserPrefix and the slot's number name the user that a slot's job runs
	// as. Empty, nothing changes hands: all files belong to the runner's user
	// and jobs run as it.
	PipeUser   string
	UserPrefix string

	Store   string // Nix store; empty is /nix/store
	GCRoots string // where roots are made; empty is /nix/var/nix/gcroots/osbuilder
	// SystemsFile lists, one a line, the Nix systems that this machine builds
	// for. Its own always counts; empty or missing, it is the only one.
	SystemsFile string
	// NixSocket is where nix-daemon listens; a VM in which nobody answers there
	// says so in its hello. Empty, nobody asks.
	NixSocket string
	// NixEvery is how often it is looked at; 0 is nixCalm while it works and
	// nixEvery while it is broken.
	NixEvery time.Duration
	Path     string // PATH of jobs; empty is where NixOS and Debian have programs

	// Memory is what a job's processes may hold in all, in bytes; 0 is half of
	// the machine's, or most of it with one slot. What is built for the job
	// under nix-daemon is not among them. SystemdUnits alone see to it.
	Memory int64
	// MaxOutput is how much output a job may have, in bytes; one that has more
	// is ended. 0 is DefaultMaxOutput.
	MaxOutput int64

	// Grace is how long a job that is to end may take to do so, between SIGTERM
	// and SIGKILL; 0 is DefaultGrace.
	Grace time.Duration

	Boot string // id of this boot of the VM; empty is the kernel's
	// Port and Host are those of the download command in artifact events:
	// what a person on the Docker host with a key and the default ports types.
	Host string // empty is localhost
	Port int    // 0 is 2022

	Log io.Writer // one fact a line; nil is silent

	look  time.Duration // between looks at an idle pipe_out; 0 is lookEvery
	clean time.Duration // between looks for old uploads; 0 is cleanEvery

	nixPatience time.Duration // for nix-daemon's answer; 0 is nixPatience
	nixFirst    time.Duration // the same at the start; 0 is nixFirst

	// fault stands in for a disk that fails; tests set it.
	fault func(op, path string) error
	free  func(path string) (int64, error) // nil is freeBytes
}

// DefaultSlots is how many jobs run at once where nobody says.
const DefaultSlots = 2

// DefaultMaxOutput is more than any build has to say, and little enough for
// the data disk.
const DefaultMaxOutput = 1 << 30

// DefaultGrace is what a job that is cancelled or ran too long has to put its
// things in order.
const DefaultGrace = 10 * time.Second

// An account is a user by number.
type account struct {
	name     string
	uid, gid int
}

// withDefaults fills in what is empty and reports what is missing.
func (c Config) withDefaults() (Config, error) {
	if !filepath.IsAbs(c.Pipe) || !filepath.IsAbs(c.Data) {
		return c, fmt.Errorf("configure: pipe %q and data %q must be absolute paths", c.Pipe, c.Data)
	}
	if c.Units == nil {
		return c, fmt.Errorf("configure: nothing to start jobs with")
	}
	if c.Slots < 0 || c.Slots > 64 {
		return c, fmt.Errorf("configure: %d slots, want 1 to 64", c.Slots)
	}
	if c.Slots == 0 {
		c.Slots = DefaultSlots
	}
	if c.Grace < 0 {
		return c, fmt.Errorf("configure: a grace of %s", c.Grace)
	}
	if c.Grace == 0 {
		c.Grace = DefaultGrace
	}
	if c.Memory < 0 || c.MaxOutput < 0 {
		return c, fmt.Errorf("configure: %d bytes of memory and %d of output for a job", c.Memory, c.MaxOutput)
	}
	if c.MaxOutput == 0 {
		c.MaxOutput = DefaultMaxOutput
	}
	if c.Memory == 0 {
		var info unix.Sysinfo_t
		if err := unix.Sysinfo(&info); err != nil {
			return c, fmt.Errorf("measure the memory: %w", err)
		}
		c.Memory = jobMemory(int64(info.Totalram)*int64(info.Unit), c.Slots)
	}
	if c.Store == "" {
		c.Store = "/nix/store"
	}
	if c.GCRoots == "" {
		c.GCRoots = "/nix/var/nix/gcroots/osbuilder"
	}
	if c.Host == "" {
		c.Host = "localhost"
	}
	if c.Port == 0 {
		c.Port = 2022
	}
	if c.Log == nil {
		c.Log = io.Discard
	}
	if c.Path == "" {
		c.Path = "/run/current-system/sw/bin:/nix/var/nix/profiles/default/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	if c.free == nil {
		c.free = freeBytes
	}
	if c.Boot == "" {
		id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
		if err != nil {
			return c, fmt.Errorf("tell this boot from the last: %w", err)
		}
		c.Boot = string(bytes.TrimSpace(id))
	}
	return c, nil
}

// leastMemory is what the evaluation of a system can take, in bytes.
const leastMemory = 1536 << 20

// jobMemory is what one job may hold of a machine's memory: of two jobs
// neither takes all, and all else keeps what nix-daemon, too, leaves to it.
func jobMemory(total int64, slots int) int64 {
	most := total / 100 * 85
	if slots == 1 {
		return most
	}
	return min(most, max(total/2, leastMemory))
}

// self is the account of the runner.
func self() account {
	return account{uid: os.Geteuid(), gid: os.Getegid()}
}

// lookup finds a user; no name is the runner's own.
func lookup(name string) (account, error) {
	if name == "" {
		return self(), nil
	}
	u, err := user.Lookup(name)
	if err != nil {
		return account{}, fmt.Errorf("look up user %s: %w", name, err)
	}
	uid, err := strconv.Atoi(u.Uid)
	if err != nil {
		return account{}, fmt.Errorf("look up user %s: %w", name, err)
	}
	gid, err := strconv.Atoi(u.Gid)
	if err != nil {
		return account{}, fmt.Errorf("look up user %s: %w", name, err)
	}
	return account{name: name, uid: uid, gid: gid}, nil
}

// slotUser is the account that the job in a slot runs as. Slots count from 1.
func (c Config) slotUser(slot int) (account, error) {
	if c.UserPrefix == "" {
		return self(), nil
	}
	return lookup(c.UserPrefix + strconv.Itoa(slot))
}

// native is the Nix system of this machine.
func native() string {
	cpu := map[string]string{"amd64": "x86_64", "arm64": "aarch64", "386": "i686"}[runtime.GOARCH]
	if cpu == "" {
		cpu = runtime.GOARCH
	}
	return cpu + "-linux"
}

const (
	maxSystems     = 16      // in hello
	maxSystemsFile = 4 << 10 // bytes
)

var systemPattern = regexp.MustCompile(`^[a-z0-9_]{1,32}-[a-z0-9_]{1,32}$`)

// systems are the Nix systems that this machine builds for: its own, then the
// emulated ones. The file is made at boot by whoever tried the emulation.
func (r *Runner) systems() []string {
	all := []string{native()}
	if r.cfg.SystemsFile == "" {
		return all
	}
	data, err := readBounded(r.cfg.SystemsFile, maxSystemsFile)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			r.logf("only %s is built for: %v", all[0], err)
		}
		return all
	}
	for line := range strings.Lines(string(data)) {
		system := strings.TrimSpace(line)
		if systemPattern.MatchString(system) && !slices.Contains(all, system) && len(all) < maxSystems {
			all = append(all, system)
		}
	}
	return all
}

// ReadImage returns the first line of the file that names the VM's image.
func ReadImage(path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read the image's name: %w", err)
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return strings.TrimSpace(line), nil
}

// Where the protocol's files lie.
func (c Config) pipeIn() string  { return filepath.Join(c.Pipe, pipe.In) }
func (c Config) pipeOut() string { return filepath.Join(c.Pipe, pipe.Out) }
func (c Config) spool() string   { return filepath.Join(c.Data, "spool") }

func (c Config) jobsDir() string      { return filepath.Join(c.Data, "jobs") }
func (c Config) artifactsDir() string { return filepath.Join(c.Data, "artifacts") }
