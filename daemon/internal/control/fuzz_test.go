package control

import (
	"bytes"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/job"
)

// FuzzRequest: whatever is asked for on the socket, the answer is JSON, the
// fault is never ours, and the jobs' records stay ones that make sense.
func FuzzRequest(f *testing.F) {
	for _, seed := range [][3]string{
		{"GET", "/jobs", ""},
		{"GET", "/jobs?all=yes&after=x", ""},
		{"GET", "/jobs/waits", ""},
		{"GET", "/jobs/twice%0a", ""},
		{"POST", "/jobs/runs/cancel", `{"reason":"by hand\u001b[31m"}`},
		{"POST", "/jobs/ended/retry", ""},
		{"POST", "/jobs/waits/priority", `{"priority":100}`},
		{"POST", "/jobs/waits/priority", `{"priority":1e999}`},
		{"POST", "/jobs/waits/priority", `{"priority":-101,"x":1}`},
		{"DELETE", "/", "{"},
	} {
		f.Add(seed[0], seed[1], []byte(seed[2]))
	}
	f.Fuzz(func(t *testing.T, method, target string, body []byte) {
		at, err := url.ParseRequestURI(target)
		if err != nil {
			return
		}
		r, err := http.NewRequestWithContext(t.Context(), method, at.String(), bytes.NewReader(body))
		if err != nil {
			return
		}
		known := &records{}
		known.add("waits", job.Queued, nil)
		known.add("runs", job.Running, func(j *job.Job) { j.Attempt, j.Builder = 1, "vm" })
		known.add("ended", job.Failed, nil)
		s := &Server{Backend: known, Log: zap.NewNop()}
		w := httptest.NewRecorder()
		s.handler(t.Context()).ServeHTTP(w, r)
		if w.Code >= http.StatusInternalServerError {
			t.Errorf("%s %q %q: %d %s", method, target, body, w.Code, w.Body)
		}
		if w.Header().Get("Content-Type") == "application/json" && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %q %q: %q", method, target, body, w.Body)
		}
		for _, j := range known.jobs {
			if j.Priority < job.MinPriority || j.Priority > job.MaxPriority || j.Cancel != nil && len([]rune(j.Cancel.Reason)) > maxReason {
				t.Errorf("%s %q %q: %+v", method, target, body, j)
			}
		}
	})
}
