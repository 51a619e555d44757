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
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// Bounds of what a job may ship.
const (
	maxEntries = 10_000 // files and folders
	maxDepth   = 32     // folders below $OUT
	maxPath    = 1024
)

// A refusal says why what lies in $OUT can't be shipped.
type refusal struct{ message string }

func (r *refusal) Error() string { return r.message }

func refuse(name, format string, args ...any) error {
	return &refusal{fmt.Sprintf("$OUT/%s "+format, append([]any{printable(name)}, args...)...)}
}

// A collector takes what a job left in $OUT and makes it the builder's to
// fetch and nobody's to change. No process of the job is left, and its folder
// is locked: so what is looked at stays as it is. All the same no link is
// followed on the way, since it is root that looks.
//
// In order, and so that a runner that was killed goes on anywhere:
//
//	$OUT → artifacts/ID.part/out   one rename: all of it or nothing
//	check, then the file "checked" each entry may be shipped, none was yet given away
//	own                            root's, readable for the builder
//	→ artifacts/ID                 one rename again
//	hash
type collector struct {
	cfg     Config
	disk    disk
	path    paths
	builder account // whose group may read
	maker   account // the slot's user: whose files count
}

// An entry is a file to ship.
type entry struct {
	name  string // below $OUT, with slashes
	store string // where a link into the Nix store leads; else empty
}

func (c *collector) collect(ctx context.Context) ([]pipe.Artifact, error) {
	if !exists(c.path.artifacts) {
		if err := c.receive(ctx); err != nil {
			var r *refusal
			if errors.As(err, &r) {
				err = errors.Join(err, c.discard())
			}
			return nil, err
		}
	}
	// Here, since a runner may have been killed right after the rename.
	if err := syncDir(c.cfg.artifactsDir()); err != nil {
		return nil, fmt.Errorf("collect: %w", err)
	}
	var found []entry
	if err := c.walk(ctx, c.path.artifacts, func(_ int, e entry, _ *unix.Stat_t) error {
		found = append(found, e)
		return nil
	}, nil); err != nil {
		return nil, err
	}
	slices.SortFunc(found, func(a, b entry) int { return strings.Compare(a.name, b.name) })
	artifacts := make([]pipe.Artifact, 0, len(found))
	for _, e := range found {
		a, err := c.describe(ctx, e)
		if err != nil {
			return nil, err
		}
		artifacts = append(artifacts, a)
	}
	return artifacts, nil
}

// receive moves $OUT to the artifacts, checked and owned.
func (c *collector) receive(ctx context.Context) error {
	part := c.path.artifacts + tempSuffix
	out, checked := filepath.Join(part, "out"), filepath.Join(part, "checked")
	if err := makeDir(part, self(), self().gid, 0o700); err != nil {
		return err
	}
	if !exists(out) {
		if err := effect.Rename(c.path.out(), out); errors.Is(err, fs.ErrNotExist) {
			return &refusal{message: "$OUT was removed or renamed by the job: leave the folder, and put into it what is to be shipped"}
		} else if err != nil {
			return fmt.Errorf("collect: %w", err)
		}
	}
	if !exists(checked) {
		if err := c.check(ctx, out); err != nil {
			return err
		}
		if err := c.disk.write(checked, nil); err != nil {
			return fmt.Errorf("collect: %w", err)
		}
	}
	if err := c.own(ctx, out); err != nil {
		return err
	}
	if err := effect.Rename(out, c.path.artifacts); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	if err := effect.RemoveAll(part); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	return nil
}

// discard removes what was refused.
func (c *collector) discard() error {
	return errors.Join(effect.RemoveAll(c.path.artifacts+tempSuffix), effect.RemoveAll(c.path.roots))
}

// check refuses what can't be shipped, before anything is changed.
func (c *collector) check(ctx context.Context, out string) error {
	var st unix.Stat_t
	if err := unix.Lstat(out, &st); err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != c.maker.uid {
		return &refusal{message: "$OUT was replaced by something else: leave the folder, and put into it what is to be shipped"}
	}
	files := 0
	return c.walk(ctx, out, func(dir int, e entry, st *unix.Stat_t) error {
		files++
		if err := checkName(e.name); err != nil {
			return err
		}
		if e.store != "" {
			return c.keep(e, files)
		}
		if err := c.checkMaker(e.name, st); err != nil {
			return err
		}
		if st.Nlink != 1 {
			return refuse(e.name, "has %d names (hard links): only files made by the job can be shipped, each under one name; copy it", st.Nlink)
		}
		return idle(dir, e.name)
	}, func(_ int, name string, st *unix.Stat_t) error {
		return errors.Join(checkName(name), c.checkMaker(name, st))
	})
}

// checkMaker refuses what is not the job's own.
func (c *collector) checkMaker(name string, st *unix.Stat_t) error {
	if int(st.Uid) == c.maker.uid {
		return nil
	}
	return refuse(name, "belongs to user %d: only files made by the job can be shipped", st.Uid)
}

