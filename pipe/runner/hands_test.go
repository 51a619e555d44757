package runner

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/pipe"
)

// Somebody else does something to the folder of the pipe. What is written
// after it is carried out, and of what was before nothing is lost.
func TestOtherHands(t *testing.T) {
	for name, tc := range map[string]struct {
		do   func(m *machine) error
		said string // in the runner's log
	}{
		"pipe_in removed": {func(m *machine) error { return os.Remove(m.cfg.pipeIn()) }, ""},
		"pipe_in a folder": {func(m *machine) error {
			if err := os.Remove(m.cfg.pipeIn()); err != nil {
				return err
			}
			// In one step: the runner is at it as soon as it is there.
			aside := filepath.Join(m.cfg.Data, "aside")
			if err := os.MkdirAll(filepath.Join(aside, "with", "more"), 0o700); err != nil {
				return err
			}
			return os.Rename(aside, m.cfg.pipeIn())
		}, "was a folder"},
		"a folder renamed to pipe_in": {func(m *machine) error {
			if err := os.Mkdir(m.cfg.Pipe+"/d", 0o700); err != nil {
				return err
			}
			if err := os.Remove(m.cfg.pipeIn()); err != nil {
				return err
			}
			return os.Rename(m.cfg.Pipe+"/d", m.cfg.pipeIn())
		}, "was a folder"},
		"garbage in pipe_in": {func(m *machine) error {
			return os.WriteFile(m.cfg.pipeIn(), bytes.Repeat([]byte("#pipe {\x00\xff\n"), 1000), 0o600)
		}, ""},
		"pipe_out a folder": {func(m *machine) error {
			if err := os.Remove(m.cfg.pipeOut()); err != nil {
				return err
			}
			return os.Mkdir(m.cfg.pipeOut(), 0o700)
		}, "in which all is told again"},
		"all removed": {func(m *machine) error { m.removeFolder(); return nil }, "is made and watched again"},
		"a file in the folder's place": {func(m *machine) error {
			m.removeFolder()
			if err := os.WriteFile(m.cfg.Pipe, nil, 0o600); err != nil {
				return nil //nolint:nilerr // the folder was made anew already
			}
			m.until("a word about it", func() bool { return strings.Contains(m.log.String(), "move it away") })
			return os.Remove(m.cfg.Pipe)
		}, "is made and watched again"},
		"thousands of files": {func(m *machine) error {
			for i := range 5000 {
				if err := os.WriteFile(filepath.Join(m.cfg.Pipe, fmt.Sprintf("pipe_out.%d", i)), nil, 0o600); err != nil {
					return err
				}
			}
			return nil
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.cfg.look = 20 * time.Millisecond
			m.start()
			m.submit("before", "echo before\n")
			m.finished("before")
			wait, open := m.gate("g")
			m.submit("runs", "echo one\n"+wait+"echo two\n")
			m.until("its output", func() bool { return m.output("runs") == "one\n" })
			first := m.events()[0].Hello.Generation
			if err := tc.do(m); err != nil {
				t.Fatal(err)
			}
			m.until("a word about it", func() bool { return strings.Contains(m.log.String(), tc.said) })
			// As the sidecar does: until it is answered.
			data := request(t, jobHeader("after", 1), "echo after\n")
			answered := func() bool {
				events, err := os.ReadFile(m.cfg.pipeOut())
				return err == nil && bytes.Contains(events, []byte(`"request":"job/after/1"`))
			}
			m.until("the answer", func() bool {
				if answered() {
					return true
				}
				temp := filepath.Join(m.cfg.Pipe, ".pipe_in.test")
				if err := os.WriteFile(temp, data, 0o600); err == nil {
					_ = os.Rename(temp, m.cfg.pipeIn()) // a folder may be there, for a moment
				}
				return answered()
			})
			open()
			m.finished("after")
			m.finished("runs")
			m.finished("before")
			events := m.events()
			for id, want := range map[string]string{"before": "before\n", "runs": "one\ntwo\n", "after": "after\n"} {
				if got := string(output(t, events, id, 0)); got != want {
					t.Errorf("output of %s: %q", id, got)
				}
				if n := len(find(events, ofJob(pipe.TypeStarted, id))); n != 1 {
					t.Errorf("%s was started %d times", id, n)
				}
			}
			if g := events[0].Hello.Generation; g != first && !strings.Contains(m.log.String(), "in which all is told again") {
				t.Errorf("generation %s after %s, and not a word", g, first)
			}
		})
	}
}

// removeFolder removes the pipe's folder, as a person would: once more if the
// runner, which sees pipe_out go first, has put a new one there.
func (m *machine) removeFolder() {
	m.t.Helper()
	m.until("the folder is gone", func() bool { return os.RemoveAll(m.cfg.Pipe) == nil })
}
