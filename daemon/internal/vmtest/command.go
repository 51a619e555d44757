package vmtest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/crypto/ssh"
)

// A command runs in a real shell with real pipes, so that what a script of
// ours does when they close is what it would do in the VM.
type command struct {
	s      *Server
	cmd    *exec.Cmd
	input  io.WriteCloser
	output *os.File
	left   *os.File // ends when the last process of the command has
	reaped chan struct{}
	once   sync.Once
}

// command starts a shell for text, or returns nil.
func (s *Server) command(text string) *command {
	faults, _ := s.now()
	path := s.bin + ":/usr/bin:/bin"
	if faults.NoInotify {
		path = "/nonexistent" // what the scripts need besides is built into the shell
	}
	c := &command{s: s, reaped: make(chan struct{})}
	// Not bound to a context: sshd leaves its programs alone too. Every one ends with its input.
	c.cmd = exec.CommandContext(context.WithoutCancel(s.t.Context()), "/bin/sh", "-c", text)
	c.cmd.Env = []string{"PATH=" + path}
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	output, childOutput, err := os.Pipe()
	if err != nil {
		s.t.Error(err)
		return nil
	}
	left, childLeft, err := os.Pipe()
	if err != nil {
		s.t.Error(err)
		return nil
	}
	defer childOutput.Close()
	defer childLeft.Close()
	c.output, c.left = output, left
	c.cmd.Stdout = childOutput
	c.cmd.ExtraFiles = []*os.File{childLeft} // inherited by all that the shell starts
	if c.input, err = c.cmd.StdinPipe(); err == nil {
		err = c.cmd.Start()
	}
	if err != nil {
		s.t.Error(err)
		output.Close()
		left.Close()
		return nil
	}
	s.mu.Lock()
	s.commands = append(s.commands, c)
	s.mu.Unlock()
	s.wg.Go(func() {
		_, _ = io.Copy(io.Discard, left)
		left.Close()
		_ = c.cmd.Wait()
		close(c.reaped)
	})
	return c
}

// serve passes bytes between channel and command until the command's output
// ends.
func (c *command) serve(channel ssh.Channel) {
	var input sync.WaitGroup
	input.Go(func() {
		_, _ = io.Copy(c.input, channel)
		c.input.Close()
	})
	_, _ = io.Copy(channel, io.TeeReader(c.output, &watcherCount{s: c.s}))
	_, _ = channel.SendRequest("exit-status", false, []byte{0, 0, 0, 0})
	_ = channel.Close()
	c.hangUp()
	input.Wait()
}

// hangUp closes the command's files. Who doesn't look at them lives on.
func (c *command) hangUp() {
	c.once.Do(func() {
		c.input.Close()
		c.output.Close()
	})
}

// kill ends what outlived its test.
func (c *command) kill() {
	select {
	case <-c.reaped:
	default: // so its process isn't waited for, and the number still its own
		c.signal("KILL")
	}
}

func (c *command) signal(name string) {
	signals := map[string]syscall.Signal{"KILL": syscall.SIGKILL, "TERM": syscall.SIGTERM, "INT": syscall.SIGINT, "HUP": syscall.SIGHUP}
	if number, ok := signals[name]; ok {
		_ = syscall.Kill(-c.cmd.Process.Pid, number)
	}
}

// Reaped waits until no process of any command that was ever run here is
// left.
func (s *Server) Reaped(ctx context.Context) error {
	s.mu.Lock()
	commands := append([]*command(nil), s.commands...)
	s.mu.Unlock()
	for _, c := range commands {
		select {
		case <-c.reaped:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return nil
}

// watcherCount counts the watchers that say that they are ready.
type watcherCount struct {
	s    *Server
	line []byte
}

func (w *watcherCount) Write(p []byte) (int, error) {
	w.line = append(w.line, p...)
	for {
		line, rest, ok := bytes.Cut(w.line, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		if string(line) == established {
			w.s.watches.add(1)
		}
		w.line = rest
	}
}

// AwaitWatcher waits until inotifywait was ready n times.
func (s *Server) AwaitWatcher(t testing.TB, n int) {
	t.Helper()
	if !s.watches.reach(t.Context(), n) {
		t.Errorf("inotifywait was ready %d times, waited for %d", s.watches.value(), n)
	}
}

// Watchers returns how often inotifywait was ready.
func (s *Server) Watchers() int { return s.watches.value() }

// KillWatchers kills every inotifywait, and not the shells that started
// them.
func (s *Server) KillWatchers() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.commands {
		shell := c.cmd.Process.Pid
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", shell, shell))
		if err != nil {
			continue // it ended
		}
		for _, child := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(child); err == nil {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

// Commands returns how many commands were started.
func (s *Server) Commands() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.commands)
}
