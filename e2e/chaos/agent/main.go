// Command agent is in no product image. The chaos test puts it, as root, into
// a copy of the VM's boot image, and has two uses for it:
//
//   - what the jobs can't be trusted to survive, it counts: each job says on
//     its first line to 127.0.0.1:7777 which attempt it is, and goes on when
//     that is on disk;
//   - what no user of the VM may do, it does: commands come by the second
//     serial port, one JSON object a line, and are answered there.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	port    = "/dev/ttyS1"
	counter = "127.0.0.1:7777"
	// Executions, one a line: job, attempt, boot of the VM.
	record = "/data/chaos/executions"
	// Room that is kept for them, so that a full disk doesn't stop the count.
	room = 1 << 20
)

// A command is what the test wants to have run by root.
type command struct {
	ID   string `json:"id"`
	Bash string `json:"bash"`
}

// An answer is what came of it.
type answer struct {
	ID     string `json:"id"`
	Output string `json:"output"`
	Error  string `json:"error,omitempty"`
}

func main() {
	log.SetFlags(0)
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	executions, err := openRecord()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", counter) //nolint:noctx // for as long as the program lives
	if err != nil {
		return err
	}
	// Commands are answered only once jobs can be counted.
	failed := make(chan error, 2)
	go func() { failed <- count(l, executions) }()
	go func() { failed <- serve() }()
	if err := ready(); err != nil {
		return err
	}
	return <-failed
}

// ready tells systemd, which starts the runner then.
func ready() error {
	conn, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET")) //nolint:noctx // at once
	if err != nil {
		return err
	}
	_, err = conn.Write([]byte("READY=1"))
	return errors.Join(err, conn.Close())
}

func openRecord() (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(record), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(record, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return nil, err
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, room); err != nil {
		return nil, fmt.Errorf("keep room for the count: %w", err)
	}
	dir, err := os.Open(filepath.Dir(record))
	if err != nil {
		return nil, err
	}
	return f, errors.Join(f.Sync(), dir.Sync(), dir.Close())
}

// count writes down what jobs say, and tells them when it is on disk.
func count(l net.Listener, f *os.File) error {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return err
	}
	var mu sync.Mutex // guards f
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(time.Minute))
			line, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil {
				return
			}
			mu.Lock()
			_, err = fmt.Fprintf(f, "%s %s\n", strings.TrimSpace(line), strings.TrimSpace(string(boot)))
			err = errors.Join(err, f.Sync())
			mu.Unlock()
			if err != nil {
				fmt.Fprintf(conn, "not counted: %v\n", err)
				return
			}
			fmt.Fprintln(conn, "counted")
		}()
	}
}

// serve runs commands, one after another.
func serve() error {
	tty, err := os.OpenFile(port, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer tty.Close()
	stty := exec.Command("stty", "raw", "-echo", "clocal") //nolint:noctx // at once
	stty.Stdin = tty
	if out, err := stty.CombinedOutput(); err != nil {
		return fmt.Errorf("stty: %w: %s", err, out)
	}
	in := bufio.NewReader(tty)
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return fmt.Errorf("read %s: %w", port, err)
		}
		var c command
		if json.Unmarshal([]byte(line), &c) != nil {
			continue // half a line, of a client that went away
		}
		a := answer{ID: c.ID}
		out, err := exec.Command("bash", "-c", c.Bash).CombinedOutput() //nolint:noctx // the test says how long
		a.Output = string(out)
		if err != nil {
			a.Error = err.Error()
		}
		data, err := json.Marshal(a)
		if err != nil {
			return err
		}
		if _, err := tty.Write(append(data, '\n')); err != nil {
			return fmt.Errorf("write %s: %w", port, err)
		}
	}
}
