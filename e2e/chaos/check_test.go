package chaos

import (
	"crypto/sha256"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var start = time.Date(2026, 11, 26, 12, 0, 0, 0, time.UTC)

// one is a run of one image job in which all is well: its VM died under it
// once.
func one() Observed {
	j := Job{Name: "a", Kind: Image, Lines: 4, Size: 1000}
	first, second := j.Output(1), j.Output(2)
	half := len(first)/4*2 + 7 // in the third line
	files := map[string]string{imageName: j.ImageDigest("id")}
	zero := 0
	return Observed{
		Jobs: []Seen{{
			Job: j, Dropped: start, Ended: start.Add(time.Minute),
			Outcomes: []Outcome{{
				ID: "id", Status: "succeeded", ExitCode: &zero, Attempts: 2, Files: files, Told: files,
				Log: first[:half] + "\n[osbuilder: attempt 2 begins, attempt 1 did not end]\n" + second,
			}},
		}},
		Executions: []Execution{{"id", 1, "x"}, {"id", 2, "y"}},
		Faults: []Injected{
			{Break: KillSidecar, From: start.Add(time.Second), To: start.Add(time.Second)},
			{Break: ResetVM, From: start.Add(2 * time.Second), To: start.Add(2 * time.Second)},
		},
	}
}

func TestCheckAcceptsWhatIsPromised(t *testing.T) {
	r := Check(one())
	want := Report{
		Outcomes: map[string]int{"succeeded": 1}, Attempts: 2, Executions: 2,
		Lines: 4, Found: 4, Cuts: 1, Images: 1, ImageBytes: 1000,
	}
	if diff := cmp.Diff(want, r); diff != "" {
		t.Errorf("report (-want +got):\n%s", diff)
	}

	// The end of an attempt's output can be lost with the VM although its outcome was not.
	o := one()
	out := &o.Jobs[0].Outcomes[0]
	whole := o.Jobs[0].Job.Output(1)
	half := len(whole)/2 + 5
	out.Attempts, o.Executions = 1, o.Executions[:1]
	out.Log = whole[:half] + fmt.Sprintf("\n[osbuilder: %d bytes of output were lost with the VM]\n", len(whole)-half)
	if r := Check(o); len(r.Violations) > 0 || r.LostBytes != len(whole)-half || r.Found != 2 || r.Lines != 4 {
		t.Errorf("a marked cut: %+v", r)
	}

	// A runner that is killed as it starts an attempt can leave one that never ran.
	o = one()
	out = &o.Jobs[0].Outcomes[0]
	out.Log = "[osbuilder: attempt 2 begins, attempt 1 did not end]\n" + o.Jobs[0].Job.Output(2)
	o.Faults[1].Break, o.Executions = KillRunner, o.Executions[1:]
	if r := Check(o); len(r.Violations) > 0 || r.Cuts != 1 {
		t.Errorf("an attempt that never began: %+v", r)
	}

	// A folder can't count itself; its error tells what arrived.
	o = folder()
	if r := Check(o); len(r.Violations) > 0 || r.Folders != 1 || r.Outcomes["failed"] != 1 {
		t.Errorf("a folder: %+v", r)
	}
	out = &o.Jobs[0].Outcomes[0]
	out.Log, out.Reason = "", "no space left on the builder VM's data disk"
	o.Faults[1].Break, out.Attempts = FillData, 1
	if r := Check(o); len(r.Violations) > 0 || r.DiskFull != 1 || r.Folders != 0 {
		t.Errorf("a folder on a full disk: %+v", r)
	}

	// A full disk is no fault of the job's, nor of the builder's.
	o = one()
	out = &o.Jobs[0].Outcomes[0]
	code := exitNoLine
	out.Status, out.ExitCode, out.Attempts, out.Files, out.Told = "failed", &code, 1, nil, nil
	out.Log = whole[:half] + "/data/x/script: line 7: printf: write error: No space left on device\n"
	o.Executions = o.Executions[:1]
	o.Faults[1].Break = FillData
	if r := Check(o); len(r.Violations) > 0 || r.DiskFull != 1 {
		t.Errorf("a full disk: %+v", r)
	}
}

// Each promise is broken in turn.
func TestCheckFinds(t *testing.T) {
	for name, tc := range map[string]struct {
		break1 func(o *Observed, out *Outcome)
		want   []Wrong
	}{
		"no outcome":      {func(o *Observed, _ *Outcome) { o.Jobs[0].Outcomes = nil }, []Wrong{NoOutcome}},
		"two outcomes":    {func(o *Observed, out *Outcome) { o.Jobs[0].Outcomes = append(o.Jobs[0].Outcomes, *out) }, []Wrong{SeveralOutcomes}},
		"executed twice":  {func(o *Observed, _ *Outcome) { o.Executions = append(o.Executions, o.Executions[0]) }, []Wrong{ExecutedTwice}},
		"never executed":  {func(o *Observed, _ *Outcome) { o.Executions = o.Executions[:1] }, []Wrong{NotExecuted}},
		"no death":        {func(o *Observed, _ *Outcome) { o.Faults = o.Faults[:1] }, []Wrong{UnexplainedAttempt, UnexplainedCut}},
		"died before":     {func(o *Observed, _ *Outcome) { o.Faults[1].To = start.Add(-time.Second) }, []Wrong{UnexplainedAttempt, UnexplainedCut}},
		"runner killed":   {func(o *Observed, _ *Outcome) { o.Faults[1].Break = KillRunner }, []Wrong{UnexplainedAttempt, UnexplainedCut}},
		"not begun":       {func(o *Observed, _ *Outcome) { o.Faults, o.Executions = o.Faults[:1], o.Executions[1:] }, []Wrong{UnexplainedAttempt, UnexplainedCut}},
		"unknown attempt": {func(o *Observed, _ *Outcome) { o.Executions = append(o.Executions, Execution{"id", 3, "z"}) }, []Wrong{UnexplainedAttempt}},
		"wrong status":    {func(_ *Observed, out *Outcome) { out.Status = "failed"; out.Files, out.Told = nil, nil }, []Wrong{WrongOutcome}},
		"failed for room": {func(_ *Observed, out *Outcome) {
			out.Status, out.Reason = "failed", "No space left"
			out.Files, out.Told = nil, nil
		}, []Wrong{WrongOutcome}},
		"damaged":        {func(_ *Observed, out *Outcome) { out.Files = map[string]string{imageName: "other"} }, []Wrong{ImageDamaged}},
		"told other":     {func(_ *Observed, out *Outcome) { out.Told = map[string]string{imageName: "other"} }, []Wrong{ImageDamaged}},
		"image missing":  {func(_ *Observed, out *Outcome) { out.Files = nil }, []Wrong{ImageDamaged}},
		"image too many": {func(_ *Observed, out *Outcome) { out.Status = "failed" }, []Wrong{WrongOutcome, ImageDamaged}},
		"line twice":     {func(_ *Observed, out *Outcome) { out.Log = strings.Replace(out.Log, "\n", "\n"+firstLine(out.Log), 1) }, []Wrong{LogDiffers}},
		"line missing":   {func(_ *Observed, out *Outcome) { out.Log = strings.Replace(out.Log, line(2, 2), "", 1) }, []Wrong{LogDiffers}},
		"end missing":    {func(_ *Observed, out *Outcome) { out.Log = strings.TrimSuffix(out.Log, line(2, 4)) }, []Wrong{LogDiffers}},
		"order": {func(_ *Observed, out *Outcome) {
			out.Log = strings.Replace(out.Log, line(2, 2)+line(2, 3), line(2, 3)+line(2, 2), 1)
		}, []Wrong{LogDiffers}},
		"wrong length cut": {func(_ *Observed, out *Outcome) {
			out.Log = strings.Replace(out.Log, line(2, 2), "[osbuilder: 5 bytes of output were lost with the VM]\n", 1)
		}, []Wrong{LogDiffers}},
		"no attempt mark": {func(o *Observed, out *Outcome) { out.Log = o.Jobs[0].Job.Output(1) }, []Wrong{LogDiffers}},
		"file lost":       {func(_ *Observed, out *Outcome) { out.Log += "[osbuilder: 7 bytes of this file were lost]\n" }, []Wrong{LogDiffers}},
		"broken line":     {func(_ *Observed, out *Outcome) { out.Log = strings.Replace(out.Log, "[osb", "x\n[osb", 1) }, []Wrong{LogDiffers}},
		"half":            {func(o *Observed, _ *Outcome) { o.Half = []string{"a/id: no result.json"} }, []Wrong{HalfVisible}},
		"inbox":           {func(o *Observed, _ *Outcome) { o.Inbox = []string{"a.sh"} }, []Wrong{LeftInInbox}},
	} {
		o := one()
		tc.break1(&o, &o.Jobs[0].Outcomes[0])
		var got []Wrong
		for _, v := range Check(o).Violations {
			if !slices.Contains(got, v.Wrong) {
				got = append(got, v.Wrong)
			}
		}
		slices.Sort(got)
		slices.Sort(tc.want)
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s\n%v", name, diff, Check(o).Violations)
		}
	}
}

