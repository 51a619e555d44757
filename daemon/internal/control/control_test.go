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
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"go.uber.org/zap/zaptest"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var epoch = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// records is a backend of plain records.
type records struct {
	mu   sync.Mutex
	jobs []job.Job
	wait chan struct{} // InFlight waits for it
	// again gets the context that Again has, and lets it go on.
	again chan context.Context
}

func (r *records) add(name string, state job.State, change func(*job.Job)) job.ID {
	at := epoch.Add(time.Duration(len(r.jobs)) * time.Minute)
	j := job.Job{
		ID: job.NewID(at, 0), Name: name, Drop: name + ".sh", State: state, Created: at, Updated: at,
		History: []job.Step{{Time: at, Event: job.Created, State: job.Queued}},
	}
	if change != nil {
		change(&j)
	}
	r.jobs = append(r.jobs, j)
	return j.ID
}

func (r *records) InFlight(ctx context.Context) ([]job.Job, error) {
	if r.wait != nil {
		select {
		case <-r.wait:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return slices.DeleteFunc(slices.Clone(r.jobs), job.Job.Settled), nil
}

func (r *records) Get(_ context.Context, id job.ID) (job.Job, error) {
	for _, j := range r.jobs {
		if j.ID == id {
			return j, nil
		}
	}
	return job.Job{}, ErrNotFound
}

func (r *records) List(_ context.Context, after job.ID, limit int) ([]job.Job, error) {
	var page []job.Job
	for _, j := range r.jobs {
		if j.ID > after && len(page) < limit {
			page = append(page, j)
		}
	}
	return page, nil
}

func (r *records) Named(_ context.Context, name string, limit int) ([]job.Job, error) {
	var found []job.Job
	for _, j := range slices.Backward(r.jobs) {
		if j.Name == name && len(found) < limit {
			found = append(found, j)
		}
	}
	return found, nil
}

func (r *records) change(id job.ID, event job.Event, reason string, edit func(*job.Job)) (job.Job, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, j := range r.jobs {
		if j.ID != id {
			continue
		}
		next, err := j.Apply(event, epoch, reason)
		if err != nil {
			return j, fmt.Errorf("job %s: %w", id, ErrEnded)
		}
		edit(&next)
		r.jobs[i] = next
		return next, nil
	}
	return job.Job{}, ErrNotFound
}

func (r *records) Cancel(_ context.Context, id job.ID, reason string) (job.Job, error) {
	return r.change(id, job.CancelAsked, reason, func(j *job.Job) { j.Cancel = &job.CancelWish{Time: epoch, Reason: reason} })
}

func (r *records) Retry(ctx context.Context, id job.ID) (job.Job, error) {
	if j, _ := r.Get(ctx, id); j.State == job.Running {
		return j, fmt.Errorf("job %s: %w", id, ErrRunning)
	}
	return r.change(id, job.RetryAsked, "", func(*job.Job) {})
}

func (r *records) Prioritize(_ context.Context, id job.ID, n int) (job.Job, error) {
	return r.change(id, job.PriorityChanged, "", func(j *job.Job) { j.Priority = n })
}

func (r *records) Again(ctx context.Context, ended job.Job) (job.Job, error) {
	if r.again != nil {
		r.again <- ctx
		<-r.again
		if err := ctx.Err(); err != nil {
			return job.Job{}, err
		}
		defer close(r.again)
	}
	id := r.add(ended.Name, job.Queued, func(j *job.Job) { j.RetryOf = ended.ID })
	return r.Get(ctx, id)
}

// serve starts a server over the records, until the test ends.
func serve(t *testing.T, r *records) Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "control.sock")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	s := Server{Path: path, Backend: r, Log: zaptest.NewLogger(t)}
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	wait(t, "socket that is closed to others", func() bool {
		info, err := os.Stat(path)
		return err == nil && info.Mode().Perm() == 0o600
	})
	return Client{path}
}

func wait(t *testing.T, what string, done func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-ctx.Done():
			t.Fatalf("no %s", what)
		case <-tick.C:
		}
	}
}

