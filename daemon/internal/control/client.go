package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
)

// maxAnswer bounds an answer, in bytes: more than the longest story, or than
// all jobs in flight.
const maxAnswer = 64 << 20

// A Client asks the daemon whose socket is at Path.
type Client struct{ Path string }

// Jobs returns the jobs that have not ended, what waits in the order in which
// it will run.
func (c Client) Jobs(ctx context.Context) ([]Job, error) {
	var p page
	err := c.do(ctx, http.MethodGet, "/jobs", nil, &p)
	return p.Jobs, err
}

// AllJobs hands every job on record to f, the oldest first and a page at a
// time, until f returns an error.
func (c Client) AllJobs(ctx context.Context, f func([]Job) error) error {
	var after job.ID
	for {
		var p page
		if err := c.do(ctx, http.MethodGet, "/jobs?all=yes&after="+url.QueryEscape(string(after)), nil, &p); err != nil {
			return err
		}
		if p.Next == "" {
			return nil
		}
		if err := f(p.Jobs); err != nil {
			return err
		}
		after = p.Next
	}
}

// Show returns a job with its whole story. ref is its ID or its name.
func (c Client) Show(ctx context.Context, ref string) (Job, error) {
	return c.ask(ctx, http.MethodGet, ref, "", nil)
}

// Cancel makes that a job does not run, or not run on.
func (c Client) Cancel(ctx context.Context, ref, reason string) (Job, error) {
	return c.ask(ctx, http.MethodPost, ref, "/cancel", map[string]any{"reason": reason})
}

// Retry tries at once what a job waits to be tried again. Of one that ended it
// makes a new job, which it returns.
func (c Client) Retry(ctx context.Context, ref string) (Job, error) {
	return c.ask(ctx, http.MethodPost, ref, retryPath, struct{}{})
}

// Prioritize says which of the waiting jobs is next.
func (c Client) Prioritize(ctx context.Context, ref string, priority int) (Job, error) {
	return c.ask(ctx, http.MethodPost, ref, "/priority", map[string]any{"priority": priority})
}

const retryPath = "/retry"

func (c Client) ask(ctx context.Context, method, ref, what string, body any) (j Job, err error) {
	if ref == "" {
		return j, fmt.Errorf("%w: no ID and no name", ErrRequest)
	}
	err = c.do(ctx, method, "/jobs/"+url.PathEscape(ref)+what, body, &j)
	return j, err
}

// do asks and reads the answer.
func (c Client) do(ctx context.Context, method, path string, body, into any) error {
	bound := answerTime
	if strings.HasSuffix(path, retryPath) {
		bound = againTime
	}
	ctx, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	var data bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&data).Encode(body); err != nil {
			return fmt.Errorf("ask the daemon: %w", err)
		}
	}
	r, err := http.NewRequestWithContext(ctx, method, "http://daemon"+path, &data)
	if err != nil {
		return fmt.Errorf("ask the daemon: %w", err)
	}
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", c.Path)
		},
	}
	answer, err := (&http.Client{Transport: transport}).Do(r)
	if err != nil {
		return c.silent(err)
	}
	defer answer.Body.Close()
	text, err := io.ReadAll(io.LimitReader(answer.Body, maxAnswer))
	if err != nil {
		return c.silent(err)
	}
	if answer.StatusCode != http.StatusOK {
		return failed(answer.StatusCode, text)
	}
	if err := json.Unmarshal(text, into); err != nil {
		return fmt.Errorf("read the daemon's answer: %w", err)
	}
	return nil
}

// silent explains why there was no answer.
func (c Client) silent(err error) error {
	var inner *url.Error
	if errors.As(err, &inner) {
		err = inner.Err // without the address, which is none
	}
	err = fmt.Errorf("ask the daemon: %w", err)
	var dial *net.OpError
	if errors.As(err, &dial) && dial.Op == "dial" {
		return hint.With(err, "The daemon does not run here, or has not come so far yet. It runs in the container: "+
			"docker compose exec sidecar osbuilder jobs. Is it up? docker compose logs sidecar")
	}
	if errors.Is(err, context.Canceled) {
		return err
	}
	return hint.With(err, fmt.Sprintf("Either more than %d commands ask at once, or it stops just now, or it is stuck: try again, "+
		"and look at: docker compose logs sidecar", maxAsking))
}

// failed makes an answer an error again.
func failed(status int, text []byte) error {
	var f failure
	if err := json.Unmarshal(text, &f); err != nil || f.Error == "" {
		return fmt.Errorf("ask the daemon: it answered %d %s", status, http.StatusText(status))
	}
	err := error(&said{text: f.Error})
	for _, k := range kinds {
		if f.Kind == k.name {
			err = &said{text: f.Error, kind: k.err}
		}
	}
	for _, h := range f.Hints {
		err = hint.With(err, h)
	}
	return err
}

// said is an error in the daemon's words.
type said struct {
	text string
	kind error
}

func (s *said) Error() string { return s.text }
func (s *said) Unwrap() error { return s.kind }