// folder is a run of one folder, whose VM died under it once.
func folder() Observed {
	o := one()
	s := &o.Jobs[0]
	s.Job = Job{Name: "a", Kind: Folder, Size: 1000, Exit: failedFolder}
	code := failedFolder
	sum := sha256.Sum256(s.Job.Files()["data"])
	s.Outcomes[0] = Outcome{
		ID: "id", Status: "failed", ExitCode: &code, Attempts: 2, Reason: "evaluation",
		Log: fmt.Sprintf("reading\n[osbuilder: attempt 2 begins, attempt 1 did not end]\nerror: %s%x\n", folderError, sum),
	}
	o.Executions = nil
	return o
}

// So is each promise about a folder.
func TestCheckFindsInFolder(t *testing.T) {
	for name, tc := range map[string]struct {
		break1 func(o *Observed, out *Outcome)
		want   Wrong
	}{
		"other data":    {func(_ *Observed, out *Outcome) { out.Log = folderError + hexSum(nil) }, InputsDamaged},
		"other error":   {func(_ *Observed, out *Outcome) { out.Log = "it is late" }, WrongOutcome},
		"no room left":  {func(_ *Observed, out *Outcome) { out.Log, out.Reason = "", "no space left" }, WrongOutcome},
		"no death":      {func(o *Observed, _ *Outcome) { o.Faults = o.Faults[:1] }, UnexplainedCut},
		"runner killed": {func(o *Observed, _ *Outcome) { o.Faults[1].Break = KillRunner }, UnexplainedAttempt},
		"files":         {func(_ *Observed, out *Outcome) { out.Files = map[string]string{"x": "y"} }, ImageDamaged},
	} {
		o := folder()
		tc.break1(&o, &o.Jobs[0].Outcomes[0])
		if r := Check(o); !r.has(tc.want) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func firstLine(s string) string { return s[:strings.IndexByte(s, '\n')+1] }

func line(attempt, n int) string {
	return strings.SplitAfter(Job{Name: "a", Lines: 4}.Output(attempt), "\n")[n-1]
}

func TestPlan(t *testing.T) {
	if diff := cmp.Diff(NewPlan(7, 200), NewPlan(7, 200)); diff != "" {
		t.Errorf("the same seed makes another plan:\n%s", diff)
	}
	if cmp.Equal(NewPlan(7, 200), NewPlan(8, 200)) {
		t.Error("another seed makes the same plan")
	}
	for seed := range uint64(50) {
		for _, jobs := range []int{20, 200} {
			p := NewPlan(seed, jobs)
			kinds, breaks := make(map[Kind]int), make(map[Break]int)
			for _, j := range p.Jobs {
				kinds[j.Kind]++
			}
			deaths := 0
			for _, f := range p.Faults {
				breaks[f.Break]++
				if f.Break.ofVM() {
					deaths++
				}
			}
			if kinds[Folder] < 1 {
				t.Errorf("seed %d, %d jobs: no folder", seed, jobs)
			}
			if kinds[Timeout] < 1 || kinds[Timeout] > 1+jobs/50 {
				t.Errorf("seed %d: %d jobs that run into their limit", seed, kinds[Timeout])
			}
			for _, b := range Breaks {
				if breaks[b] == 0 && (jobs >= 100 || b != PowerOffVM) {
					t.Errorf("seed %d, %d jobs: no fault %q", seed, jobs, b)
				}
			}
			if jobs == 200 && (deaths < 4 || deaths > 8) || jobs == 20 && deaths != 1 {
				t.Errorf("seed %d, %d jobs: the VM dies %d times", seed, jobs, deaths)
			}
		}
	}
}

// What a script says and ships is what its plan says.
func TestScriptDoesAsPlanned(t *testing.T) {
	dir := t.TempDir()
	j := Job{Name: "a", Kind: Failing, Lines: 20, Pause: time.Millisecond, Exit: 9, Size: 100000}
	// There is no agent here: the lines that ask it are left out.
	_, script, _ := strings.Cut(j.Script(), "exec 8>&-\n")
	cmd := exec.CommandContext(t.Context(), "bash", "-c", script)
	cmd.Env = []string{"PATH=/usr/bin:/bin", "JOB_ATTEMPT=3", "JOB_ID=id", "OUT=" + dir}
	out, _ := cmd.CombinedOutput()
	if diff := cmp.Diff(j.Output(3), string(out)); diff != "" || cmd.ProcessState.ExitCode() != 9 {
		t.Errorf("exit code %d, output (-want +got):\n%s", cmd.ProcessState.ExitCode(), diff)
	}
	sum, err := exec.CommandContext(t.Context(), "sha256sum", filepath.Join(dir, imageName)).Output()
	if err != nil || !strings.HasPrefix(string(sum), j.ImageDigest("id")+" ") {
		t.Errorf("the image's digest is %s (%v), planned %s", sum, err, j.ImageDigest("id"))
	}
}
