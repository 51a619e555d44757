package runner

import (
	"errors"
	"flag"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/pipe"
)

var keepSpool = flag.String("keep-spool", "", "make testdata/spool/NAME of what this version leaves on disk")

// spools are what runners left on disk, one folder for each form that it had.
// A new form gets one more, by -run KeepSpool -keep-spool NAME; none goes.
const spools = "testdata/spool"

// kept is where the runners that made them worked: their events name it.
const kept = "/vm"

// TestKeepSpool leaves jobs in every state: finished, failed, acknowledged,
// ended and not collected, running, waiting, and wished to end.
func TestKeepSpool(t *testing.T) {
	if *keepSpool == "" {
		return // a folder is made only on request
	}
	m := newMachine(t)
	m.cfg.Pipe, m.cfg.Data = filepath.Join(kept, "nexus_bootstrap"), filepath.Join(kept, "data")
	t.Cleanup(func() {
		if err := os.RemoveAll(kept); err != nil {
			t.Error(err)
		}
	})
	m.start()
	m.submit("done", "seq 5000\necho x >$OUT/x\n")
	m.finished("done")
	m.submit("failed", "echo why; exit 7\n")
	m.finished("failed")
	m.submit("gone", "true\n")
	m.finished("gone")
	m.send(1, ackHeader("gone", 1), "")
	m.reboot() // so that there are two generations, and output that the first told
	m.finished("failed")
	wait, _ := m.gate("never")
	meanwhile, open := m.gate("g")
	m.submit("runs", "seq 5000\n"+wait)
	m.submit("ended", meanwhile+"echo ended\necho x >$OUT/x\n")
	m.submit("waits", "echo waited\n")
	m.submit("unwanted", "echo ran\n")
	m.until("its output", func() bool { return strings.HasSuffix(m.output("runs"), "\n5000\n") })
	m.await("two to run", 2, ofType(pipe.TypeStarted))
	m.ask(m.size(), consumeHeader(m.events()[0].Hello.Generation, m.size()))
	m.stop()
	open()
	path := func(id string) paths { return m.cfg.paths(pipe.JobRef{Job: id, Attempt: 1}) }
	m.until("the result", func() bool { return exists(path("ended").result()) })
	if err := (&spool{cfg: m.cfg, room: &reserve{}}).wish(pipe.JobRef{Job: "unwanted", Attempt: 1}, wish{Boot: m.cfg.Boot, Uptime: 1}); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(spools, *keepSpool)
	for _, dir := range []string{"nexus_bootstrap", "data/spool", "data/artifacts", "data/jobs/ended-1/out"} {
		if err := os.CopyFS(filepath.Join(to, dir), os.DirFS(filepath.Join(kept, dir))); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"lock", "reserve"} {
		if err := os.Remove(filepath.Join(to, "data/spool", name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
	}
}

// What a runner of another version left is taken up, in the same boot of the
// VM and in the next.
func TestUpgrade(t *testing.T) {
	versions, err := os.ReadDir(spools)
	if err != nil {
		t.Fatal(err)
	}
	if len(versions) < 2 {
		t.Fatalf("%d kept spools", len(versions))
	}
	for _, version := range versions {
		for _, rebooted := range []bool{false, true} {
			name := version.Name() + ", same boot"
			if rebooted {
				name = version.Name() + ", next boot"
			}
			t.Run(name, func(t *testing.T) {
				m := newMachine(t)
				root := filepath.Dir(m.cfg.Pipe)
				if err := os.CopyFS(root, os.DirFS(filepath.Join(spools, version.Name()))); err != nil {
					t.Fatal(err)
				}
				m.cfg.Boot = "boot-1+"
				if rebooted {
					m.cfg.Boot = "boot-2"
				}
				// Git keeps no times.
				o := &out{cfg: m.cfg}
				before, err := readOut(m.cfg.pipeOut(), (&spool{cfg: m.cfg}).mark())
				if err != nil {
					t.Fatal(err)
				}
				if _, mtime := o.noted(before.gen); mtime != 0 {
					if err := os.Chtimes(m.cfg.pipeOut(), time.Time{}, time.Unix(0, mtime)); err != nil {
						t.Fatal(err)
					}
				}
				m.start()
				m.upgraded(before, rebooted)
			})
		}
	}
}

// upgraded checks that the runner knows the truth of every job.
func (m *machine) upgraded(before history, rebooted bool) {
	m.t.Helper()
	start := before.size
	if rebooted {
		start = 0
	}
	known, err := os.ReadDir(filepath.Join(m.cfg.spool(), "jobs"))
	if err != nil {
		m.t.Fatal(err)
	}
	of := func(id string) told { return before.jobs[pipe.JobRef{Job: id, Attempt: 1}] }
	var events []pipe.Event
	ends := func(id string) []pipe.Event { return find(events, ofJob(pipe.TypeFinished, id)) }
	want := map[string]pipe.Status{}
	for _, e := range known {
		id := strings.TrimSuffix(e.Name(), "-1")
		want[id] = map[string]pipe.Status{
			"done": pipe.StatusSucceeded, "failed": pipe.StatusFailed, "ended": pipe.StatusSucceeded,
			"runs": pipe.StatusInterrupted, "waits": pipe.StatusSucceeded, "unwanted": pipe.StatusCancelled,
		}[id]
		m.until(id+" to have ended", func() bool {
			events = m.from(start)
			return len(ends(id)) > 0 || of(id).finished && !rebooted
		})
	}
	if len(want) < 5 {
		m.t.Fatalf("jobs: %v", want)
	}
	hello := events[0].Hello
	if hello == nil || (hello.Generation == before.gen) == rebooted || len(hello.Jobs) != len(want) {
		m.t.Fatalf("it begins with %+v, before that was generation %s", events[0], before.gen)
	}
	for id, want := range want {
		n := 1
		if of(id).finished && !rebooted {
			n = 0
		}
		if e := ends(id); len(e) != n || n > 0 && e[0].Finished.Status != want {
			m.t.Errorf("%s ended %d times, want %d: %+v", id, len(e), n, e)
		}
	}
	for id, want := range map[string]string{"done": "", "failed": "", "runs": "", "ended": "ended\n", "waits": "waited\n"} {
		// Where the generation before told of it, output doesn't begin anew.
		from := of(id).log
		if info, err := os.Stat(m.cfg.paths(pipe.JobRef{Job: id, Attempt: 1}).log()); from == 0 && want == "" && err == nil {
			from = info.Size()
		}
		if got := string(output(m.t, events, id, from)); got != want {
			m.t.Errorf("output of %s goes on with %q", id, got)
		}
	}
	m.rename(request(m.t, jobHeader("gone", 1), "true\n"))
	m.until("the answer", func() bool {
		events = m.from(start)
		return len(find(events, answer("job/gone/1"))) > 0
	})
	if n := len(find(events, ofJob(pipe.TypeStarted, "gone"))); n > 0 {
		m.t.Error("what was acknowledged ran again")
	}
}
