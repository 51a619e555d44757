package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe/effect"
)

// Bounds of what a client can make the daemon do or hold.
const (
	maxBody    = 4 << 10 // bytes of a request
	maxReason  = 500     // characters
	maxAsking  = 16      // connections at once
	pageSize   = 200     // jobs in an answer
	answerTime = 30 * time.Second
	againTime  = 10 * time.Minute // a retry that copies its source, of 2 GB at most
	stopTime   = 5 * time.Second
	maxNamed   = 10 // jobs of one name that a question back lists
)

// A Backend knows the jobs and can change them. Its errors wrap those of this
// package where they say what the user did.
type Backend interface {
	// InFlight returns the jobs for which something is left to do.
	InFlight(ctx context.Context) ([]job.Job, error)
	Get(ctx context.Context, id job.ID) (job.Job, error)
	// List returns at most limit jobs whose ID comes after the given one.
	List(ctx context.Context, after job.ID, limit int) ([]job.Job, error)
	// Named returns at most limit jobs of that name, the youngest first.
	Named(ctx context.Context, name string, limit int) ([]job.Job, error)

	Cancel(ctx context.Context, id job.ID, reason string) (job.Job, error)
	// Retry tries at once what a job in flight waits to be tried again.
	Retry(ctx context.Context, id job.ID) (job.Job, error)
	Prioritize(ctx context.Context, id job.ID, priority int) (job.Job, error)
	// Again makes a new job that does again what an ended one did. Its context
	// is the daemon's: whoever asked may have left.
	Again(ctx context.Context, ended job.Job) (job.Job, error)
}

// A Server answers on the socket at Path.
type Server struct {
	Path    string
	Backend Backend
	Log     *zap.Logger
}

// Run serves until ctx is over.
func (s *Server) Run(ctx context.Context) error {
	// One that a killed process left. Only one daemon runs on one /tmp.
	if err := effect.Remove(s.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove stale control socket: %w", err)
	}
	var config net.ListenConfig
	plain, err := config.Listen(ctx, "unix", s.Path)
	if err != nil {
		return fmt.Errorf("open control socket: %w", err)
	}
	listener := &ownListener{Listener: plain, log: s.Log, free: make(chan struct{}, maxAsking)}
	if err := effect.Chmod(s.Path, 0o600); err != nil {
		return errors.Join(fmt.Errorf("close control socket to others: %w", err), plain.Close())
	}
	server := &http.Server{
		Handler:           s.handler(ctx),
		ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: answerTime, IdleTimeout: 5 * time.Second,
		MaxHeaderBytes: 8 << 10,
		BaseContext:    func(net.Listener) context.Context { return ctx },
		ErrorLog:       log.New(io.Discard, "", 0), // of clients that broke off
	}
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		// Whoever asked is answered, even if it is that the daemon stops.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
		defer cancel()
		if server.Shutdown(grace) != nil {
			_ = server.Close()
		}
	})
	err = server.Serve(listener)
	if !stop() {
		<-stopped
		return nil
	}
	return errors.Join(fmt.Errorf("serve control socket: %w", err), server.Close())
}

// ownListener lets in only processes of the daemon's own user, and only so
// many at once.
type ownListener struct {
	net.Listener
	log  *zap.Logger
	free chan struct{}
}

// Accept passes over everybody else.
func (l *ownListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		uid, err := peer(conn)
		if err != nil || uid != os.Getuid() {
			l.log.Warn("somebody else's connection to the control socket was refused", zap.Int("uid", uid), zap.Error(err))
			_ = conn.Close()
			continue
		}
		select {
		case l.free <- struct{}{}:
			return &countedConn{Conn: conn, done: sync.OnceFunc(func() { <-l.free })}, nil
		default:
			_ = conn.Close() // busy: it says so itself, and nobody waits for nothing
		}
	}
}

// peer returns the user at the other end.
func peer(conn net.Conn) (int, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok {
		return -1, errors.New("not a Unix socket")
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return -1, err
	}
	uid := -1
	var credErr error
	err = raw.Control(func(fd uintptr) {
		var cred *unix.Ucred
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr == nil {
			uid = int(cred.Uid)
		}
	})
	return uid, errors.Join(err, credErr)
}