// checkName refuses names that would not survive the way to the user.
func checkName(name string) error {
	if !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl) {
		return refuse(name, "has a name (%q) that is not plain UTF-8: rename it", name)
	}
	if len(name) > maxPath {
		return refuse(name[:64]+"…", "has a path of %d bytes, at most %d can be shipped", len(name), maxPath)
	}
	return nil
}

// idle refuses a file that a process still has open for writing: the job's
// are gone, but a descriptor can be handed to another job's.
func idle(dir int, name string) error {
	fd, err := unix.Openat(dir, path.Base(name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return refuse(name, "can't be opened: %v", err)
	}
	defer unix.Close(fd)
	_, err = unix.FcntlInt(uintptr(fd), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(err, unix.EAGAIN) {
		return refuse(name, "is still open for writing by a process that is not the job's")
	}
	return nil // no leases here, or nobody writes
}

// keep makes a garbage collector's root for a file in the Nix store, and only
// then makes sure that it is there.
func (c *collector) keep(e entry, number int) error {
	if err := effect.MkdirAll(c.path.roots, 0o755); err != nil {
		return fmt.Errorf("keep %s from being collected: %w", e.store, err)
	}
	rest := strings.TrimPrefix(e.store, c.cfg.Store+"/")
	object, _, _ := strings.Cut(rest, "/")
	root := filepath.Join(c.path.roots, fmt.Sprint(number))
	if err := effect.Symlink(filepath.Join(c.cfg.Store, object), root); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("keep %s from being collected: %w", e.store, err)
	}
	if _, err := os.Lstat(e.store); err != nil {
		return refuse(e.name, "leads to %s, which is gone", e.store)
	}
	return nil
}

// own gives all to root, readable for the builder, and syncs it.
func (c *collector) own(ctx context.Context, out string) error {
	root := self()
	give := func(fd int, mode uint32) error {
		// The mode first goes down, then the owner changes, then it is what it
		// shall be: at no time more can write than before.
		effect.Before("chmod", out)
		down := unix.Fchmod(fd, 0)
		effect.Before("chown", out)
		given := unix.Fchown(fd, root.uid, c.builder.gid)
		effect.Before("chmod", out)
		return errors.Join(down, given, unix.Fchmod(fd, mode))
	}
	file := func(dir int, e entry, _ *unix.Stat_t) error {
		if e.store != "" {
			effect.Before("chown", e.name)
			return unix.Fchownat(dir, path.Base(e.name), root.uid, c.builder.gid, unix.AT_SYMLINK_NOFOLLOW)
		}
		fd, err := unix.Openat(dir, path.Base(e.name), unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		given := give(fd, 0o640)
		effect.Before("sync", e.name)
		return errors.Join(given, unix.Fsync(fd))
	}
	folder := func(fd int, name string, _ *unix.Stat_t) error {
		given := give(fd, 0o750)
		effect.Before("sync", name)
		return errors.Join(given, unix.Fsync(fd))
	}
	if err := c.walk(ctx, out, file, folder); err != nil {
		return fmt.Errorf("take over $OUT: %w", err)
	}
	fd, err := unix.Open(out, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("take over $OUT: %w", err)
	}
	defer unix.Close(fd)
	return folder(fd, "", nil)
}

// describe hashes a file and says how to fetch it.
func (c *collector) describe(ctx context.Context, e entry) (pipe.Artifact, error) {
	where := filepath.Join(c.path.artifacts, filepath.FromSlash(e.name))
	if e.store != "" {
		where = e.store
	}
	f, err := os.OpenFile(where, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return pipe.Artifact{}, fmt.Errorf("hash artifact: %w", err)
	}
	defer f.Close()
	hash := sha256.New()
	size, err := io.Copy(hash, reader{ctx, f})
	if err != nil {
		return pipe.Artifact{}, fmt.Errorf("hash artifact: %w", err)
	}
	return pipe.Artifact{
		Name:     e.name,
		Path:     where,
		Size:     size,
		SHA256:   hex.EncodeToString(hash.Sum(nil)),
		Download: download(c.cfg, where),
	}, nil
}

// A reader ends with its context: an image takes minutes to hash.
type reader struct {
	ctx context.Context //nolint:containedctx // lives for one io.Copy
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	return r.r.Read(p)
}

// download is a command that works for a person who has a key, on the Docker
// host, with the published port left at its default. Two readers see it: the
// shell, and sftp, which splits its path into words and expands patterns.
func download(cfg Config, where string) string {
	user := cfg.PipeUser
	if user == "" {
		user = "builder"
	}
	var b strings.Builder
	for _, r := range where {
		if strings.ContainsRune(` \"'*?[]#`, r) {
			b.WriteByte('\\')
		}
		b.WriteRune(r)
	}
	source := fmt.Sprintf("%s@%s:%s", user, cfg.Host, b.String())
	safe := func(r rune) bool {
		return r < utf8.RuneSelf && (unicode.IsLetter(r) || unicode.IsDigit(r)) || strings.ContainsRune("@:/._-+=,%", r)
	}
	if strings.ContainsFunc(source, func(r rune) bool { return !safe(r) }) {
		source = "'" + strings.ReplaceAll(source, "'", `'\''`) + "'"
	}
	return fmt.Sprintf("sftp -P %d %s", cfg.Port, source)
}
