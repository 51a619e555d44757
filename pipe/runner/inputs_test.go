package runner

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// upload puts inputs where a writer does, and returns their digest.
func (m *machine) upload(content string) string {
	m.t.Helper()
	digest := digestOf(content)
	path := m.cfg.upload(digest)
	if err := os.WriteFile(path+".new", []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		m.t.Fatal(err)
	}
	return digest
}

func inputsHeader(id string, attempt int, digest string) pipe.Header {
	h := jobHeader(id, attempt)
	h.Inputs = digest
	return h
}

func TestInputs(t *testing.T) {
	m := boot(t)
	content := strings.Repeat("inputs\n", 100_000)
	digest := m.upload(content)
	accepted(t, m.send(1, inputsHeader("j", 1, digest), `sha256sum <"$INPUTS"; stat -c %a "$INPUTS"`+"\n"))
	if exists(m.cfg.upload(digest)) {
		t.Error("the upload outlives its acceptance")
	}
	if f := m.finished("j"); f.Status != pipe.StatusSucceeded {
		t.Errorf("finished: %+v", f)
	}
	if got, want := m.output("j"), digest+"  -\n444\n"; got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	// The upload is gone, the job is known: a repeat is answered as before.
	accepted(t, m.send(2, inputsHeader("j", 1, digest), `sha256sum <"$INPUTS"; stat -c %a "$INPUTS"`+"\n"))
	accepted(t, m.send(1, ackHeader("j", 1), ""))
	accepted(t, m.send(3, inputsHeader("j", 1, digest), `sha256sum <"$INPUTS"; stat -c %a "$INPUTS"`+"\n"))
	// Another attempt wants them anew.
	refused(t, m.send(1, inputsHeader("j", 2, digest), "true\n"), pipe.ReasonInputs)
	m.upload(content)
	accepted(t, m.send(2, inputsHeader("j", 2, digest), "true\n"))
}

func TestJobWithoutInputsHasNone(t *testing.T) {
	m := boot(t)
	m.submit("j", `echo "${INPUTS-none}"`+"\n")
	m.finished("j")
	if got := m.output("j"); got != "none\n" {
		t.Errorf("output %q", got)
	}
}

// What lies at the upload's place is somebody else's to choose.
func TestHostileUploads(t *testing.T) {
	digest := digestOf("inputs")
	for name, tc := range map[string]struct {
		put  func(m *machine, path string) error
		want string // in the refusal
	}{
		"nothing":  {func(*machine, string) error { return nil }, "are not at"},
		"link":     {func(_ *machine, path string) error { return os.Symlink("/etc/passwd", path) }, "can't be opened"},
		"dangling": {func(_ *machine, path string) error { return os.Symlink("/nonexistent", path) }, "can't be opened"},
		"fifo":     {func(_ *machine, path string) error { return unix.Mkfifo(path, 0o600) }, "no regular file"},
		"folder":   {func(_ *machine, path string) error { return os.Mkdir(path, 0o700) }, "no regular file"},
		"hard link": {func(m *machine, path string) error {
			return os.Link(m.cfg.spool()+"/lock", path)
		}, "no regular file of one name"},
		"other content": {func(_ *machine, path string) error { return os.WriteFile(path, []byte("other"), 0o600) }, "has the SHA-256 " + digestOf("other")},
		"empty":         {func(_ *machine, path string) error { return os.WriteFile(path, nil, 0o600) }, "has the SHA-256"},
		"huge": {func(_ *machine, path string) error {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				return err
			}
			return os.Truncate(path, pipe.MaxInputs+1)
		}, "at most 4294967296 are taken"},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			if err := tc.put(m, m.cfg.upload(digest)); err != nil {
				t.Fatal(err)
			}
			r := refused(t, m.send(1, inputsHeader("j", 1, digest), "true\n"), pipe.ReasonInputs)
			if !strings.Contains(r.Message, tc.want) || !r.Retryable {
				t.Errorf("refused: %+v, want %q", r, tc.want)
			}
			if left, err := os.ReadDir(filepath.Join(m.cfg.spool(), "inputs")); err != nil || len(left) > 0 {
				t.Errorf("left over: %v, %v", left, err)
			}
			if err := os.RemoveAll(m.cfg.upload(digest)); err != nil {
				t.Fatal(err)
			}
			m.upload("inputs")
			accepted(t, m.send(2, inputsHeader("j", 1, digest), "true\n"))
			m.finished("j")
		})
	}
}

