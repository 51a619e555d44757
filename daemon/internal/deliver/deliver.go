// Package deliver brings the outcome of a job into output/: whole, checked and
// at once, or not at all.
//
// A job's folder is put together below output/.partial/ID and renamed to
// output/NAME/ID when every byte of it is checked and synced. So it can be
// stopped at any step and done again.
package deliver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// Errors that callers branch on.
var (
	// ErrDigest: what came is not what the VM announced, in its bytes or in
	// their number. What was fetched of the file is removed.
	ErrDigest = errors.New("artifact is not the one that was announced")
	// ErrName: a job or an artifact has a name that can't be one of a file.
	ErrName = errors.New("impossible name")
	// ErrLatest: the job's folder is published, but "latest" could not be made
	// to point at it. Publish returns the folder with it.
	ErrLatest = errors.New("job is published, but its link \"latest\" is not made")
)

// A Source copies files out of a VM.
type Source interface {
	// Copy writes the file at path, from offset to its end, to w.
	Copy(ctx context.Context, path string, offset int64, w io.Writer) (int64, error)
}

// A Publisher puts jobs' outcomes into the output folder. Calls for different
// jobs may run at once.
type Publisher struct {
	Output string // the folder that users look into
	State  string // where the jobs' logs and sources lie
	Keep   int64  // bytes that no artifact may take of the room there is

	Now func() time.Time // nil: time.Now

	step func(name string) // tests: called after each step
}

// Names in a job's folder that are ours.
const (
	sumsName   = "SHA256SUMS"
	logName    = "build.log"
	resultName = "result.json"
	sourceName = "source"
	latestName = "latest"
	partial    = ".partial"
)

func (p *Publisher) did(step string) {
	if p.step != nil {
		p.step(step)
	}
}

// Publish brings the outcome of j into output/ and returns its folder there:
// NAME/ID. from is asked only if j succeeded with artifacts, and may be nil
// otherwise. Done again after any end, it goes on where it stopped; after
// success it changes nothing.
func (p *Publisher) Publish(ctx context.Context, j job.Job, from Source) (string, error) {
	if !pipe.ValidID(string(j.ID)) {
		return "", fmt.Errorf("publish job: %w: ID %q", ErrName, j.ID)
	}
	if !filepath.IsLocal(j.Name) || filepath.Base(j.Name) != j.Name || j.Name == "." || j.Name == partial {
		return "", fmt.Errorf("publish job %s: %w: %q", j.ID, ErrName, j.Name)
	}
	folder := filepath.Join(j.Name, string(j.ID))
	if err := p.publish(ctx, j, from, filepath.Join(p.Output, folder)); err != nil {
		if errors.Is(err, ErrLatest) {
			return folder, err
		}
		return "", fmt.Errorf("publish job %s: %w", j.ID, p.explain(err))
	}
	return folder, nil
}

func (p *Publisher) publish(ctx context.Context, j job.Job, from Source, final string) error {
	switch _, err := os.Lstat(filepath.Join(final, resultName)); {
	case err == nil:
		return p.finish(j, final)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("look for what is published: %w", err)
	}
	files, err := layout(j)
	if err != nil {
		return err
	}
	if len(files) > 0 && from == nil {
		return errors.New("no VM to fetch the artifacts from")
	}
	dir := filepath.Join(p.Output, partial, string(j.ID))
	if err := disk.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make partial folder: %w", err)
	}
	p.did("folder made")
	if err := p.fill(ctx, j, from, dir, files); err != nil {
		return err
	}
	if err := disk.MkdirAll(filepath.Dir(final), 0o755); err != nil {
		return fmt.Errorf("make folder of the job's name: %w", err)
	}
	p.did("parent made")
	if err := effect.Rename(dir, final); err != nil {
		return fmt.Errorf("move the whole folder into place: %w", err)
	}
	p.did("renamed")
	return p.finish(j, final)
}

// Published returns the outcome of a job that was published before.
func (p *Publisher) Published(j job.Job) (r Result, ok bool, err error) {
	data, err := os.ReadFile(filepath.Join(p.Output, j.Name, string(j.ID), resultName))
	if errors.Is(err, fs.ErrNotExist) {
		return r, false, nil
	}
	if err == nil {
		err = json.Unmarshal(data, &r)
	}
	if err == nil && r.Job != j.ID {
		err = fmt.Errorf("it is that of job %q", r.Job)
	}
	if err != nil {
		return r, false, fmt.Errorf("read the outcome of job %s: %w", j.ID, err)
	}
	return r, true, nil
}

// All returns the IDs of all jobs that were published.
func (p *Publisher) All() (map[job.ID]bool, error) {
	found, err := filepath.Glob(filepath.Join(globQuote(p.Output), "*", "*", resultName))
	if err != nil {
		return nil, fmt.Errorf("list what is published: %w", err)
	}
	ids := make(map[job.ID]bool, len(found))
	for _, name := range found {
		ids[job.ID(filepath.Base(filepath.Dir(name)))] = true
	}
	return ids, nil
}

