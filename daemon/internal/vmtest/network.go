package vmtest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// A Network lies between clients and one server, in memory: with it a test
// runs in a bubble of testing/synctest, where ten minutes take no time and
// each bound is met to the second. What it does not carry is held back, as TCP
// does it by sending again, and arrives once it is carried again.
type Network struct {
	mu      sync.Mutex // guards what follows, and all of its connections
	change  *sync.Cond
	down    Direction
	refuses bool
	dials   []time.Time
	backlog []net.Conn
	wires   []*wire // one end of each connection
	closed  bool
	hold    int // bytes from the server that a connection carries; then it is silent for good. 0: no limit
}

// A Direction is which way a network carries nothing.
type Direction uint8

// The directions; both is their sum.
const (
	ToVM Direction = 1 << iota
	FromVM
)

// NewNetwork returns a network that carries everything.
func NewNetwork() *Network {
	n := &Network{}
	n.change = sync.NewCond(&n.mu)
	return n
}

func (n *Network) set(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
	n.change.Broadcast()
}

// Cut makes the network carry nothing these ways. 0 mends it.
func (n *Network) Cut(d Direction) { n.set(func() { n.down = d }) }

// Refuse has connections refused, as where nobody listens; established ones
// stay.
func (n *Network) Refuse(yes bool) { n.set(func() { n.refuses = yes }) }

// Hold has each new connection carry so many bytes from the server and then
// nothing more, for good. 0: no limit.
func (n *Network) Hold(after int) { n.set(func() { n.hold = after }) }

// Freeze makes all present connections carry nothing more, as when what knew
// of them is gone: a VM that was reset. Each end can still close its own.
func (n *Network) Freeze() {
	n.set(func() {
		for _, w := range n.wires {
			w.in.frozen, w.out.frozen = true, true
		}
	})
}

// Dials returns when somebody tried to connect, whatever came of it.
func (n *Network) Dials() []time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]time.Time(nil), n.dials...)
}

// Dial is the client's side, for what takes a function in the place of a
// net.Dialer's.
func (n *Network) Dial(ctx context.Context, _, addr string) (net.Conn, error) {
	fail := func(err error) error { return fmt.Errorf("dial tcp %s: %w", addr, err) }
	defer context.AfterFunc(ctx, func() { n.set(func() {}) })()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.dials = append(n.dials, time.Now())
	for n.down != 0 && !n.refuses && ctx.Err() == nil {
		n.change.Wait()
	}
	switch {
	case ctx.Err() != nil:
		return nil, fail(ctx.Err())
	case n.refuses || n.closed:
		return nil, fail(syscall.ECONNREFUSED)
	}
	up, down := &stream{way: ToVM}, &stream{way: FromVM, hold: n.hold}
	client := &wire{n: n, in: down, out: up}
	n.backlog = append(n.backlog, &wire{n: n, in: up, out: down})
	n.wires = append(n.wires, client)
	n.change.Broadcast()
	return client, nil
}

// Accept implements net.Listener.
func (n *Network) Accept() (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for len(n.backlog) == 0 && !n.closed {
		n.change.Wait()
	}
	if n.closed {
		return nil, net.ErrClosed
	}
	c := n.backlog[0]
	n.backlog = n.backlog[1:]
	return c, nil
}

// Close implements net.Listener.
func (n *Network) Close() error {
	n.set(func() { n.closed = true })
	return nil
}

// Addr implements net.Listener.
func (n *Network) Addr() net.Addr { return address{} }

type address struct{}

// Network implements net.Addr.
func (address) Network() string { return "tcp" }

// String implements net.Addr.
func (address) String() string { return "vm:22" }

// A stream is one way of a connection.
type stream struct {
	way    Direction
	data   []byte
	ended  bool // the writer closed it
	frozen bool
	hold   int
	total  int // bytes written
}

// A wire is one end of a connection.
type wire struct {
	n       *Network
	in, out *stream
	closed  bool
	until   time.Time // deadline; zero: none
}

// Read implements net.Conn.
func (w *wire) Read(p []byte) (int, error) {
	w.n.mu.Lock()
	defer w.n.mu.Unlock()
	for {
		carried := w.n.down&w.in.way == 0
		switch {
		case w.closed:
			return 0, net.ErrClosed
		case w.late():
			return 0, os.ErrDeadlineExceeded
		case carried && len(w.in.data) > 0 && !w.in.frozen:
			n := copy(p, w.in.data)
			w.in.data = w.in.data[n:]
			return n, nil
		case carried && w.in.ended && w.in.hold == 0:
			return 0, io.EOF
		}
		w.n.change.Wait()
	}
}

// Write implements net.Conn. It never blocks: a kernel has room for all that
// SSH's windows let through.
func (w *wire) Write(p []byte) (int, error) {
	w.n.mu.Lock()
	defer w.n.mu.Unlock()
	switch {
	case w.closed:
		return 0, net.ErrClosed
	case w.late():
		return 0, os.ErrDeadlineExceeded
	}
	carried := len(p)
	if hold := w.out.hold; hold > 0 {
		carried = max(0, min(carried, hold-w.out.total))
	}
	w.out.total += len(p)
	w.out.data = append(w.out.data, p[:carried]...)
	w.n.change.Broadcast()
	return len(p), nil
}

// Close implements net.Conn.
func (w *wire) Close() error {
	w.n.set(func() { w.closed, w.out.ended = true, true })
	return nil
}

func (w *wire) late() bool { return !w.until.IsZero() && !time.Now().Before(w.until) }

// SetDeadline implements net.Conn.
func (w *wire) SetDeadline(t time.Time) error {
	w.n.set(func() { w.until = t })
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), func() { w.n.set(func() {}) })
	}
	return nil
}

// SetReadDeadline implements net.Conn.
func (w *wire) SetReadDeadline(t time.Time) error { return w.SetDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (w *wire) SetWriteDeadline(t time.Time) error { return w.SetDeadline(t) }

// LocalAddr implements net.Conn.
func (w *wire) LocalAddr() net.Addr { return address{} }

// RemoteAddr implements net.Conn.
func (w *wire) RemoteAddr() net.Addr { return address{} }