// A writer that goes on writing changes nothing of what was accepted.
func TestUploadChangedWhileRead(t *testing.T) {
	m := newMachine(t)
	digest := digestOf("inputs")
	m.cfg.fault = func(_, path string) error {
		if filepath.Base(path) == "j-1.part" && strings.Contains(path, "inputs") {
			return os.WriteFile(m.cfg.upload(digest), []byte("changed and longer"), 0o600)
		}
		return nil
	}
	m.start()
	m.upload("inputs")
	refused(t, m.send(1, inputsHeader("j", 1, digest), "true\n"), pipe.ReasonInputs)
}

func TestInputsNeedRoom(t *testing.T) {
	m := newMachine(t)
	m.cfg.free = func(string) (int64, error) { return inputsReserve + 3, nil }
	m.start()
	r := refused(t, m.send(1, inputsHeader("j", 1, m.upload("four")), "true\n"), pipe.ReasonDisk)
	if !r.Retryable || !exists(m.cfg.upload(digestOf("four"))) {
		t.Errorf("refused: %+v; the upload must stay for the next try", r)
	}
	if want := "no room on the VM's data disk, 268.4 MB are free: copy inputs of 4 bytes, beside which 268.4 MB stay free: no space left on device; " +
		"it is tried again by itself, jobs that end make room, and a larger DISK_SIZE counts from the VM's next start"; r.Message != want {
		t.Errorf("it says %q, want %q", r.Message, want)
	}
	accepted(t, m.send(1, inputsHeader("k", 1, m.upload("two")), "true\n"))
}

// While inputs are copied other requests are answered, a repeat is not
// answered twice, and a take-over counts.
func TestRequestsWhileInputsAreCopied(t *testing.T) {
	m := newMachine(t)
	copying, goOn := make(chan struct{}, 10), make(chan struct{})
	m.cfg.fault = func(_, path string) error {
		if filepath.Base(filepath.Dir(path)) == "inputs" {
			copying <- struct{}{}
			<-goOn
		}
		return nil
	}
	m.start()
	digest := m.upload("inputs")
	h := inputsHeader("slow", 1, digest)
	m.rename(request(t, h, "echo slow\n"))
	<-copying
	m.submit("quick", "echo quick\n")
	m.finished("quick")
	m.rename(request(t, h, "echo slow\n"))
	refused(t, m.send(1, h, "echo other\n"), pipe.ReasonConflict)
	stolen := inputsHeader("stolen", 1, digest)
	m.rename(request(t, stolen, "true\n"))
	<-copying
	accepted(t, m.send(1, pipe.Header{Kind: pipe.KindTakeOver, Owner: "sidecar-2"}, ""))
	close(goOn)
	refused(t, m.await("answer to the first", 2, answer(h.Key())), pipe.ReasonOwner)
	refused(t, m.await("answer to the second", 1, answer(stolen.Key())), pipe.ReasonOwner)
	if n := len(find(m.events(), answer(h.Key()))); n != 2 {
		t.Errorf("%d answers, want one to the conflict and one for the copy", n)
	}
}

func TestTooManyCopies(t *testing.T) {
	m := newMachine(t)
	copying, goOn := make(chan struct{}, 10), make(chan struct{})
	m.cfg.fault = func(_, path string) error {
		if filepath.Base(filepath.Dir(path)) == "inputs" {
			copying <- struct{}{}
			<-goOn
		}
		return nil
	}
	m.start()
	digest := m.upload("inputs")
	for i := range maxTaking {
		m.rename(request(t, inputsHeader(fmt.Sprintf("j%d", i), 1, digest), "true\n"))
		<-copying
	}
	r := refused(t, m.send(1, inputsHeader("more", 1, digest), "true\n"), pipe.ReasonInternal)
	if !r.Retryable {
		t.Errorf("refused: %+v", r)
	}
	close(goOn)
	m.await("acceptance of those that were read", maxTaking, func(e pipe.Event) bool {
		return e.Accepted != nil && strings.HasPrefix(e.Job, "j")
	})
}

// Accepted, the inputs outlive the runner and the boot; the job starts later.
func TestInputsOutliveTheRunner(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 1
	m.start()
	wait, open := m.gate("g")
	m.submit("first", wait)
	m.await("start", 1, ofType(pipe.TypeStarted))
	h := inputsHeader("second", 1, m.upload("inputs\n"))
	accepted(t, m.send(1, h, `cat "$INPUTS"`+"\n"))
	m.stop()
	m.start()
	accepted(t, m.send(2, h, `cat "$INPUTS"`+"\n"))
	m.reboot()
	open()
	if f := m.finished("second"); f.Status != pipe.StatusSucceeded || m.output("second") != "inputs\n" {
		t.Errorf("finished: %+v, output %q", f, m.output("second"))
	}
}

