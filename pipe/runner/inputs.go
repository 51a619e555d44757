package runner

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

const (
	// maxTaking bounds how many jobs' inputs are copied at once.
	maxTaking = 4
	// inputsReserve stays free on the data disk beside the copy of inputs.
	inputsReserve = 256 << 20
	// uploadsKept is for how long an upload may wait for its request.
	uploadsKept = 24 * time.Hour
)

// A badUpload says why an upload can't be a job's inputs.
type badUpload struct{ message string }

func (b *badUpload) Error() string { return b.message }

// fetch copies the inputs of a job that is new, which may take long, and then
// answers its request. It reports false if there is nothing to wait for: the
// request is refused at once.
func (r *Runner) fetch(ctx context.Context, l letter, rec record, h pipe.Header, body []byte) (bool, *pipe.Refused) {
	if under, ok := r.taking[rec.ref()]; ok {
		if under.SHA256 == rec.SHA256 && under.Inputs == rec.Inputs {
			return true, nil // written again: the answer is on its way
		}
		return false, conflict(rec.ref())
	}
	if len(r.taking) >= maxTaking {
		return false, &pipe.Refused{
			Reason:    pipe.ReasonInternal,
			Message:   fmt.Sprintf("the inputs of %d jobs are being copied: write the request again", len(r.taking)),
			Retryable: true,
		}
	}
	r.taking[rec.ref()] = rec
	r.work.Go(func() {
		copied, err := r.takeInputs(ctx, rec)
		_ = r.call(ctx, func() error {
			delete(r.taking, rec.ref())
			r.answer(ctx, h, r.fetched(rec, h, body, copied, err))
			r.dealt(ctx, l)
			return nil
		}) // a runner that stops here finds its writer asking again
	})
	return true, nil
}

// fetched is the owner's part of fetch.
func (r *Runner) fetched(rec record, h pipe.Header, body []byte, copied string, err error) *pipe.Refused {
	var bad *badUpload
	switch {
	case errors.As(err, &bad):
		return &pipe.Refused{Reason: pipe.ReasonInputs, Message: bad.Error() + ": upload them again", Retryable: true}
	case err != nil:
		return r.unable(err)
	}
	refused := r.foreign(h) // it may have been taken over meanwhile
	if refused == nil {
		refused = r.add(rec, body, copied)
	}
	if refused != nil {
		if err := effect.Remove(copied); err != nil && !errors.Is(err, fs.ErrNotExist) {
			r.logf("remove inputs: %v", err)
		}
		return refused
	}
	r.supersede(rec.Job, rec.Attempt)
	r.removeUpload(rec.Inputs)
	return nil
}

// removeUpload removes what was uploaded for a job that has it, be it again:
// a writer that didn't hear the answer brings it twice. Another job with the
// same inputs brings them again.
func (r *Runner) removeUpload(digest string) {
	if digest == "" {
		return
	}
	if err := effect.RemoveAll(r.cfg.upload(digest)); err != nil {
		r.logf("remove upload: %v", err)
	}
}

// upload is where the writer puts inputs.
func (c Config) upload(digest string) string { return filepath.Join(c.Pipe, pipe.InputsFile(digest)) }

// takeInputs makes a synced copy of a job's inputs in the spool, and returns
// its path. It is the copy whose digest counts, so whoever still writes to
// the upload changes nothing. As with pipe_in, root opens what somebody else
// put there.
func (r *Runner) takeInputs(ctx context.Context, rec record) (string, error) {
	from := r.cfg.upload(rec.Inputs)
	fd, err := unix.Open(from, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "", &badUpload{fmt.Sprintf("the inputs are not at %s", from)}
	case err != nil:
		return "", &badUpload{fmt.Sprintf("the inputs at %s can't be opened: %v", from, err)}
	}
	in := os.NewFile(uintptr(fd), from)
	defer in.Close()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("look at inputs: %w", err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1:
		return "", &badUpload{fmt.Sprintf("%s is no regular file of one name", from)}
	case st.Size > pipe.MaxInputs:
		return "", &badUpload{fmt.Sprintf("%s has %d bytes, at most %d are taken", from, st.Size, int64(pipe.MaxInputs))}
	}
	free, err := r.cfg.free(r.cfg.Data)
	if err != nil {
		return "", err
	}
	if st.Size > free-inputsReserve {
		return "", fmt.Errorf("copy inputs of %s, beside which %s stay free: %w", pipe.Size(st.Size), pipe.Size(inputsReserve), unix.ENOSPC)
	}
	to := r.spool.path("inputs", folder(rec.ref())+tempSuffix)
	got, err := r.spool.disk.copyNew(ctx, to, io.LimitReader(in, st.Size+1))
	if err == nil && got != rec.Inputs {
		err = &badUpload{fmt.Sprintf("%s has the SHA-256 %s", from, got)}
	}
	if err != nil {
		return "", errors.Join(err, effect.Remove(to))
	}
	return to, nil
}

// copyNew makes a file that everybody may read and nobody write, synced, and
// returns its SHA-256.
func (d disk) copyNew(ctx context.Context, path string, from io.Reader) (string, error) {
	f, err := effect.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o444)
	if err != nil {
		return "", fmt.Errorf("copy: %w", err)
	}
	defer f.Close()
	if err := d.failing("write", path); err != nil {
		return "", fmt.Errorf("copy to %s: %w", path, err)
	}
	hash := sha256.New()
	if _, err := io.Copy(io.MultiWriter(f, hash), reader{ctx, from}); err != nil {
		return "", fmt.Errorf("copy: %w", err)
	}
	if err := f.Chmod(0o444); err != nil { // whatever the umask is
		return "", fmt.Errorf("copy: %w", err)
	}
	if err := f.Sync(); err != nil {
		return "", fmt.Errorf("copy: %w", err)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// cleanUploads removes uploads that nobody will ask for: halves of a former
// boot, what was accepted just before the last runner died, and what is old.
func (r *Runner) cleanUploads(booted bool) {
	accepted := map[string]bool{}
	for _, j := range r.jobs {
		accepted[j.Inputs] = true
	}
	entries, err := os.ReadDir(r.cfg.Pipe)
	if err != nil {
		r.logf("look for old uploads: %v", err)
		return
	}
	for _, e := range entries {
		digest, whole := strings.CutPrefix(e.Name(), pipe.InputsPrefix)
		if !whole && !strings.HasPrefix(e.Name(), pipe.InputsTempPrefix) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // it went away
		}
		if whole && accepted[digest] || !whole && booted || time.Since(info.ModTime()) > uploadsKept {
			if err := effect.RemoveAll(filepath.Join(r.cfg.Pipe, e.Name())); err != nil {
				r.logf("remove old upload: %v", err)
			}
		}
	}
}