// countedConn gives its place back once.
type countedConn struct {
	net.Conn
	done func()
}

// Close implements net.Conn.
func (c *countedConn) Close() error {
	c.done()
	return c.Conn.Close()
}

// handler answers until ctx, the daemon's, is over.
func (s *Server) handler(ctx context.Context) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /jobs", s.answer(s.list))
	mux.HandleFunc("GET /jobs/{ref}", s.answer(s.show))
	mux.HandleFunc("POST /jobs/{ref}/cancel", s.answer(s.cancel))
	mux.HandleFunc("POST /jobs/{ref}/retry", func(w http.ResponseWriter, r *http.Request) {
		// Where it can't be put off, whoever asked is told too late, and the job is made all the same.
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(againTime))
		s.answer(func(r *http.Request) (any, error) { return s.retry(ctx, r) })(w, r)
	})
	mux.HandleFunc("POST /jobs/{ref}/priority", s.answer(s.priority))
	return mux
}

// answer makes a handler of what returns an answer or an error.
func (s *Server) answer(f func(r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, maxBody)
		body, err := f(r)
		status := http.StatusOK
		if err != nil {
			status, body = s.failed(err)
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		if err := json.NewEncoder(w).Encode(body); err != nil {
			s.Log.Debug("answer a command", zap.Error(err)) // the one who asked has gone
		}
	}
}

func (s *Server) failed(err error) (int, failure) {
	f := failure{Kind: "internal", Error: err.Error(), Hints: hint.Of(err)}
	for _, k := range kinds {
		if errors.Is(err, k.err) {
			f.Kind = k.name
			return k.status, f
		}
	}
	s.Log.Warn("a command could not be carried out", zap.Error(err))
	return http.StatusInternalServerError, f
}

// A page is an answer to GET /jobs. The last one of all is the first that is
// empty.
type page struct {
	Jobs []Job `json:"jobs"`
	// Next is what the next page comes after.
	Next job.ID `json:"next,omitempty"`
}

// list answers with the jobs that have not ended, or with a page of all.
func (s *Server) list(r *http.Request) (any, error) {
	p := page{Jobs: []Job{}}
	if r.URL.Query().Get("all") == "" {
		jobs, err := s.Backend.InFlight(r.Context())
		if err != nil {
			return nil, err
		}
		jobs = slices.DeleteFunc(jobs, func(j job.Job) bool { return j.State.Terminal() })
		slices.SortStableFunc(jobs, inOrder)
		for _, j := range jobs {
			p.Jobs = append(p.Jobs, tell(j, false))
		}
		return p, nil
	}
	jobs, err := s.Backend.List(r.Context(), job.ID(r.URL.Query().Get("after")), pageSize)
	if err != nil {
		return nil, err
	}
	for _, j := range jobs {
		p.Jobs = append(p.Jobs, tell(j, false))
		p.Next = j.ID
	}
	return p, nil
}

// inOrder puts what a VM has first, and what waits in the order in which it
// will be claimed.
func inOrder(a, b job.Job) int {
	if waits := a.State == job.Queued; waits != (b.State == job.Queued) {
		if waits {
			return 1
		}
		return -1
	}
	switch {
	case a.State != job.Queued:
		return -job.Youngest(a, b)
	case a.Before(b):
		return -1
	default:
		return 1
	}
}

func (s *Server) show(r *http.Request) (any, error) {
	j, err := s.find(r, true)
	if err != nil {
		return nil, err
	}
	return tell(j, true), nil
}

func (s *Server) cancel(r *http.Request) (any, error) {
	var body struct {
		Reason string `json:"reason"`
	}
	if err := read(r, &body); err != nil {
		return nil, err
	}
	if len([]rune(body.Reason)) > maxReason {
		return nil, fmt.Errorf("%w: a reason of more than %d characters", ErrRequest, maxReason)
	}
	j, err := s.find(r, false)
	if err != nil {
		return nil, err
	}
	return s.changed(s.Backend.Cancel(r.Context(), j.ID, body.Reason))
}