// Killed at any step, the runner asks for the inputs again or has them.
func TestKilledWithInputs(t *testing.T) {
	for _, dies := range []string{"j-1.part", "body", "script", "ran", "seen.part"} {
		t.Run(dies, func(t *testing.T) {
			m := newMachine(t)
			_, wait := m.startChild(dies)
			digest := m.upload("inputs\n")
			h := inputsHeader("j", 1, digest)
			m.rename(request(t, h, `cat "$INPUTS"`+"\n"))
			wait()
			m.start()
			m.rename(request(t, h, `cat "$INPUTS"`+"\n"))
			if f := m.finished("j"); f.Status != pipe.StatusSucceeded || m.output("j") != "inputs\n" {
				t.Errorf("finished: %+v, output %q", f, m.output("j"))
			}
			if n := len(find(m.events(), ofType(pipe.TypeStarted))); n != 1 {
				t.Errorf("started %d times", n)
			}
			if left, err := filepath.Glob(filepath.Join(m.cfg.spool(), "inputs", "*")); err != nil || len(left) > 0 {
				t.Errorf("left over: %v, %v", left, err)
			}
		})
	}
}

func TestLostInputs(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 1
	m.start()
	wait, open := m.gate("g")
	m.submit("first", wait)
	m.await("start", 1, ofType(pipe.TypeStarted))
	accepted(t, m.send(1, inputsHeader("second", 1, m.upload("inputs")), "true\n"))
	m.stop()
	if err := os.Remove(m.cfg.paths(pipe.JobRef{Job: "second", Attempt: 1}).inputs()); err != nil {
		t.Fatal(err)
	}
	m.start()
	open()
	m.finished("first")
	if h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello; len(h.Jobs) != 1 {
		t.Errorf("hello lists %v: a job without its inputs is lost", h.Jobs)
	}
}

// A job that ran needs its inputs no more: its outcome must not go with them.
func TestLostInputsOfAFinishedJob(t *testing.T) {
	m := boot(t)
	accepted(t, m.send(1, inputsHeader("j", 1, m.upload("inputs")), "true\n"))
	m.finished("j")
	m.stop()
	if err := os.Remove(m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).inputs()); err != nil {
		t.Fatal(err)
	}
	m.start()
	if h := m.await("hello", 2, ofType(pipe.TypeHello)).Hello; len(h.Jobs) != 1 {
		t.Errorf("hello lists %v, want the finished job", h.Jobs)
	}
	m.reboot() // its outcome is told anew
	if f := m.finished("j"); f.Status != pipe.StatusSucceeded {
		t.Errorf("finished: %+v", f)
	}
}

// A runner that lives long doesn't keep them, either.
func TestOldUploadsAreRemovedInTime(t *testing.T) {
	m := newMachine(t)
	m.cfg.clean = 10 * time.Millisecond
	m.start()
	digest, half := m.upload("old"), filepath.Join(m.cfg.Pipe, ".inputs-"+digestOf("half"))
	if err := os.WriteFile(half, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-uploadsKept - time.Minute)
	if err := os.Chtimes(m.cfg.upload(digest), old, old); err != nil {
		t.Fatal(err)
	}
	m.until("the old upload is gone", func() bool { return !exists(m.cfg.upload(digest)) })
	if !exists(half) {
		t.Error("an upload under way was removed")
	}
}

func TestOldUploadsAreRemoved(t *testing.T) {
	m := newMachine(t)
	if err := m.cfg.makePipe(self()); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-uploadsKept - time.Minute)
	put := func(name string, when time.Time) string {
		path := filepath.Join(m.cfg.Pipe, name)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
		return path
	}
	young, half := put("inputs-"+digestOf("young"), time.Now()), put(".inputs-"+digestOf("half"), time.Now())
	gone := put("inputs-"+digestOf("old"), old)
	other := put("notes", old)
	m.start() // in a new boot
	for path, want := range map[string]bool{young: true, half: false, gone: false, other: true} {
		if exists(path) != want {
			t.Errorf("%s is there: %v, want %v", path, !want, want)
		}
	}
	m.stop()
	half = put(".inputs-"+digestOf("half"), time.Now())
	m.start() // in the same boot its writer may be at it
	if !exists(half) {
		t.Error("an upload under way was removed")
	}
}

