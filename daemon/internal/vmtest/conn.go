package vmtest

import (
	"net"
	"sync"
)

// A conn is a connection that can be cut after some bytes, and frozen.
type conn struct {
	net.Conn
	closed chan struct{}
	frozen chan struct{}

	mu   sync.Mutex // guards what follows
	left int64      // bytes until the cut; 0: no cut
	once sync.Once
	ice  sync.Once
}

func newConn(c net.Conn, cutAfter int64) *conn {
	return &conn{Conn: c, closed: make(chan struct{}), frozen: make(chan struct{}), left: cutAfter}
}

func (c *conn) freeze() { c.ice.Do(func() { close(c.frozen) }) }

// Read implements net.Conn. What arrives at a frozen connection is swallowed.
func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	select {
	case <-c.frozen:
		<-c.closed
		return 0, net.ErrClosed
	default:
		return n, err
	}
}

// Write implements net.Conn.
func (c *conn) Write(p []byte) (int, error) {
	select {
	case <-c.frozen:
		<-c.closed
		return 0, net.ErrClosed
	default:
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left > 0 {
		if int64(len(p)) >= c.left {
			n, _ := c.Conn.Write(p[:c.left])
			_ = c.Close()
			return n, net.ErrClosed
		}
		c.left -= int64(len(p))
	}
	return c.Conn.Write(p)
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
