// Package chaos runs mixed jobs on an installation with a real VM while what
// they run on is killed, reset, cut off and filled up at random, and holds
// what came of it against what is promised.
//
// All that is random comes from a seed: a [Plan] of jobs and faults. What
// happened is an [Observed], and [Check] compares the two. Both are plain, so
// that the checker is tested without a VM; the rest is in the tests that are
// tagged e2e.
package chaos

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"
)

// A Kind is what a job is like.
type Kind string

// The kinds of jobs.
const (
	Short   Kind = "short"   // some lines, at once
	Long    Kind = "long"    // lines over some seconds
	Loud    Kind = "loud"    // thousands of lines, as fast as they come
	Failing Kind = "failing" // ends with an exit code of its own
	Image   Kind = "image"   // ships a file of several MiB
	Timeout Kind = "timeout" // never ends by itself
	Cancel  Kind = "cancel"  // somebody has it cancelled, before or while it runs
	Folder  Kind = "folder"  // a configuration's, that Nix evaluates: its error names what arrived in the VM
)

// What a job's script exits with when it could not do its part: count itself,
// write a line, write its image. On a full disk it may; else it must not.
const (
	exitNotCounted = 74
	exitNoLine     = 75
	exitNoImage    = 76
)

// counterPort is where the agent in the VM counts executions.
const counterPort = 7777

// A Job is one drop.
type Job struct {
	Name  string // of the drop, without .sh
	Kind  Kind
	Lines int
	Pause time.Duration // after each line
	Exit  int           // its script's, if nothing comes between
	Size  int64         // of its image, or of the data in the folder, bytes; 0 is none
	// Cancel is how long after its drop somebody wants it cancelled; 0 is never.
	Cancel time.Duration
}

// imageName is what an image is called.
const imageName = "image.bin"

// Files are what the folder of a Folder has in it. It has to be uploaded to the
// VM whole to fail as it should.
func (j Job) Files() map[string][]byte {
	return map[string][]byte{
		"configuration.nix": []byte("{ ... }:\nthrow \"" + folderError + "${builtins.hashFile \"sha256\" ./data}\"\n"),
		"data":              j.data(""),
	}
}

// folderError begins what Nix says of a Folder; the digest of the data follows.
const folderError = "chaos: the data is "

// failedFolder is the exit code of a job that Nix could not evaluate.
const failedFolder = 1

// Script is the drop. It says first of all that it runs, and goes on only
// when that is on the VM's disk.
func (j Job) Script() string {
	var b strings.Builder
	fmt.Fprintf(&b, `exec 8<>/dev/tcp/127.0.0.1/%d || exit %d
echo "$JOB_ID $JOB_ATTEMPT" >&8
read -r -t 60 answer <&8
[ "$answer" = counted ] || exit %[2]d
exec 8>&-
for ((i = 1; i <= %[3]d; i++)); do
  printf '%[4]s attempt %%d line %%06d of %%06d %[5]s\n' "$JOB_ATTEMPT" "$i" %[3]d || exit %[6]d
`, counterPort, exitNotCounted, j.Lines, j.Name, filler, exitNoLine)
	if j.Pause > 0 {
		fmt.Fprintf(&b, "  sleep %.2f\n", j.Pause.Seconds())
	}
	b.WriteString("done\n")
	if j.Size > 0 {
		fmt.Fprintf(&b, "yes \"%s $JOB_ID\" 2>/dev/null | head -c %d >\"$OUT/%s\" || exit %d\n", j.Name, j.Size, imageName, exitNoImage)
	}
	if j.Kind == Timeout {
		b.WriteString("exec sleep 3600\n")
	}
	fmt.Fprintf(&b, "exit %d\n", j.Exit)
	return b.String()
}

// filler makes a line as long as those of a build are.
const filler = "building /nix/store/0000-example.drv"

// Output is all that an attempt of the job says.
func (j Job) Output(attempt int) string {
	var b strings.Builder
	for i := range j.Lines {
		fmt.Fprintf(&b, "%s attempt %d line %06d of %06d %s\n", j.Name, attempt, i+1, j.Lines, filler)
	}
	return b.String()
}

// ImageDigest is the SHA-256 of what the job ships.
func (j Job) ImageDigest(id string) string { return hexSum(j.data(id)) }

// data is as many bytes as the job's size says, and no other job's.
func (j Job) data(id string) []byte {
	line := []byte(j.Name + " " + id + "\n")
	return bytes.Repeat(line, int(j.Size)/len(line)+1)[:j.Size]
}

