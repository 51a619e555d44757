package health

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzCheck: whatever answers on the socket, only one word means health.
func FuzzCheck(f *testing.F) {
	for _, seed := range []string{healthy + "\n", healthy, "healthy\r\n", "no\nhealthy\n", "", "\n", strings.Repeat("x", 5000)} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		path := filepath.Join(t.TempDir(), "s")
		var config net.ListenConfig
		listener, err := config.Listen(t.Context(), "unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		go func() {
			if conn, err := listener.Accept(); err == nil {
				_, _ = conn.Write(answer)
				conn.Close()
			}
		}()
		first, _, _ := strings.Cut(string(answer), "\n")
		if err := Check(t.Context(), path); (err == nil) != (strings.TrimSpace(first) == healthy) {
			t.Errorf("%q: %v", answer, err)
		}
	})
}
