package health

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve runs a server until the test ends, and returns its socket.
func serve(t *testing.T, probe func(context.Context) error) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	// What a killed daemon leaves.
	stale, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path)
	if err != nil {
		t.Fatal(err)
	}
	stale.(*net.UnixListener).SetUnlinkOnClose(false)
	stale.Close()

	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	server := &Server{Path: path, Probe: probe, Log: zaptest.NewLogger(t)}
	go func() { ended <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("the server ended with %v", err)
		}
	})
	// A stale socket refuses.
	for {
		if conn, err := (&net.Dialer{}).DialContext(t.Context(), "unix", path); err == nil {
			conn.Close()
			return path
		}
		select {
		case err := <-ended:
			t.Fatal(err)
		default:
		}
	}
}

func TestHealthy(t *testing.T) {
	path := serve(t, func(context.Context) error { return nil })
	for range 3 {
		if err := Check(t.Context(), path); err != nil {
			t.Error(err)
		}
	}
}

func TestUnhealthySaysWhy(t *testing.T) {
	path := serve(t, func(context.Context) error { return errors.New("dispatch has not moved\nfor 2m") })
	if err := Check(t.Context(), path); err == nil || err.Error() != "dispatch has not moved for 2m" {
		t.Error(err)
	}
}

func TestHangingProbe(t *testing.T) {
	path := serve(t, func(ctx context.Context) error {
		<-ctx.Done()
		return ctx.Err()
	})
	start := time.Now()
	err := Check(t.Context(), path)
	if err == nil || time.Since(start) > 3*time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

func TestSilentServer(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	listener, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", path) // takes connections, says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := Check(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

func TestNoServer(t *testing.T) {
	err := Check(t.Context(), filepath.Join(t.TempDir(), "none"))
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "ask the daemon") {
		t.Error(err)
	}
}

func TestSocketCannotBeMade(t *testing.T) {
	server := &Server{Path: filepath.Join(t.TempDir(), "none", "socket"), Log: zaptest.NewLogger(t)}
	if err := server.Run(t.Context()); err == nil {
		t.Error("no error")
	}
}
