package runner

import (
	"os"
	"strings"
	"testing"
	"time"

	"osbuilder/pipe"
)

func cancelHeader(id string, attempt int) pipe.Header {
	return pipe.Header{Kind: pipe.KindCancel, Owner: owner, Job: id, Attempt: attempt}
}

// One that waits ends at once, without ever having run; its slot is nobody's.
func TestCancelWaiting(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 1
	m.start()
	wait, open := m.gate("g")
	m.submit("runs", wait)
	m.submit("waits", "echo ran >$OUT/ran\n")
	m.submit("next", "echo next\n")
	accepted(t, m.send(1, cancelHeader("waits", 1), ""))
	f := m.finished("waits")
	if f.Status != pipe.StatusCancelled || f.Reason == "" || f.LogLength != 0 {
		t.Errorf("finished: %+v", f)
	}
	accepted(t, m.send(2, cancelHeader("waits", 1), "")) // again: nothing changes
	accepted(t, m.send(2, jobHeader("waits", 1), "echo ran >$OUT/ran\n"))
	open()
	m.finished("next")
	if n := len(find(m.events(), ofJob(pipe.TypeStarted, "waits"))); n != 0 {
		t.Error("it was started")
	}
	if n := len(find(m.events(), ofJob(pipe.TypeFinished, "waits"))); n != 1 {
		t.Errorf("%d outcomes", n)
	}
	accepted(t, m.send(1, ackHeader("waits", 1), ""))
}

// SIGTERM reaches all that the job started, wherever it went.
func TestCancelRunning(t *testing.T) {
	m := boot(t)
	ready, _ := m.gate("never")
	m.submit("j", `trap 'echo "script was told"; exit 0' TERM
setsid --fork bash -c 'trap "echo child was told; exit" TERM; echo up; while :; do sleep 0.01; done'
(trap "" HUP; exec 9>&-; setsid sleep 1000) &
echo begun
`+ready)
	m.until("both", func() bool { o := m.output("j"); return strings.Contains(o, "up\n") && strings.Contains(o, "begun\n") })
	accepted(t, m.send(1, cancelHeader("j", 1), ""))
	f := m.finished("j")
	if f.Status != pipe.StatusCancelled {
		t.Errorf("finished: %+v", f)
	}
	if out := m.output("j"); !strings.Contains(out, "child was told\n") {
		t.Errorf("output %q", out)
	}
	if left, err := members(Spec{Result: m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).result()}); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A script on its way into another program has no environment, by which
// [ProcessUnits] knows it; this one never has it again.
func TestCancelWithoutEnvironment(t *testing.T) {
	m := boot(t)
	m.submit("j", "exec env -i bash -c 'echo begun; exec sleep 1000'\n")
	m.until("its output", func() bool { return m.output("j") == "begun\n" })
	accepted(t, m.send(1, cancelHeader("j", 1), ""))
	if f := m.finished("j"); f.Status != pipe.StatusCancelled {
		t.Errorf("finished: %+v", f)
	}
}

// What doesn't heed SIGTERM is killed when the grace is over.
func TestCancelStubborn(t *testing.T) {
	for name, script := range map[string]string{
		"script": "trap 'echo no' TERM; echo up; while :; do sleep 0.01; done\n",
		"child":  "setsid --fork bash -c 'trap \"\" TERM; echo up; while :; do sleep 0.01; done' 9>&-; sleep 1000\n",
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.cfg.Grace = 200 * time.Millisecond
			m.start()
			m.submit("j", script)
			m.until("the first line", func() bool { return strings.HasPrefix(m.output("j"), "up\n") })
			accepted(t, m.send(1, cancelHeader("j", 1), ""))
			if f := m.finished("j"); f.Status != pipe.StatusCancelled || name == "script" && f.Signal != "SIGKILL" {
				t.Errorf("finished: %+v", f)
			}
		})
	}
}

