//go:build e2e

package chaos

import (
	"bufio"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"osbuilder/e2e/internal/harness"
)

// A sign is a line of the sidecar's log that tells how far things are.
type sign struct {
	at   time.Time
	what signKind
}

type signKind int

const (
	linkUp   signKind = iota // the link to the VM is there
	linkLost                 // or not
	hello                    // the runner began
	moved                    // a job moved on: started, said something, ended
	ended                    // a job's outcome is in output/
)

var signs = map[string]signKind{
	"builder is up": linkUp, "link to the builder lost": linkLost, "builder says hello": hello,
	"build output": moved, "job started": moved, "job finished": moved,
	"job is done": ended, "job is failed": ended, "job is cancelled": ended,
}

// A watcher follows the sidecar's log over its restarts.
type watcher struct {
	mu    sync.Mutex // guards signs
	signs []sign
}

func (w *watcher) run(ctx context.Context, container string) {
	var last time.Time
	for ctx.Err() == nil {
		last = w.follow(ctx, container, last)
		pause(ctx, 200*time.Millisecond) // the container is down
	}
}

// follow reads what came after last, until the container ends.
func (w *watcher) follow(ctx context.Context, container string, last time.Time) time.Time {
	args := []string{"logs", "--follow"}
	if !last.IsZero() {
		args = append(args, "--since", last.UTC().Format(time.RFC3339Nano))
	}
	cmd := exec.CommandContext(ctx, "docker", append(args, container)...)
	out, err := cmd.StdoutPipe()
	if err != nil || cmd.Start() != nil {
		return last
	}
	defer func() { _ = cmd.Wait() }()
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var line struct {
			Time    time.Time `json:"time"`
			Message string    `json:"message"`
		}
		if json.Unmarshal(lines.Bytes(), &line) != nil || !line.Time.After(last) {
			continue
		}
		last = line.Time
		kind, ok := signs[line.Message]
		if !ok {
			continue
		}
		w.mu.Lock()
		// Of thousands of lines a second one each 10 ms will do.
		if n := len(w.signs); kind != moved || n == 0 || w.signs[n-1].what != moved || line.Time.Sub(w.signs[n-1].at) > 10*time.Millisecond {
			w.signs = append(w.signs, sign{line.Time, kind})
		}
		w.mu.Unlock()
	}
	return last
}

// recovered returns how long after a fault the next sign came that what was
// broken works again; 0 if there was none, or if another fault came first.
func (w *watcher) recovered(f Injected, next *Injected) time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	up, greeted := true, true
	switch f.Break {
	case KillSidecar:
		up = false
	case KillRunner, ResetVM, PowerOffVM:
		greeted = false
	case KillSSHD, CutNetwork, FillOutput, FillData, FillHost, Repeat:
	}
	since := f.To
	if f.Break == KillSidecar || f.Break == ResetVM || f.Break == PowerOffVM {
		since = f.From // its containers are started again as part of it
	}
	for _, s := range w.signs {
		if s.at.Before(since) {
			if f.Break == KillSSHD || f.Break == CutNetwork || f.Break == FillHost || f.Break.ofVM() {
				if s.at.After(f.From) && s.what == linkLost {
					up = false
				}
			}
			continue
		}
		switch s.what {
		case linkUp:
			up = true
		case linkLost:
			up = false
		case hello:
			greeted = true
		case moved, ended:
			if f.Break == FillOutput && s.what != ended || !up || !greeted {
				continue
			}
			if next != nil && next.From.Before(s.at) {
				return 0
			}
			return s.at.Sub(since)
		}
	}
	return 0
}

// half looks at the outcomes again and again, until ctx ends: each must be
// whole when it is first seen. It returns what was not.
func half(ctx context.Context, p *harness.Project) []string {
	seen := make(map[string]bool)
	var wrong []string
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return wrong
		case <-tick.C:
		}
		names, _ := os.ReadDir(p.Output())
		for _, name := range names {
			if strings.HasPrefix(name.Name(), ".") {
				continue
			}
			folders, _ := os.ReadDir(p.Output(name.Name()))
			for _, folder := range folders {
				path := p.Output(name.Name(), folder.Name())
				if seen[path] || !harness.IsOutcome(path) {
					continue
				}
				seen[path] = true
				if err := whole(path); err != nil {
					wrong = append(wrong, path+": "+err.Error())
				}
			}
		}
	}
}

// whole reports what is missing in an outcome's folder. That its bytes are
// right is looked at in the end.
func whole(folder string) error {
	if _, err := os.Stat(filepath.Join(folder, "build.log")); err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(folder, "result.json"))
	if err != nil {
		return err
	}
	var r harness.Result
	if err := json.Unmarshal(data, &r); err != nil {
		return err
	}
	for _, a := range r.Artifacts {
		info, err := os.Stat(filepath.Join(folder, a.Name))
		if err != nil {
			return err
		}
		if info.Size() != a.Size {
			return &os.PathError{Op: "size of", Path: a.Name, Err: os.ErrInvalid}
		}
	}
	return nil
}
