// Package health answers the container's health check: the question whether
// the daemon's own process works, over a Unix socket.
package health

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

const (
	// CheckTime bounds Check. Docker ends the whole check after the 3 s that
	// compose.yaml gives it, and then nobody learns why it failed.
	CheckTime = 2500 * time.Millisecond
	// probeTime bounds one probe, so that its answer is still in time.
	probeTime = 2 * time.Second
	// healthy is the answer when nothing is wrong; any other is what is wrong.
	healthy = "healthy"
	// maxAnswer bounds the answer, in bytes.
	maxAnswer = 4 << 10
	// maxAsking bounds how many may ask at once.
	maxAsking = 8
)

// A Server answers on the socket at Path.
type Server struct {
	Path string
	// Probe returns what is wrong with the daemon, or nil. It is called for
	// each check, also by several goroutines at once, and ends with its context.
	Probe func(ctx context.Context) error
	Log   *zap.Logger
}

// Run serves until ctx is over.
func (s *Server) Run(ctx context.Context) error {
	// One that a killed process left. Only one daemon runs on one /tmp.
	if err := effect.Remove(s.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove stale health socket: %w", err)
	}
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "unix", s.Path)
	if err != nil {
		return fmt.Errorf("open health socket: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = listener.Close() })
	defer stop()

	var answers errgroup.Group
	answers.SetLimit(maxAsking)
	for {
		conn, err := listener.Accept()
		if err != nil {
			_ = answers.Wait()
			if ctx.Err() != nil {
				return nil
			}
			return errors.Join(fmt.Errorf("serve health checks: %w", err), listener.Close())
		}
		answers.Go(func() error {
			s.answer(ctx, conn)
			return nil
		})
	}
}

func (s *Server) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	text := healthy
	if err := s.Probe(ctx); err != nil {
		text = strings.Join(strings.Fields(err.Error()), " ")
	}
	if err := conn.SetWriteDeadline(time.Now().Add(probeTime)); err != nil {
		s.Log.Debug("answer health check", zap.Error(err))
		return
	}
	if _, err := io.WriteString(conn, text+"\n"); err != nil {
		s.Log.Debug("answer health check", zap.Error(err)) // the one who asked has gone
	}
}

// Check asks the daemon whose socket is at path. It returns within CheckTime.
func Check(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, CheckTime)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "unix", path)
	if err != nil {
		return hint.With(fmt.Errorf("ask the daemon: %w", err),
			"The daemon does not run, or has not come so far yet. Look at: docker compose logs sidecar")
	}
	defer conn.Close()
	// Reading does not know the context.
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	answer, err := bufio.NewReader(io.LimitReader(conn, maxAnswer)).ReadString('\n')
	switch answer = strings.TrimSpace(answer); {
	case answer == healthy:
		return nil
	case answer != "":
		return errors.New(answer)
	default:
		return fmt.Errorf("ask the daemon: no answer: %w", errors.Join(err, context.Cause(ctx)))
	}
}
