package deliver

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// A file is where an artifact goes in the job's folder.
type file struct {
	artifact pipe.Artifact
	name     string // its path in the job's folder, with slashes
}

// layout says where each artifact goes: where the job has it, unless that is
// the place of another one or of a file of ours.
func layout(j job.Job) ([]file, error) {
	if j.Result == nil || j.Result.Status != pipe.StatusSucceeded {
		return nil, nil
	}
	var files []file
	taken := make(map[string]pipe.Artifact)
	folders := make(map[string]bool)
	for _, a := range j.Artifacts {
		if !filepath.IsLocal(a.Name) || path.Clean(a.Name) != a.Name || a.Name == "." || strings.ContainsRune(a.Name, 0) {
			return nil, fmt.Errorf("%w: artifact %q", ErrName, a.Name)
		}
		if first, again := taken[a.Name]; again {
			if first.Size != a.Size || first.SHA256 != a.SHA256 {
				return nil, fmt.Errorf("%w: two artifacts are named %q", ErrName, a.Name)
			}
			continue
		}
		taken[a.Name] = a
		for dir := path.Dir(a.Name); dir != "."; dir = path.Dir(dir) {
			folders[dir] = true
		}
		files = append(files, file{artifact: a, name: a.Name})
	}
	for name := range taken {
		if folders[name] {
			return nil, fmt.Errorf("%w: artifact %q is a file and a folder", ErrName, name)
		}
	}
	return files, settle(files)
}

// prune removes what an earlier try left that is no part of an artifact: its
// attempt may have made others.
func prune(root *effect.Root, files []file) error {
	wanted := make(map[string]bool)
	for _, f := range files {
		wanted[f.name] = true
		for dir := path.Dir(f.name); dir != "."; dir = path.Dir(dir) {
			wanted[dir+"/"] = true
		}
	}
	return fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == ".", d.IsDir() && wanted[name+"/"], d.Type().IsRegular() && wanted[name]:
			return nil
		}
		if err := root.RemoveAll(name); err != nil {
			return err
		}
		if d.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// room reports before anything is fetched if it can't all be kept.
func (p *Publisher) room(root *effect.Root, files []file) error {
	var need int64
	for _, f := range files {
		need += f.artifact.Size
		if info, err := root.Lstat(f.name); err == nil {
			need -= min(info.Size(), f.artifact.Size)
		}
	}
	free, err := disk.Free(p.Output)
	if err != nil {
		return fmt.Errorf("look for room: %w", err)
	}
	if need > free-p.Keep && need > 0 {
		return &disk.NoRoom{Path: p.Output, Need: need, Free: free, Keep: p.Keep}
	}
	return nil
}

// fetch brings one artifact, going on where an earlier try stopped.
func (p *Publisher) fetch(ctx context.Context, from Source, root *effect.Root, f file) error {
	if err := mkdirs(root, path.Dir(f.name)); err != nil {
		return err
	}
	resumed, err := p.fetchOnce(ctx, from, root, f)
	if errors.Is(err, ErrDigest) && resumed {
		// The part that was there may be of another attempt, or torn by a crash.
		if err := root.Remove(f.name); err != nil {
			return err
		}
		_, err = p.fetchOnce(ctx, from, root, f)
	}
	if errors.Is(err, ErrDigest) {
		err = errors.Join(err, root.Remove(f.name))
	}
	return err
}

// fetchOnce reports with its outcome whether a part was there before.
func (p *Publisher) fetchOnce(ctx context.Context, from Source, root *effect.Root, f file) (resumed bool, err error) {
	out, err := root.OpenFile(f.name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return false, err
	}
	defer out.Close()
	w := &checked{file: out, sum: sha256.New(), want: f.artifact.Size}
	if err := w.takeUp(ctx); err != nil {
		return false, fmt.Errorf("take up partial file: %w", err)
	}
	resumed = w.size > 0
	if w.size < w.want {
		p.did("partial taken up")
		_, err := from.Copy(ctx, f.artifact.Path, w.size, w)
		switch {
		case disk.Full(w.err):
			free, _ := disk.Free(p.Output)
			return resumed, &disk.NoRoom{Path: p.Output, Need: w.want - w.size, Free: free}
		case w.err != nil:
			return resumed, w.err
		case err != nil:
			return resumed, fmt.Errorf("after %d of %d bytes: %w", w.size, w.want, err)
		case w.size < w.want:
			return resumed, fmt.Errorf("%w: it ends after %d of %d bytes", ErrDigest, w.size, w.want)
		}
	}
	if got := hex.EncodeToString(w.sum.Sum(nil)); got != f.artifact.SHA256 {
		return resumed, fmt.Errorf("%w: sha256 is %s, the VM said %s", ErrDigest, got, f.artifact.SHA256)
	}
	if err := chmod(out, 0o644); err != nil {
		return resumed, err
	}
	return resumed, out.Sync()
}

// checked writes a file at its end and digests it meanwhile.
type checked struct {
	file *effect.File
	sum  hash.Hash
	size int64 // bytes in the file and in sum
	want int64
	err  error // of the first write that failed
}

// takeUp digests what an earlier try left.
func (c *checked) takeUp(ctx context.Context) error {
	info, err := c.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() > c.want {
		return c.file.Truncate(0)
	}
	c.size, err = io.Copy(c.sum, within(ctx, c.file))
	return err
}

func (c *checked) Write(b []byte) (int, error) {
	if c.err == nil && int64(len(b)) > c.want-c.size {
		c.err = fmt.Errorf("%w: it is longer than the %d bytes that it should have", ErrDigest, c.want)
	}
	if c.err != nil {
		return 0, c.err
	}
	n, err := c.file.WriteAt(b, c.size)
	c.sum.Write(b[:n])
	c.size += int64(n)
	c.err = err
	return n, err
}

// sums returns what sha256sum -c reads.
func sums(files []file) []byte {
	var b strings.Builder
	for _, f := range files {
		name := strings.NewReplacer("\\", `\\`, "\n", `\n`, "\r", `\r`).Replace(f.name)
		if name != f.name {
			b.WriteByte('\\')
		}
		fmt.Fprintf(&b, "%s  %s\n", f.artifact.SHA256, name)
	}
	return []byte(b.String())
}
