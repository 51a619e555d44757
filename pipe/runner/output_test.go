package runner

import (
	"bytes"
	"os"
	"strings"
	"testing"
	"time"

	"osbuilder/pipe"
)

// gone fails if a process of the job is left.
func (m *machine) gone(id string) {
	m.t.Helper()
	left, err := members(Spec{Result: m.cfg.paths(pipe.JobRef{Job: id, Attempt: 1}).result()})
	if err != nil || len(left) > 0 {
		m.t.Errorf("processes of %s are left: %v, %v", id, left, err)
	}
}

// Megabytes of anything come out as they went in, and take little more room.
func TestOutputOfAnyKind(t *testing.T) {
	for name, script := range map[string]string{
		"random":      "head -c 3000000 /dev/urandom\n",
		"zeros":       "head -c 3000000 /dev/zero\n",
		"one line":    "head -c 3000000 /dev/zero | tr '\\0' x\n",
		"empty lines": "yes '' | head -c 3000000\n",
		"half runes":  `yes $'\xe2\x82\xc3(' | head -c 3000000` + "\n",
		"two streams": "for i in {1..50000}; do echo $i; echo $i >&2; done\n",
	} {
		t.Run(name, func(t *testing.T) {
			m := boot(t)
			m.submit("j", script)
			f := m.finished("j")
			want, err := os.ReadFile(m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).log())
			if err != nil {
				t.Fatal(err)
			}
			got := m.output("j")
			if f.Status != pipe.StatusSucceeded || got != string(want) || f.LogLength != int64(len(want)) || len(want) < 500_000 {
				t.Errorf("%d bytes of %d, finished: %+v", len(got), len(want), f)
			}
			// Line by line it takes as many events as it is read in, which is the machine's affair.
			if size := m.size(); name != "two streams" && size > int64(len(want))*3/2+100_000 {
				t.Errorf("%d bytes of output take %d", len(want), size)
			}
		})
	}
}

// What a script does to its streams, and what it leaves running, changes
// nothing about its end.
func TestStreamsAndLeftovers(t *testing.T) {
	for name, script := range map[string]string{
		"closed":      "echo said; exec >&- 2>&-; echo unheard; true\n",
		"kept open":   "echo said; sleep 1000 & disown\n",
		"daemon":      "(setsid bash -c 'echo $$ >up; exec sleep 1000' </dev/null &); until [[ -s up ]]; do sleep 0.01; done; echo said\n",
		"double fork": "(setsid bash -c '(trap \"\" HUP TERM; : >up; while :; do sleep 0.01; done) & exit' &); until [[ -e up ]]; do sleep 0.01; done; echo said\n",
		"no lock":     "(exec 9>&-; setsid bash -c ': >up; exec sleep 1000' &); until [[ -e up ]]; do sleep 0.01; done; echo said\n",
		"stopped":     "setsid bash -c ': >up; kill -STOP $$' & until [[ -e up ]]; do sleep 0.01; done; echo said\n",
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.cfg.Grace = 200 * time.Millisecond
			m.start()
			m.submit("j", script+"echo x >$OUT/x\n")
			if f := m.finished("j"); f.Status != pipe.StatusSucceeded || f.Artifacts != 1 || m.output("j") != "said\n" {
				t.Errorf("finished: %+v, output %q", f, m.output("j"))
			}
			m.gone("j")
		})
	}
}

// The time is up: all is ended that the job started, by force if need be.
func TestTimeoutReachesAll(t *testing.T) {
	m := newMachine(t)
	m.cfg.Grace = 200 * time.Millisecond
	m.start()
	h := jobHeader("j", 1)
	h.Timeout = 1
	accepted(t, m.send(1, h, "setsid --fork bash -c 'trap \"\" TERM; while :; do sleep 0.01; done'\ntrap 'echo told' TERM\nwhile :; do sleep 0.01; done 2>/dev/null\n"))
	f := m.finished("j") // Bash may say that the sleep was terminated, too
	if f.Status != pipe.StatusTimeout || f.Signal != "" || f.Reason == "" || m.output("j") != "told\n" {
		t.Errorf("finished: %+v, output %q", f, m.output("j"))
	}
	m.gone("j")
}

// Who writes without end is ended; what it wrote up to the bound is told, and
// told again the same.
func TestTooMuchOutput(t *testing.T) {
	m := newMachine(t)
	m.cfg.MaxOutput = 100_001
	m.start()
	wait, open := m.gate("g")
	m.submit("other", "echo fine\n"+wait)
	m.submit("j", "trap '' TERM; yes\n")
	check := func() {
		t.Helper()
		f := m.finished("j")
		if f.Status != pipe.StatusFailed || f.LogLength != 100_001 || !strings.Contains(f.Reason, "100001 bytes of output") {
			t.Errorf("finished: %+v", f)
		}
		if got := m.output("j"); got != strings.Repeat("y\n", 50_000)+"y" {
			t.Errorf("%d bytes of output", len(got))
		}
	}
	check()
	m.gone("j")
	open()
	if f := m.finished("other"); f.Status != pipe.StatusSucceeded {
		t.Errorf("the other: %+v", f)
	}
	m.cfg.MaxOutput = 0 // by a runner that would allow more, too
	m.stop()
	m.start()
	first := m.events()[0].Hello.Generation
	m.rename(request(t, repeatHeader(first, 0), ""))
	m.until("a new generation", func() bool { return m.events()[0].Hello.Generation != first })
	check()
}

// It wrote too much while no runner lived, and came to its end.
func TestTooMuchOutputUnseen(t *testing.T) {
	m := newMachine(t)
	m.cfg.MaxOutput = 1000
	kill, _ := m.startChild("-")
	wait, open := m.gate("g")
	m.submit("j", wait+"seq 10000; echo x >$OUT/x\n")
	m.await("start", 1, ofType(pipe.TypeStarted))
	kill()
	open()
	m.until("the result", func() bool { return exists(m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).result()) })
	m.start()
	if f := m.finished("j"); f.Status != pipe.StatusFailed || f.LogLength != 1000 || f.Artifacts != 0 {
		t.Errorf("finished: %+v", f)
	}
}

// Output that doesn't stop keeps nobody from ending the job.
func TestCancelFlood(t *testing.T) {
	m := boot(t)
	m.submit("j", "while :; do echo a line of some length, of which there are many; done\n")
	m.until("output", func() bool { return bytes.Contains([]byte(m.raw()), []byte(`"type":"log"`)) })
	m.rename(request(t, cancelHeader("j", 1), ""))
	if f := m.finished("j"); f.Status != pipe.StatusCancelled || f.LogLength != int64(len(m.output("j"))) {
		t.Errorf("finished: %+v", f)
	}
}

func TestJobMemory(t *testing.T) {
	for _, tc := range []struct {
		total, want int64
		slots       int
	}{
		{16_000 << 20, 13_600 << 20, 1},
		{16_000 << 20, 8_000 << 20, 2},
		{16_000 << 20, 8_000 << 20, 8},
		{2_000 << 20, 1536 << 20, 2},
		{1_000 << 20, 850 << 20, 2},
	} {
		if got := jobMemory(tc.total, tc.slots); got != tc.want {
			t.Errorf("%d bytes, %d slots: %d, want %d", tc.total, tc.slots, got, tc.want)
		}
	}
	m := boot(t)
	m.submit("j", "true\n")
	m.finished("j")
	m.stop()
	j, err := (&spool{cfg: m.cfg}).loadJob("j-1")
	if err != nil || j.ran.Memory <= 0 {
		t.Errorf("marker %+v, %v", j.ran, err)
	}
}