// The first outcome counts.
func TestCancelEnded(t *testing.T) {
	m := boot(t)
	m.submit("j", "exit 3\n")
	m.finished("j")
	accepted(t, m.send(1, cancelHeader("j", 1), ""))
	accepted(t, m.send(1, cancelHeader("unknown", 7), ""))
	m.reboot()
	if f := m.finished("j"); f.Status != pipe.StatusFailed {
		t.Errorf("finished: %+v", f)
	}
}

// The unit ended, and nobody took that up before the wish came.
func TestCancelAfterResult(t *testing.T) {
	m := newMachine(t)
	kill, _ := m.startChild("-")
	wait, open := m.gate("g")
	m.submit("j", wait+"exit 3\n")
	m.await("start", 1, ofType(pipe.TypeStarted))
	kill()
	open()
	p := m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1})
	m.until("the result", func() bool { return exists(p.result()) })
	m.rename(request(t, cancelHeader("j", 1), ""))
	m.start()
	m.await("answer", 1, answer("cancel/j/1"))
	if f := m.finished("j"); f.Status != pipe.StatusFailed || f.ExitCode == nil || *f.ExitCode != 3 {
		t.Errorf("finished: %+v", f)
	}
}

// The runner dies at each step of a cancellation; the next goes on with it.
func TestKilledWhileCancelling(t *testing.T) {
	for _, dies := range []string{"cancel.part", "outcome.part"} {
		for _, runs := range []bool{true, false} {
			name := dies + ", waiting"
			if runs {
				name = dies + ", running"
			}
			t.Run(name, func(t *testing.T) {
				m := newMachine(t)
				m.cfg.Slots = 1
				wait, open := m.gate("g")
				m.start()
				m.submit("first", "echo up\n"+wait)
				m.until("its output", func() bool { return m.output("first") == "up\n" })
				m.submit("second", "echo second\n")
				m.stop()
				victim := "second"
				if runs {
					victim = "first"
				}
				_, wait2 := m.startChild(dies)
				m.rename(request(t, cancelHeader(victim, 1), ""))
				wait2()
				m.start()
				if dies == "cancel.part" {
					m.rename(request(t, cancelHeader(victim, 1), "")) // unanswered: written again
				}
				if f := m.finished(victim); f.Status != pipe.StatusCancelled {
					t.Errorf("finished: %+v", f)
				}
				open()
				other := "first"
				if runs {
					other = "second"
				}
				if f := m.finished(other); f.Status != pipe.StatusSucceeded {
					t.Errorf("the other: %+v", f)
				}
			})
		}
	}
}

// A job that was to end, and that the VM's death ended, is not to run again.
func TestCancelAndReboot(t *testing.T) {
	m := newMachine(t)
	m.cfg.Slots = 1
	m.start()
	wait, _ := m.gate("g")
	m.submit("runs", "trap '' TERM; echo up\nwhile :; do "+wait+"done\n")
	m.submit("waits", "true\n")
	m.until("its output", func() bool { return m.output("runs") == "up\n" })
	m.stop()
	// The wishes are on disk, and nothing was done about them.
	for _, id := range []string{"runs", "waits"} {
		if err := os.WriteFile(m.cfg.paths(pipe.JobRef{Job: id, Attempt: 1}).cancel(), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	m.cfg.Boot += "+"
	m.start()
	for _, id := range []string{"runs", "waits"} {
		if f := m.finished(id); f.Status != pipe.StatusCancelled {
			t.Errorf("%s: %+v", id, f)
		}
	}
}

// Only who owns the VM cancels in it.
func TestCancelOfOthers(t *testing.T) {
	m := boot(t)
	wait, open := m.gate("g")
	m.submit("j", wait)
	h := cancelHeader("j", 1)
	h.Owner = "sidecar-2"
	if e := m.send(1, h, ""); e.Refused == nil || e.Refused.Reason != pipe.ReasonOwner {
		t.Errorf("answer %+v", e)
	}
	open()
	if f := m.finished("j"); f.Status != pipe.StatusSucceeded {
		t.Errorf("finished: %+v", f)
	}
}
