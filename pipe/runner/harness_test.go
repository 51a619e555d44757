package runner

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/internal/testenv"
	"osbuilder/pipe"
)

// patience bounds every wait: for a machine that does much else.
const patience = time.Minute

// A machine is a VM for a test: a runner that can be stopped and started
// over the same folders.
type machine struct {
	t    *testing.T
	cfg  Config
	log  *syncBuffer
	stop func() // of the runner that lives
}

// newMachine returns a machine whose runner does not live yet.
func newMachine(t *testing.T) *machine {
	t.Helper()
	dir := t.TempDir()
	m := &machine{t: t, log: &syncBuffer{}}
	m.cfg = Config{
		Pipe:    filepath.Join(dir, "nexus_bootstrap"),
		Data:    filepath.Join(dir, "data"),
		Store:   filepath.Join(dir, "store"),
		GCRoots: filepath.Join(dir, "gcroots"),
		Units:   ProcessUnits{},
		Image:   "test-1",
		Version: "test",
		Boot:    "boot-1",
		Log:     m.log,
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
		defer cancel()
		if err := (ProcessUnits{}).KillAll(ctx, m.cfg.Data); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the runner's log:\n%s", m.log)
		}
	})
	return m
}

// smallDisk gives the machine a data disk of its own, of 20 MiB.
func (m *machine) smallDisk() {
	m.t.Helper()
	if err := os.Mkdir(m.cfg.Data, 0o700); err != nil {
		m.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", m.cfg.Data, "tmpfs", 0, "size=20m"); err != nil {
		testenv.Lacks(m.t, "no tmpfs can be mounted here: %v", err)
	}
	m.t.Cleanup(func() {
		if err := unix.Unmount(m.cfg.Data, unix.MNT_DETACH); err != nil {
			m.t.Error(err)
		}
	})
}

// boot starts a runner on a new machine.
func boot(t *testing.T) *machine {
	t.Helper()
	m := newMachine(t)
	m.start()
	return m
}

// start starts a runner and returns when it watches.
func (m *machine) start() {
	m.t.Helper()
	r := New(m.cfg)
	ctx, cancel := context.WithCancel(m.t.Context())
	ended := make(chan error, 1)
	go func() { ended <- r.Run(ctx) }()
	m.stop = sync.OnceFunc(func() {
		m.t.Helper()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				m.t.Errorf("Run: %v", err)
			}
		case <-time.After(patience):
			m.t.Error("Run does not end")
		}
	})
	m.t.Cleanup(m.stop)
	select {
	case <-r.Ready():
	case err := <-ended:
		m.t.Fatalf("Run: %v", err)
	case <-time.After(patience):
		m.t.Fatal("the runner is not ready")
	}
}

// reboot stops the runner and starts another, in another boot.
func (m *machine) reboot() {
	m.t.Helper()
	m.stop()
	m.cfg.Boot += "+"
	m.start()
}