func wantError(t *testing.T, err, want error, parts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want one that is %q", err, want)
	}
	text := err.Error() + " " + strings.Join(hint.Of(err), " ")
	for _, part := range parts {
		if !strings.Contains(text, part) {
			t.Errorf("%q is not in %q", part, text)
		}
	}
}

func TestJobsInOrder(t *testing.T) {
	r := &records{}
	first := r.add("a", job.Queued, nil)
	urgent := r.add("b", job.Queued, func(j *job.Job) { j.Priority = 5 })
	running := r.add("c", job.Running, nil)
	r.add("d", job.Done, nil) // not acknowledged yet, and none of those that wait or run
	later := r.add("e", job.Queued, nil)
	c := serve(t, r)
	jobs, err := c.Jobs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var got []job.ID
	for _, j := range jobs {
		got = append(got, j.ID)
		if j.State == job.Queued && j.Why == "" {
			t.Errorf("%s waits, and nobody says why", j.ID)
		}
		if j.History != nil {
			t.Error("a list tells whole stories")
		}
	}
	if diff := cmp.Diff([]job.ID{running, urgent, first, later}, got); diff != "" {
		t.Error(diff)
	}
}

func TestAllJobs(t *testing.T) {
	r := &records{}
	const count = 2*pageSize + 1
	for n := range count {
		r.add("a", job.States[n%len(job.States)], nil)
	}
	c := serve(t, r)
	n := 0
	if err := c.AllJobs(t.Context(), func(jobs []Job) error {
		if len(jobs) == 0 || len(jobs) > pageSize {
			t.Errorf("a page of %d jobs", len(jobs))
		}
		for _, j := range jobs {
			if j.ID != r.jobs[n].ID {
				t.Fatalf("the %dth is %s", n, j.ID)
			}
			n++
		}
		return nil
	}); err != nil || n != count {
		t.Errorf("%d jobs, %v", n, err)
	}
}

func TestFind(t *testing.T) {
	r := &records{}
	old := r.add("twice", job.Done, nil)
	r.add("twice", job.Failed, nil)
	young := r.add("twice", job.Cancelled, nil)
	open := r.add("once", job.Queued, nil)
	r.add("many", job.Queued, nil)
	r.add("many", job.Running, nil)
	c := serve(t, r)
	for ref, want := range map[string]job.ID{
		string(old): old, "twice": young, "once": open, "once.sh": open, "twice.sh": young, string(open): open,
	} {
		if j, err := c.Show(t.Context(), ref); err != nil || j.ID != want || len(j.History) == 0 {
			t.Errorf("%s is %s, %v; want %s", ref, j.ID, err, want)
		}
	}
	_, err := c.Show(t.Context(), "none")
	wantError(t, err, ErrNotFound, `"none"`, "osbuilder jobs")
	for _, ref := range []string{"../jobs", "a/b", "ü\n\x00", "%2e%2e", "?all=1", strings.Repeat("x", 3000)} {
		_, err := c.Show(t.Context(), ref)
		wantError(t, err, ErrNotFound)
	}
	_, err = c.Show(t.Context(), "")
	wantError(t, err, ErrRequest)
	_, err = c.Cancel(t.Context(), "many", "")
	wantError(t, err, ErrAmbiguous, "many", string(r.jobs[4].ID)+" (queued)", string(r.jobs[5].ID)+" (running)", "by its ID")
	_, err = c.Cancel(t.Context(), "twice", "")
	wantError(t, err, ErrEnded, string(young), "cancelled", "osbuilder retry")
	_, err = c.Prioritize(t.Context(), string(old), 3)
	wantError(t, err, ErrEnded, string(old), "done")
}