func hexSum(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// A Break is a kind of fault.
type Break string

// What is broken.
const (
	KillSidecar Break = "kill sidecar"     // SIGKILL; started again at once
	KillRunner  Break = "kill runner"      // SIGKILL
	KillSSHD    Break = "kill sshd"        // SIGKILL, its sessions too
	ResetVM     Break = "reset VM"         // the machine's reset button
	PowerOffVM  Break = "VM's power fails" // SIGKILL for QEMU's container; started again at once
	CutNetwork  Break = "cut network"      // the sidecar's container loses its network
	FillOutput  Break = "fill output/"     // to the last byte
	FillData    Break = "fill data disk"   // the VM's, to the last byte
	FillHost    Break = "fill host's disk" // beneath the VM's, to the last byte: QEMU stops the VM
	Repeat      Break = "repeat request"   // what lies in pipe_in is written once more
)

// Breaks are all kinds of faults.
var Breaks = []Break{KillSidecar, KillRunner, KillSSHD, ResetVM, PowerOffVM, CutNetwork, FillOutput, FillData, FillHost, Repeat}

// ofVM reports that the VM dies of it.
func (b Break) ofVM() bool { return b == ResetVM || b == PowerOffVM }

// A Fault is one thing that happens.
type Fault struct {
	Break Break
	After time.Duration // since the last one, or since that was got over
	For   time.Duration // how long it lasts, where it is not done in a moment
	Calm  bool          // the next one waits until this one is got over
}

// A Plan is a run.
type Plan struct {
	Seed   uint64
	Jobs   []Job
	Faults []Fault
}

// NewPlan makes the plan of a seed: jobs, and about one fault for every three of
// them.
func NewPlan(seed uint64, jobs int) Plan {
	r := rand.New(rand.NewPCG(seed, uint64(jobs)))
	p := Plan{Seed: seed}
	timeouts := 0
	for i := range jobs {
		j := newJob(r, fmt.Sprintf("chaos-%03d", i))
		if j.Kind == Timeout {
			// Each holds a slot for as long as a job may run.
			if timeouts++; timeouts > 1+jobs/50 {
				j = newJob(r, j.Name)
				j.Kind, j.Exit = Failing, 1+r.IntN(70)
			}
		}
		p.Jobs = append(p.Jobs, j)
	}
	if jobs > 0 && timeouts == 0 {
		p.Jobs[r.IntN((jobs+1)/2)].Kind = Timeout
	}
	if !slices.ContainsFunc(p.Jobs, func(j Job) bool { return j.Kind == Folder }) {
		for _, i := range r.Perm(jobs) {
			if p.Jobs[i].Kind != Timeout {
				p.Jobs[i].becomeFolder(r)
				break
			}
		}
	}
	p.Faults = newFaults(r, jobs)
	return p
}

func newJob(r *rand.Rand, name string) Job {
	j := Job{Name: name, Lines: 10 + r.IntN(40)}
	switch n := r.IntN(100); {
	case n < 25:
		j.Kind = Short
	case n < 45:
		j.Kind, j.Pause = Long, time.Duration(50+r.IntN(150))*time.Millisecond
	case n < 60:
		j.Kind, j.Lines = Loud, 1000+r.IntN(3000)
	case n < 70:
		j.Kind, j.Exit = Failing, 1+r.IntN(70)
	case n < 88:
		j.Kind, j.Size = Image, 1<<20+r.Int64N(3<<20)
	case n < 92:
		j.becomeFolder(r)
	case n < 97:
		j.Kind, j.Lines, j.Pause = Cancel, 1000, 200*time.Millisecond
		j.Cancel = time.Duration(r.IntN(20000)) * time.Millisecond
	default:
		j.Kind = Timeout
	}
	return j
}

// becomeFolder makes it a folder, whatever it was.
func (j *Job) becomeFolder(r *rand.Rand) {
	*j = Job{Name: j.Name, Kind: Folder, Size: 1<<20 + r.Int64N(3<<20), Exit: failedFolder}
}

// newFaults deals from a deck with one of each kind. A VM takes most of a
// minute to come back, so it dies in few rounds only.
func newFaults(r *rand.Rand, jobs int) []Fault {
	var all []Fault
	for round := 0; len(all) < jobs/3; round++ {
		for _, i := range r.Perm(len(Breaks)) {
			b := Breaks[i]
			switch {
			case b.ofVM() && round%4 != 0:
				continue
			case b == PowerOffVM && jobs < 100:
				continue // the one reset is enough
			}
			f := Fault{Break: b, After: time.Duration(2000+r.IntN(6000)) * time.Millisecond, Calm: r.IntN(3) > 0}
			switch b {
			case CutNetwork, FillOutput, FillData, FillHost:
				f.For = time.Duration(2000+r.IntN(6000)) * time.Millisecond
			default: // done in a moment
			}
			all = append(all, f)
		}
	}
	return all
}
