package vmtest

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
)

// A Nix is a nix-daemon as far as the runner asks it: it greets.
type Nix struct {
	Socket string

	t    testing.TB
	stop func()
}

// NewNix starts one.
func NewNix(t testing.TB) *Nix {
	t.Helper()
	n := &Nix{Socket: filepath.Join(t.TempDir(), "socket"), t: t}
	n.Start()
	return n
}

// Start starts it, after Stop.
func (n *Nix) Start() {
	n.t.Helper()
	var config net.ListenConfig
	l, err := config.Listen(n.t.Context(), "unix", n.Socket)
	if err != nil {
		n.t.Fatal(err)
	}
	var all sync.WaitGroup
	n.stop = sync.OnceFunc(func() { _ = l.Close(); all.Wait() })
	n.t.Cleanup(n.stop)
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer conn.Close()
				greet(conn)
			})
		}
	})
}

// Stop ends it, and its socket is gone.
func (n *Nix) Stop() { n.stop() }

// greet is how Nix's worker protocol begins (src/libstore/daemon.cc, 2.26).
func greet(conn net.Conn) {
	order := binary.LittleEndian
	var hello uint64
	if err := binary.Read(conn, order, &hello); err != nil {
		return
	}
	const magic, version, ready = 0x6478696f, 1<<8 | 38, 0x616c7473
	if err := binary.Write(conn, order, []uint64{magic, version, ready}); err != nil {
		return
	}
	_, _ = io.Copy(io.Discard, conn)
}