func TestChanges(t *testing.T) {
	r := &records{}
	queued := r.add("queued", job.Queued, nil)
	running := r.add("running", job.Running, nil)
	collecting := r.add("collecting", job.Collecting, func(j *job.Job) { j.Result = &pipe.Finished{Status: pipe.StatusSucceeded} })
	ended := r.add("ended", job.Failed, nil)
	c := serve(t, r)
	if j, err := c.Cancel(t.Context(), "running", "because ü"); err != nil || j.CancelAsked.IsZero() || r.jobs[1].Cancel.Reason != "because ü" {
		t.Errorf("%+v, %v", j, err)
	}
	if j, err := c.Prioritize(t.Context(), "queued", -3); err != nil || j.Priority != -3 || j.ID != queued {
		t.Errorf("%+v, %v", j, err)
	}
	for _, n := range []int{job.MinPriority - 1, job.MaxPriority + 1} {
		_, err := c.Prioritize(t.Context(), "queued", n)
		wantError(t, err, ErrRequest, "from -100 to 100")
	}
	if j, err := c.Retry(t.Context(), "collecting"); err != nil || j.ID != collecting {
		t.Errorf("%+v, %v", j, err)
	}
	if j, err := c.Retry(t.Context(), "ended"); err != nil || j.ID == ended || j.RetryOf != ended || j.State != job.Queued {
		t.Errorf("%+v, %v", j, err)
	}
	_, err := c.Retry(t.Context(), string(running))
	wantError(t, err, ErrRunning, "osbuilder cancel "+string(running))
	_, err = c.Cancel(t.Context(), string(collecting), "")
	wantError(t, err, ErrEnded, "succeeded", "on the way to output/")
	_, err = c.Cancel(t.Context(), "queued", strings.Repeat("ü", maxReason+1))
	wantError(t, err, ErrRequest)
}

// What is no request of ours is refused, whatever it is, and bounded.
func TestMalformed(t *testing.T) {
	r := &records{}
	r.add("queued", job.Queued, nil)
	c := serve(t, r)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.Path)
	}}}
	for _, tt := range []struct {
		method, path, body string
		want               int
	}{
		{"POST", "/jobs/queued/cancel", `{"reason":"x","more":1}`, 400},
		{"POST", "/jobs/queued/cancel", ``, 400},
		{"POST", "/jobs/queued/cancel", `{"reason":"` + strings.Repeat("x", 2*maxBody) + `"}`, 400},
		{"POST", "/jobs/queued/priority", `{}`, 400},
		{"POST", "/jobs/queued/priority", `{"priority":1.5}`, 400},
		{"POST", "/jobs/queued/priority", `{"priority":99999999999999999999}`, 400},
		{"POST", "/jobs/queued/fly", `{}`, 404},
		{"DELETE", "/jobs/queued", ``, 405},
		{"GET", "/", ``, 404},
		{"GET", "/jobs?all=1&after=" + strings.Repeat("x", 64), ``, 200},
	} {
		q, err := http.NewRequestWithContext(t.Context(), tt.method, "http://x"+tt.path, strings.NewReader(tt.body))
		if err != nil {
			t.Fatal(err)
		}
		a, err := client.Do(q)
		if err != nil {
			t.Fatal(err)
		}
		_ = a.Body.Close()
		if a.StatusCode != tt.want {
			t.Errorf("%s %s: %d, want %d", tt.method, tt.path, a.StatusCode, tt.want)
		}
	}
	// No HTTP at all, and a header without an end.
	for _, text := range []string{"\x00\x01\x02\r\n\r\n", "GET / HTTP/1.1\r\nX: " + strings.Repeat("x", 64<<10)} {
		conn, err := new(net.Dialer).DialContext(t.Context(), "unix", c.Path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, text) // it may be closed before all is written
		answer, _ := io.ReadAll(io.LimitReader(conn, 1<<10))
		_ = conn.Close()
		if !bytes.HasPrefix(answer, []byte("HTTP/1.1 4")) {
			t.Errorf("%.20q: %q", text, answer)
		}
	}
	if j, err := c.Show(t.Context(), "queued"); err != nil || j.Priority != 0 || !j.CancelAsked.IsZero() {
		t.Errorf("%+v, %v", j, err)
	}
}

