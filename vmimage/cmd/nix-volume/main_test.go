package main

import (
	"bufio"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// The lock is held by what was started under it, too, and whoever waits for it
// says so.
func TestLock(t *testing.T) {
	file := filepath.Join(t.TempDir(), "osbuilder", "lock")
	fd, err := lock(file, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	heir := exec.CommandContext(t.Context(), "cat")
	end, err := heir.StdinPipe()
	if err := errors.Join(err, heir.Start(), syscall.Close(fd)); err != nil {
		t.Fatal(err)
	}
	out, said := io.Pipe()
	type outcome struct {
		fd  int
		err error
	}
	second := make(chan outcome, 1)
	go func() {
		fd, err := lock(file, said)
		_ = said.Close()
		second <- outcome{fd, err}
	}()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || !strings.Contains(line, "waiting for another one") {
		t.Error(err, line)
	}
	select {
	case got := <-second:
		t.Error("it did not wait:", got.err)
	default:
	}
	if err := errors.Join(end.Close(), heir.Wait()); err != nil {
		t.Fatal(err)
	}
	got := <-second
	if err := errors.Join(got.err, syscall.Close(got.fd)); err != nil {
		t.Error(err)
	}
}
