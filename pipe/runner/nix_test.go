package runner

import (
	"encoding/binary"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"osbuilder/pipe"
)

// A nixServer is a nix-daemon that answers as the test wants.
type nixServer struct {
	socket string

	mu    sync.Mutex // guards serve
	serve func(net.Conn)
}

func newNixServer(t *testing.T, serve func(net.Conn)) *nixServer {
	t.Helper()
	s := &nixServer{socket: filepath.Join(t.TempDir(), "socket"), serve: serve}
	s.listen(t)
	return s
}

// listen makes the socket; the returned function removes it.
func (s *nixServer) listen(t *testing.T) (stop func()) {
	t.Helper()
	var config net.ListenConfig
	l, err := config.Listen(t.Context(), "unix", s.socket)
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	stop = func() { _ = l.Close(); all.Wait() }
	t.Cleanup(stop)
	all.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			serve := s.serve
			s.mu.Unlock()
			all.Go(func() {
				defer conn.Close()
				serve(conn)
			})
		}
	})
	return stop
}

func (s *nixServer) set(serve func(net.Conn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.serve = serve
}

// What a nix-daemon can be.
func nixWorks(t *testing.T) func(net.Conn) {
	return func(conn net.Conn) {
		if err := answerNix(conn); err != nil {
			t.Errorf("the daemon would log an error: %v", err)
		}
	}
}

// nixAnswers is one that may be left at any time: by a runner that stops.
func nixAnswers(conn net.Conn) { _ = answerNix(conn) }

// answerNix does as daemon.cc of Nix 2.26 does, and returns nil if the client
// leaves where it may.
func answerNix(conn net.Conn) error {
	order := binary.LittleEndian
	var magic, version, affinity, reserve uint64
	if err := binary.Read(conn, order, &magic); err != nil {
		return err
	}
	if err := binary.Write(conn, order, []uint64{nixDaemon, 1<<8 | 38}); err != nil {
		return err
	}
	for _, value := range []*uint64{&version, &affinity, &reserve} {
		if err := binary.Read(conn, order, value); err != nil {
			return err
		}
	}
	if magic != nixClient || version != 1<<8|32 || affinity != 0 || reserve != 0 {
		return net.UnknownNetworkError("of another protocol")
	}
	if err := binary.Write(conn, order, uint64(nixReady)); err != nil {
		return err
	}
	if err := binary.Read(conn, order, &magic); err != io.EOF { //nolint:errorlint // nothing but the end
		return err
	}
	return nil
}

func nixCloses(conn net.Conn) { // its store can't be opened
	var magic uint64
	_ = binary.Read(conn, binary.LittleEndian, &magic)
}

func nixHangs(conn net.Conn) { _, _ = io.Copy(io.Discard, conn) }

func nixIsAnother(conn net.Conn) {
	nixCloses(conn) // what is not read of a connection that is closed can take the answer with it
	_, _ = conn.Write([]byte("HTTP/1.1 400 Bad Request\r\n"))
}

func TestCheckNix(t *testing.T) {
	for name, tt := range map[string]struct {
		serve func(net.Conn)
		want  string
	}{
		"works":     {nixWorks(t), ""},
		"closes":    {nixCloses, "nix-daemon closes the connection: as a rule it can't open its store or database"},
		"hangs":     {nixHangs, "nix-daemon does not answer within"},
		"something": {nixIsAnother, "is no nix-daemon"},
		"later": {func(conn net.Conn) { // it wants more of a client
			nixCloses(conn)
			_ = binary.Write(conn, binary.LittleEndian, []uint64{nixDaemon, 2 << 8})
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			wait := patience
			if name == "hangs" {
				wait = 50 * time.Millisecond
			}
			err := checkNix(t.Context(), newNixServer(t, tt.serve).socket, wait)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
	if err := checkNix(t.Context(), filepath.Join(t.TempDir(), "none"), patience); err == nil || !strings.Contains(err.Error(), "nobody listens for it") {
		t.Errorf("no socket: %v", err)
	}
}

// A VM whose Nix is broken says so in its first word, and says hello anew when
// that has changed.
func TestHelloTellsThatNixIsBroken(t *testing.T) {
	s := newNixServer(t, nixCloses)
	m := newMachine(t)
	m.cfg.NixSocket, m.cfg.NixEvery = s.socket, 5*time.Millisecond
	m.start()
	if first := m.events()[0].Hello; first == nil || !strings.HasPrefix(first.Unfit, "Nix is broken: nix-daemon closes the connection") {
		t.Fatalf("the first hello is %+v", first)
	}
	s.set(nixIsAnother)
	if second := m.await("another hello", 2, ofType(pipe.TypeHello)).Hello; !strings.Contains(second.Unfit, "is no nix-daemon") {
		t.Errorf("then it says %+v", second)
	}
	s.set(nixAnswers)
	if third := m.await("a hello without it", 3, ofType(pipe.TypeHello)).Hello; third.Unfit != "" || third.Generation != m.events()[0].Hello.Generation {
		t.Errorf("then it says %+v", third)
	}
	m.submit("after", "echo hello\n")
	m.finished("after")
	if n := len(find(m.events(), ofType(pipe.TypeHello))); n != 3 {
		t.Errorf("%d hellos", n)
	}
}

// A Nix that breaks later is told of, and that it works again; to find it
// broken once is not enough.
func TestHelloTellsThatNixBreaks(t *testing.T) {
	var looks, bad atomic.Int32
	s := &nixServer{socket: filepath.Join(t.TempDir(), "socket"), serve: func(conn net.Conn) {
		if bad.Add(-1) == 0 {
			nixCloses(conn)
		} else {
			nixAnswers(conn)
		}
		looks.Add(1)
	}}
	stop := s.listen(t)
	m := newMachine(t)
	m.cfg.NixSocket, m.cfg.NixEvery = s.socket, 5*time.Millisecond
	m.start()
	m.until("looks at a Nix that works", func() bool { return looks.Load() >= 3 })
	bad.Store(1)
	m.until("looks after the one that failed", func() bool { return bad.Load() <= -3 })
	if n := len(find(m.events(), ofType(pipe.TypeHello))); n != 1 {
		t.Errorf("%d hellos", n)
	}
	stop()
	second := m.await("another hello", 2, ofType(pipe.TypeHello)).Hello
	if !strings.HasPrefix(second.Unfit, "Nix is broken: nobody listens for it: ") || second.Generation != m.events()[0].Hello.Generation {
		t.Errorf("then it says %+v", second)
	}
	s.listen(t)
	if third := m.await("a hello without it", 3, ofType(pipe.TypeHello)).Hello; third.Unfit != "" {
		t.Errorf("then it says %+v", third)
	}
}

// A Nix that takes its time holds up no start: that it works is told when it does.
func TestSlowNixHoldsUpNoStart(t *testing.T) {
	answer := make(chan struct{})
	release := sync.OnceFunc(func() { close(answer) })
	defer release()
	s := newNixServer(t, func(conn net.Conn) {
		<-answer
		_ = answerNix(conn) // the first one has left
	})
	m := newMachine(t)
	m.cfg.NixSocket, m.cfg.nixFirst, m.cfg.nixPatience, m.cfg.NixEvery = s.socket, 10*time.Millisecond, 2*patience, 2*patience
	m.start()
	if first := m.events()[0].Hello; first == nil || first.Unfit == "" {
		t.Errorf("the first hello is %+v", first)
	}
	release()
	if second := m.await("another hello", 2, ofType(pipe.TypeHello)).Hello; second.Unfit != "" {
		t.Errorf("then it says %+v", second)
	}
}

// It can be stopped while it waits for Nix.
func TestStoppedWhileNixHangs(t *testing.T) {
	m := newMachine(t)
	m.cfg.NixSocket, m.cfg.NixEvery = newNixServer(t, nixHangs).socket, time.Millisecond
	m.cfg.nixFirst, m.cfg.nixPatience = time.Millisecond, time.Millisecond
	m.start()
	m.stop()
}