// until waits for done to be true, looking at each change in the folder of
// the pipe, and now and then for what happens elsewhere.
func (m *machine) until(what string, done func() bool) {
	m.t.Helper()
	w, err := newWatcher(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	defer w.close()
	// A folder that is missing right now is what some tests are about.
	if _, err := w.add(m.cfg.Pipe, unix.IN_MODIFY|unix.IN_MOVED_TO); err != nil && !errors.Is(err, unix.ENOENT) {
		m.t.Fatal(err)
	}
	for deadline := time.Now().Add(patience); !done(); {
		if time.Now().After(deadline) {
			m.t.Fatalf("waited %s in vain for %s; events:\n%s", patience, what, m.raw())
		}
		if _, err := w.read(20 * time.Millisecond); err != nil {
			m.t.Fatal(err)
		}
	}
}

func (m *machine) raw() string {
	data, err := os.ReadFile(m.cfg.pipeOut())
	if err != nil {
		return err.Error()
	}
	return string(data)
}

// events reads pipe_out. A line that is no event fails the test, unless torn
// ones are expected.
func (m *machine) events() []pipe.Event {
	m.t.Helper()
	data, err := os.ReadFile(m.cfg.pipeOut())
	if err != nil {
		m.t.Fatal(err)
	}
	return parseEvents(m.t, data)
}

func parseEvents(t *testing.T, data []byte) []pipe.Event {
	t.Helper()
	var events []pipe.Event
	var s pipe.Splitter
	if err := s.Push(data, func(line []byte, _ int64) error {
		e, err := pipe.ParseEvent(line)
		if err != nil {
			return fmt.Errorf("%w in %q", err, line)
		}
		events = append(events, e)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return events
}

// find returns the events for which match holds.
func find(events []pipe.Event, match func(pipe.Event) bool) []pipe.Event {
	return slices.DeleteFunc(slices.Clone(events), func(e pipe.Event) bool { return !match(e) })
}

// await waits for the nth event for which match holds.
func (m *machine) await(what string, n int, match func(pipe.Event) bool) pipe.Event {
	m.t.Helper()
	var found []pipe.Event
	m.until(what, func() bool {
		found = find(m.events(), match)
		return len(found) >= n
	})
	return found[n-1]
}

func ofType(t pipe.Type) func(pipe.Event) bool {
	return func(e pipe.Event) bool { return e.Type == t }
}

func ofJob(t pipe.Type, job string) func(pipe.Event) bool {
	return func(e pipe.Event) bool { return e.Type == t && e.Job == job }
}

// answers to a request.
func answer(key string) func(pipe.Event) bool {
	return func(e pipe.Event) bool {
		return e.Accepted != nil && e.Accepted.Request == key || e.Refused != nil && e.Refused.Request == key
	}
}

// finished waits for a job's end.
func (m *machine) finished(job string) pipe.Finished {
	m.t.Helper()
	return *m.await(job+" to finish", 1, ofJob(pipe.TypeFinished, job)).Finished
}

// output puts a job's log events together, and fails on a gap or a repeat.
func (m *machine) output(job string) string {
	m.t.Helper()
	return string(output(m.t, m.events(), job, 0))
}

func output(t *testing.T, events []pipe.Event, job string, from int64) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, e := range find(events, ofJob(pipe.TypeLog, job)) {
		if e.Log.Offset != from+int64(b.Len()) {
			t.Fatalf("output of %s goes on at %d, want %d", job, e.Log.Offset, from+int64(b.Len()))
		}
		b.Write(e.Log.Data)
	}
	return b.Bytes()
}

const owner = "sidecar-1"

func jobHeader(id string, attempt int) pipe.Header {
	return pipe.Header{Kind: pipe.KindJob, Owner: owner, Job: id, Attempt: attempt, Name: id}
}

func ackHeader(id string, attempt int) pipe.Header {
	return pipe.Header{Kind: pipe.KindAcknowledge, Owner: owner, Job: id, Attempt: attempt}
}

func request(t *testing.T, h pipe.Header, body string) []byte {
	t.Helper()
	data, err := pipe.Marshal(h, []byte(body))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// rename writes a request as the sidecar does.
func (m *machine) rename(data []byte) {
	m.t.Helper()
	f, err := os.CreateTemp(m.cfg.Pipe, "request-*")
	if err != nil {
		m.t.Fatal(err)
	}
	_, werr := f.Write(data)
	if err := errors.Join(werr, f.Close(), os.Rename(f.Name(), m.cfg.pipeIn())); err != nil {
		m.t.Fatal(err)
	}
}

// echo writes a request as a person does.
func (m *machine) echo(text string) {
	m.t.Helper()
	if err := os.WriteFile(m.cfg.pipeIn(), []byte(text), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// send writes a request and returns its nth answer.
func (m *machine) send(n int, h pipe.Header, body string) pipe.Event {
	m.t.Helper()
	m.rename(request(m.t, h, body))
	return m.await(fmt.Sprintf("answer %d to %s", n, h.Key()), n, answer(h.Key()))
}

// submit has a job accepted.
func (m *machine) submit(id, script string) {
	m.t.Helper()
	if e := m.send(1, jobHeader(id, 1), script); e.Type != pipe.TypeAccepted {
		m.t.Fatalf("job %s: %+v", id, e.Refused)
	}
}

// gate is a file that scripts wait for, so that a job runs as long as a test
// wants.
func (m *machine) gate(name string) (wait string, open func()) {
	path := filepath.Join(m.t.TempDir(), name)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		m.t.Fatal(err)
	}
	once := sync.OnceFunc(func() {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			m.t.Error(err)
			return
		}
		m.t.Cleanup(func() { f.Close() })
		if _, err := f.WriteString(strings.Repeat("go\n", 100)); err != nil {
			m.t.Error(err)
		}
	})
	m.t.Cleanup(once) // no job outlives its test
	return "read -r _ <" + path + "\n", once
}

// A syncBuffer is a log that several goroutines write.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