func (s *Server) retry(daemon context.Context, r *http.Request) (any, error) {
	if err := read(r, &struct{}{}); err != nil {
		return nil, err
	}
	j, err := s.find(r, true)
	if err != nil {
		return nil, err
	}
	if !j.State.Terminal() {
		return s.changed(s.Backend.Retry(r.Context(), j.ID)) //nolint:contextcheck // only what makes a job outlives whoever asked
	}
	return s.changed(s.Backend.Again(daemon, j))
}

func (s *Server) priority(r *http.Request) (any, error) {
	var body struct {
		Priority *int `json:"priority"`
	}
	if err := read(r, &body); err != nil {
		return nil, err
	}
	if body.Priority == nil || *body.Priority < job.MinPriority || *body.Priority > job.MaxPriority {
		return nil, hint.With(fmt.Errorf("%w: no such priority", ErrRequest),
			fmt.Sprintf("Give a number from %d to %d; the higher goes first, and every drop begins with 0.", job.MinPriority, job.MaxPriority))
	}
	j, err := s.find(r, false)
	if err != nil {
		return nil, err
	}
	return s.changed(s.Backend.Prioritize(r.Context(), j.ID, *body.Priority))
}

// changed tells of a job as it is now.
func (s *Server) changed(j job.Job, err error) (any, error) {
	switch {
	case errors.Is(err, ErrRunning):
		return nil, hint.With(err, "It can be cancelled first: osbuilder cancel "+string(j.ID))
	case errors.Is(err, ErrEnded) && j.State == job.Collecting:
		return nil, fmt.Errorf("%w: it %s, and its outcome is on the way to output/", err, j.Result.Status)
	case err != nil:
		return nil, err
	}
	return tell(j, true), nil
}

func read(r *http.Request, into any) error {
	d := json.NewDecoder(r.Body)
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: %w", ErrRequest, err)
	}
	return nil
}

// find returns the job that an ID or a name means. Of several jobs of one name
// only those count that have not ended; where all have, and ended ones count,
// the youngest.
func (s *Server) find(r *http.Request, endedToo bool) (job.Job, error) {
	ref := r.PathValue("ref")
	switch j, err := s.Backend.Get(r.Context(), job.ID(ref)); {
	case err == nil && j.State.Terminal() && !endedToo:
		return j, endedError(j)
	case err == nil:
		return j, nil
	case !errors.Is(err, ErrNotFound):
		return job.Job{}, err
	}
	inFlight, err := s.Backend.InFlight(r.Context())
	if err != nil {
		return job.Job{}, err
	}
	for _, name := range slices.Compact([]string{ref, job.OutputName(ref)}) { // also by what was dropped
		open := slices.DeleteFunc(slices.Clone(inFlight), func(j job.Job) bool { return j.Name != name || j.State.Terminal() })
		if len(open) == 1 {
			return open[0], nil
		}
		if len(open) > 1 {
			return job.Job{}, ambiguous(name, open)
		}
		ended, err := s.Backend.Named(r.Context(), name, 1)
		switch {
		case err != nil:
			return job.Job{}, err
		case len(ended) > 0 && !endedToo && ended[0].State.Terminal():
			return job.Job{}, endedError(ended[0])
		case len(ended) > 0:
			return ended[0], nil
		}
	}
	return job.Job{}, hint.With(fmt.Errorf("%w: %s", ErrNotFound, strconv.Quote(ref)),
		"osbuilder jobs lists those that wait or run, osbuilder jobs --all every one on record.")
}

func endedError(j job.Job) error {
	return hint.With(fmt.Errorf("job %s: %w: it is %s", j.ID, ErrEnded, j.State),
		"osbuilder retry "+string(j.ID)+" does it again, as a new job.")
}

func ambiguous(name string, jobs []job.Job) error {
	slices.SortStableFunc(jobs, inOrder)
	lines := make([]string, 0, maxNamed)
	for _, j := range jobs[:min(len(jobs), maxNamed)] {
		lines = append(lines, fmt.Sprintf("%s (%s)", j.ID, j.State))
	}
	if more := len(jobs) - len(lines); more > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", more))
	}
	return hint.With(fmt.Errorf("%w: %s: %s", ErrAmbiguous, strconv.Quote(name), strings.Join(lines, ", ")),
		"Say which one by its ID.")
}