// globQuote makes a pattern that means the path itself.
func globQuote(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// fill puts everything into dir, synced.
func (p *Publisher) fill(ctx context.Context, j job.Job, from Source, dir string, files []file) error {
	root, err := effect.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("open partial folder: %w", err)
	}
	defer func() { _ = root.Close() }() // nothing is written by it
	if err := prune(root, files); err != nil {
		return fmt.Errorf("remove what doesn't belong into the partial folder: %w", err)
	}
	p.did("pruned")
	if err := p.room(root, files); err != nil {
		return err
	}
	for _, f := range files {
		if err := p.fetch(ctx, from, root, f); err != nil {
			return fmt.Errorf("fetch %q: %w", f.artifact.Name, err)
		}
		p.did("fetched")
	}
	if len(files) > 0 {
		if err := writeFile(root, sumsName, sums(files)); err != nil {
			return err
		}
		p.did("sums written")
	}
	stateDir := filepath.Join(p.State, "jobs", string(j.ID))
	if err := copyLog(ctx, root, filepath.Join(stateDir, logName)); err != nil {
		return fmt.Errorf("copy build log: %w", err)
	}
	p.did("log copied")
	if err := copyTree(ctx, root, filepath.Join(stateDir, sourceName)); err != nil {
		return fmt.Errorf("copy source: %w", err)
	}
	p.did("source copied")
	result, err := result(j, files, filepath.Join(stateDir, logName))
	if err != nil {
		return err
	}
	if err := writeFile(root, resultName, result); err != nil {
		return err
	}
	p.did("result written")
	if err := syncTree(dir); err != nil {
		return fmt.Errorf("sync partial folder: %w", err)
	}
	p.did("synced")
	return nil
}

// finish makes the rename last and points "latest" at the job.
func (p *Publisher) finish(j job.Job, final string) error {
	for _, dir := range []string{filepath.Dir(final), p.Output, filepath.Join(p.Output, partial)} {
		if err := disk.SyncDir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("sync output folder: %w", err)
		}
	}
	p.did("parents synced")
	if err := p.point(j.ID, filepath.Dir(final)); err != nil {
		return fmt.Errorf("%w: %w", ErrLatest, err)
	}
	return nil
}

// point swaps "latest" in the folder named. A job that ends after a younger
// one of the same name doesn't take it back.
func (p *Publisher) point(id job.ID, named string) error {
	latest := filepath.Join(named, latestName)
	if target, err := os.Readlink(latest); err == nil && pipe.ValidID(target) && job.ID(target) >= id && !p.ahead(job.ID(target)) {
		if _, err := os.Stat(filepath.Join(named, target)); err == nil {
			return nil
		}
	}
	temp := filepath.Join(named, ".latest-"+string(id))
	if err := effect.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := effect.Symlink(string(id), temp); err != nil {
		return err
	}
	p.did("link made")
	if err := effect.Rename(temp, latest); err != nil {
		return errors.Join(err, effect.Remove(temp))
	}
	p.did("link renamed")
	return disk.SyncDir(named)
}

// ahead reports that a job's ID was made while the clock was ahead: it seems
// younger than all that come until then.
func (p *Publisher) ahead(id job.ID) bool {
	now := time.Now
	if p.Now != nil {
		now = p.Now
	}
	made, ok := id.Made()
	return ok && made.After(now())
}

// Clean removes what was left of jobs that nobody will publish any more.
func (p *Publisher) Clean(ctx context.Context, keep func(job.ID) bool) error {
	entries, err := os.ReadDir(filepath.Join(p.Output, partial))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("clean partial folder: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		if !pipe.ValidID(e.Name()) || keep(job.ID(e.Name())) {
			continue
		}
		errs = append(errs, effect.RemoveAll(filepath.Join(p.Output, partial, e.Name())))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("clean partial folder: %w", err)
	}
	return nil
}

// explain adds what to do about the errors that users can mend.
func (p *Publisher) explain(err error) error {
	var full *disk.NoRoom
	switch {
	case disk.Full(err) && !errors.As(err, &full):
		free, _ := disk.Free(p.Output)
		err = fmt.Errorf("%w: %w", &disk.NoRoom{Path: p.Output, Free: free}, err)
		fallthrough
	case disk.Full(err):
		return hint.With(err, "Make room on the disk of the output folder, for example by removing old jobs' folders. The job is published by itself then.")
	case errors.Is(err, fs.ErrPermission):
		return hint.With(err, "The output folder must belong to PUID:PGID, which `docker compose up init` sees to.")
	case errors.Is(err, unix.EROFS):
		return hint.With(err, "The output folder is mounted read-only: mount it, or the disk that it lies on, so that it can be written. The job is published by itself then.")
	}
	return err
}