func TestReport(t *testing.T) {
	for name, tc := range map[string]struct{ script, want, log string }{
		"none":      {"true", "", ""},
		"succeeded": {`echo '{ "a": 1 }' >"$REPORT"`, `{"a":1}`, ""},
		"failed":    {`echo '{"error":{}}' >"$REPORT"; exit 1`, `{"error":{}}`, ""},
		"killed":    {`echo '{"a":2}' >"$REPORT"; kill -9 $$`, `{"a":2}`, ""},
		"link":      {`ln -s /etc/shadow "$REPORT"`, "", "report is dropped"},
		"hard link": {`echo '{}' >x; ln x "$REPORT"`, "", "no regular file"},
		"fifo":      {`mkfifo "$REPORT"`, "", "no regular file"},
		"folder":    {`mkdir "$REPORT"`, "", "no regular file"},
		"huge":      {`truncate -s 10G "$REPORT"`, "", "has 10737418240 bytes"},
		"not UTF-8": {`printf '{"a":"\xff"}' >"$REPORT"`, "", "not UTF-8"},
		"text":      {`echo hello >"$REPORT"`, "", "not one JSON value"},
		"cut":       {`echo '{"a":' >"$REPORT"; exit 1`, "", "not one JSON value"},
		"empty":     {`: >"$REPORT"; exit 1`, "", "no space left on the VM's data disk"},
		"list":      {`echo '[]' >"$REPORT"`, "", "not a JSON object"},
		"deep":      {`printf '{"a":%s%s}' "$(printf '[%.0s' {1..20000})" "$(printf ']%.0s' {1..20000})" >"$REPORT"`, "", "not one JSON value"},
		"two":       {`echo '{}{}' >"$REPORT"`, "", "not one JSON value"},
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			m.submit("j", tc.script+"\n")
			f := m.finished("j")
			if string(f.Report) != tc.want {
				t.Errorf("report %q, want %q", f.Report, tc.want)
			}
			if !strings.Contains(m.log.String(), tc.log) {
				t.Errorf("the log lacks %q", tc.log)
			}
			// Who fails and leaves none that can be read is told so; it would have said why.
			if want := f.Status == pipe.StatusFailed && tc.log != ""; (f.Reason != "") != want || !strings.Contains(f.Reason, tc.log) && want {
				t.Errorf("%s, reason %q", f.Status, f.Reason)
			}
			m.reboot() // it is on record
			if f := m.finished("j"); string(f.Report) != tc.want {
				t.Errorf("after a reboot: report %q, want %q", f.Report, tc.want)
			}
		})
	}
}

// A job that the VM's end interrupted may have said something before.
func TestReportOfInterrupted(t *testing.T) {
	m := boot(t)
	wait, _ := m.gate("g")
	m.submit("j", `echo '{"a":1}' >"$REPORT"; echo begun`+"\n"+wait)
	m.until("its output", func() bool { return m.output("j") == "begun\n" })
	m.reboot()
	if f := m.finished("j"); f.Status != pipe.StatusInterrupted || string(f.Report) != `{"a":1}` {
		t.Errorf("finished: %+v", f)
	}
}

func TestSystems(t *testing.T) {
	for name, tc := range map[string]struct {
		file string // "-": none
		want []string
	}{
		"none":     {"-", nil},
		"empty":    {"", nil},
		"native":   {native() + "\n", nil},
		"emulated": {native() + "\nriscv64-linux\r\n\n armv7l-linux", []string{"riscv64-linux", "armv7l-linux"}},
		"garbage":  {"../x\nX-Y\nriscv64\n\x00\nriscv64-linux\nriscv64-linux\n", []string{"riscv64-linux"}},
		"huge":     {strings.Repeat("riscv64-linux\n", 1000), nil},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.cfg.SystemsFile = filepath.Join(t.TempDir(), "systems")
			if tc.file != "-" {
				if err := os.WriteFile(m.cfg.SystemsFile, []byte(tc.file), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			m.start()
			got := m.await("hello", 1, ofType(pipe.TypeHello)).Hello.Systems
			if want := append([]string{native()}, tc.want...); fmt.Sprint(got) != fmt.Sprint(want) {
				t.Errorf("systems %q, want %q", got, want)
			}
		})
	}
}

// A runner that is told to stop doesn't wait for a large copy.
func TestCopyEndsWithTheRunner(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	path := filepath.Join(t.TempDir(), "copy")
	_, err := disk{}.copyNew(ctx, path, readerFunc(func(p []byte) (int, error) {
		cancel()
		return len(p), nil
	}))
	if err == nil || !strings.Contains(err.Error(), context.Canceled.Error()) {
		t.Errorf("error %v", err)
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