func TestNoDaemon(t *testing.T) {
	c := Client{filepath.Join(t.TempDir(), "none.sock")}
	_, err := c.Jobs(t.Context())
	if hints := hint.Of(err); err == nil || len(hints) != 1 || !strings.Contains(hints[0], "docker compose exec sidecar") {
		t.Errorf("%v, hints %q", err, hints)
	}
	// A socket that a killed daemon left.
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Jobs(t.Context()); len(hint.Of(err)) != 1 {
		t.Errorf("%v", err)
	}
	serveAt(t, c)
	if _, err := c.Jobs(t.Context()); err != nil {
		t.Errorf("the next daemon: %v", err)
	}
}

// serveAt starts a server in the place of a socket that was left behind.
func serveAt(t *testing.T, c Client) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	s := Server{Path: c.Path, Backend: &records{}, Log: zaptest.NewLogger(t)}
	go func() { done <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	wait(t, "answer", func() bool {
		_, err := c.Jobs(t.Context())
		return err == nil
	})
}

// More than it can serve are turned away at once, and the next ones served.
func TestTooManyAsk(t *testing.T) {
	r := &records{wait: make(chan struct{})}
	c := serve(t, r)
	results := make(chan error)
	const asking = 2 * maxAsking
	for range asking {
		go func() {
			_, err := c.Jobs(t.Context())
			results <- err
		}()
	}
	for range asking - maxAsking {
		if err := <-results; err == nil || len(hint.Of(err)) != 1 {
			t.Errorf("turned away with: %v", err)
		}
	}
	close(r.wait)
	for range maxAsking {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if _, err := c.Jobs(t.Context()); err != nil {
		t.Error(err)
	}
}

// Who asks for a job again and leaves, or is tired of waiting, leaves no half
// of a job behind: it is made, and the daemon knows it.
func TestLeaveWhileItIsMadeAgain(t *testing.T) {
	r := &records{again: make(chan context.Context)}
	ended := r.add("a", job.Done, func(j *job.Job) { j.Acknowledged = true })
	c := serve(t, r)
	ctx, leave := context.WithCancel(t.Context())
	asked := make(chan error)
	go func() {
		_, err := c.Retry(ctx, string(ended))
		asked <- err
	}()
	daemon := <-r.again
	leave()
	if err := <-asked; !errors.Is(err, context.Canceled) {
		t.Errorf("who left: %v", err)
	}
	r.again <- nil
	if _, going := <-r.again; going || daemon.Err() != nil {
		t.Errorf("its making ended with who asked: %v", daemon.Err())
	}
}

// Who asks while the daemon stops gets an answer, and nothing is left running.
func TestStopWhileAsked(t *testing.T) {
	r := &records{wait: make(chan struct{})}
	path := filepath.Join(t.TempDir(), "control.sock")
	ctx, cancel := context.WithCancel(t.Context())
	s := Server{Path: path, Backend: r, Log: zaptest.NewLogger(t)}
	done, asked := make(chan error, 1), make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	wait(t, "socket", func() bool {
		_, err := os.Stat(path)
		return err == nil
	})
	go func() {
		_, err := Client{path}.Jobs(t.Context())
		asked <- err
	}()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if err := <-asked; err == nil {
		t.Error("no error")
	}
}

func TestText(t *testing.T) {
	code := 3
	now := epoch.Add(26 * time.Hour)
	jobs := []Job{
		{ID: "20260102-030405-000000", Name: "hello", State: job.Running, Attempt: 2, Builder: "vm", Created: epoch},
		{ID: "20260102-030406-000000", Name: "a-long-name", State: job.Queued, Priority: -7, Created: now.Add(-time.Second), Why: "a free slot on vm"},
		{ID: "20260102-030407-000000", Name: "x", State: job.Failed, Attempt: 1, Created: now.Add(-90 * time.Minute), Reason: "line\nline \x1b[31mred\x00"},
		{ID: "20260102-030408-000000", Name: "y", State: job.Running, Attempt: 1, Created: now.Add(-time.Hour), CancelAsked: now},
	}
	var b bytes.Buffer
	if err := WriteJobs(&b, jobs, now); err != nil {
		t.Fatal(err)
	}
	want := "" +
		"ID                      NAME         STATE    PRIORITY  ATTEMPT  AGE    \n" +
		"20260102-030405-000000  hello        running  0         2        1d02h  on vm\n" +
		"20260102-030406-000000  a-long-name  queued   -7        -        1s     waits for a free slot on vm\n" +
		"20260102-030407-000000  x            failed   0         1        1h30m  line line red\\x00\n" +
		"20260102-030408-000000  y            running  0         1        1h00m  is being cancelled\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	// Page by page, a column that was wide stays so.
	b.Reset()
	table := Table{Out: &b, Now: now}
	for _, page := range [][]Job{jobs[:2], jobs[2:3], nil, jobs[3:]} {
		if err := table.Write(page); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("in pages (-want +got):\n%s", diff)
	}

	b.Reset()
	if err := WriteJob(&b, Job{
		ID: "20260102-030405-000000", Name: "hello", Drop: "hello.sh", State: job.Failed, Attempt: 1, Builder: "vm",
		RetryOf: "20260101-000000-000000", CancelAsked: epoch, Status: "failed", ExitCode: &code, Duration: 1500, Reason: "it broke",
		Artifacts: []Artifact{{Name: "a.iso", Size: 1500, SHA256: "00"}}, Output: "hello/20260102-030405-000000",
		History: []job.Step{
			{Time: epoch, Event: job.Created, State: job.Queued},
			{Time: epoch.Add(time.Second), Event: job.Claimed, State: job.Sending, Attempt: 1, Reason: "on vm"},
			{Time: epoch.Add(2 * time.Second), Event: job.Deferred, State: job.Queued, Attempt: 1, Reason: "no room", Folded: 2, Last: epoch.Add(time.Minute)},
		},
	}, now); err != nil {
		t.Fatal(err)
	}
	want = "" +
		"job         20260102-030405-000000\n" +
		"name        hello, dropped as hello.sh\n" +
		"state       failed\n" +
		"does again  20260101-000000-000000\n" +
		"cancel      asked for at 2026-01-02 03:04:05\n" +
		"outcome     failed with exit code 3 after 1.5s: it broke\n" +
		"artifact    a.iso, 1.5 kB, sha256 00\n" +
		"output      output/hello/20260102-030405-000000\n" +
		"\n" +
		"TIME (UTC)           STATE    EVENT     ATTEMPT  REASON\n" +
		"2026-01-02 03:04:05  queued   created   -        \n" +
		"2026-01-02 03:04:06  sending  claimed   1        on vm\n" +
		"2026-01-02 03:04:07  queued   deferred  1        no room (3 times, last at 2026-01-02 03:05:05)\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// FuzzText: whatever is on record, a job is shown in as many lines as it has
// things to tell, none of them with a control character.
func FuzzText(f *testing.F) {
	if seeds, err := os.ReadDir("testdata/fuzz/FuzzText"); err != nil || len(seeds) == 0 {
		f.Fatalf("no seeds: %v", err)
	}
	f.Fuzz(func(t *testing.T, name, text string) {
		j := Job{ID: "a", Name: name, Drop: name, State: job.Queued, Why: text, History: []job.Step{{Reason: text}, {Reason: name}}}
		var b bytes.Buffer
		if err := errors.Join(WriteJob(&b, j, epoch), WriteJobs(&b, []Job{j}, epoch)); err != nil {
			t.Fatal(err)
		}
		lines := 11
		if text == "" {
			lines--
		}
		if n := strings.Count(b.String(), "\n"); n != lines {
			t.Errorf("%d lines:\n%s", n, b.String())
		}
		if strings.ContainsFunc(b.String(), func(r rune) bool { return r < ' ' && r != '\n' || r == 0x7f || r >= 0x80 && r < 0xa0 }) {
			t.Errorf("%q", b.String())
		}
		if _, err := json.Marshal(j); err != nil {
			t.Error(err)
		}
	})
}
