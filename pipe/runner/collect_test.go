package runner

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"osbuilder/pipe"
)

// What a job may not ship fails it, with a reason that names the file.
func TestRefusedArtifacts(t *testing.T) {
	for name, tc := range map[string]struct{ script, reason string }{
		"link":          {"ln -s /etc/shadow $OUT/x", "$OUT/x is a link to /etc/shadow: only files made by the job can be shipped"},
		"relative link": {"echo a >$OUT/a; ln -s a $OUT/x", "$OUT/x is a link to a: only files"},
		"climbing link": {"ln -s $STORE/../secret $OUT/x", "is a link to "},
		"link in store": {"ln -s $STORE/abc-evil/shadow $OUT/x", "is a link to "},
		"store folder":  {"ln -s $STORE/abc-image $OUT/x", "$OUT/x is a link to the folder "},
		"dangling":      {"ln -s $STORE/missing/x $OUT/x", "can't be followed"},
		"hard link":     {"echo a >a; ln a $OUT/x", "$OUT/x has 2 names (hard links)"},
		"fifo":          {"mkfifo $OUT/x", "$OUT/x is a named pipe"},
		"linked folder": {"mkdir d; echo a >d/a; ln -s $PWD/d $OUT/x", "$OUT/x is a link to"},
		"OUT is a link": {"rmdir $OUT; ln -s /etc $OUT", "$OUT was replaced"},
		"OUT is gone":   {"rmdir $OUT", "$OUT was removed"},
		"OUT is a file": {"rmdir $OUT; echo a >$OUT", "$OUT was replaced"},
		"control":       {`echo a >"$OUT/a"$'\n'"b"`, "is not plain UTF-8"},
		"bytes":         {`echo a >"$OUT/a"$'\xff'"b"`, "is not plain UTF-8"},
		"deep":          {`cd $OUT; for i in {0..33}; do mkdir d; cd d; done; echo a >a`, "folders deep"},
		"many":          {`cd $OUT; for i in {0..10000}; do : >f$i; done`, "$OUT holds more than 10000 files and folders: pack them into an archive"},
		"many folders":  {`cd $OUT; mkdir {0..10000}`, "$OUT holds more than 10000 files and folders: pack them into an archive"},
		"many of both":  {`cd $OUT; mkdir {0..5000}; touch {0..5000}/f`, "$OUT holds more than 10000 files and folders: pack them into an archive"},
		"good and bad":  {"echo a >$OUT/a; mkdir $OUT/b; ln -s /etc/passwd $OUT/b/c", "$OUT/b/c is a link to /etc/passwd"},
		// The job's descriptor lives on in a process that is not its own.
		"open for write": {"echo a >$OUT/x; setsid --fork env -u PROCESS_UNIT bash -c 'echo >r; exec sleep 20' 9>&- 3>>$OUT/x >/dev/null 2>&1; until [[ -e r ]]; do :; done", "still open for writing"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			store(t, m)
			m.start()
			m.submit("j", "STORE="+m.cfg.Store+"\n"+tc.script+"\ntrue\n")
			f := m.finished("j")
			if f.Status != pipe.StatusFailed || !strings.Contains(f.Reason, tc.reason) {
				t.Errorf("finished: %+v, want failed, %q", f, tc.reason)
			}
			if n := len(find(m.events(), ofType(pipe.TypeArtifact))); n > 0 || f.Artifacts != 0 {
				t.Errorf("%d artifacts", n)
			}
			if left, err := os.ReadDir(m.cfg.artifactsDir()); err != nil || len(left) > 0 {
				t.Errorf("artifacts: %v, %v", left, err)
			}
		})
	}
}

// store makes what stands for the Nix store.
func store(t *testing.T, m *machine) {
	t.Helper()
	for path, content := range map[string]string{
		"abc-image/iso/x.iso": "iso\n",
		"../secret":           "secret\n",
	} {
		path = filepath.Join(m.cfg.Store, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o444); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{
		"abc-evil/shadow": "/etc/shadow",
		"def-link/x.iso":  "../abc-image/iso/x.iso",
	} {
		link = filepath.Join(m.cfg.Store, link)
		if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
}

// A file of another user, moved in, is not the job's.
func TestForeignFile(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Store: "/nix/store", Data: dir, GCRoots: dir + "/roots"}
	p := cfg.paths(pipe.JobRef{Job: "j", Attempt: 1})
	for _, d := range []string{p.out(), cfg.artifactsDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(p.out(), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c := collector{cfg: cfg, path: p, builder: self(), maker: account{uid: self().uid + 1}}
	if err := c.check(t.Context(), p.out()); err == nil || !strings.Contains(err.Error(), "$OUT was replaced") {
		t.Errorf("folder of another: %v", err)
	}
	if err := c.checkMaker("x", &unix.Stat_t{Uid: uint32(self().uid)}); err == nil || !strings.Contains(err.Error(), "$OUT/x belongs to user") {
		t.Errorf("file of another: %v", err)
	}
	c.maker = self()
	if err := c.check(t.Context(), p.out()); err != nil {
		t.Errorf("own file: %v", err)
	}
}

// A collector that is to end does so between folders, too.
func TestCollectingEnds(t *testing.T) {
	dir := t.TempDir()
	cfg := Config{Store: "/nix/store", Data: dir, GCRoots: dir + "/roots"}
	p := cfg.paths(pipe.JobRef{Job: "j", Attempt: 1})
	if err := os.MkdirAll(filepath.Join(p.out(), "folder", "folder"), 0o755); err != nil {
		t.Fatal(err)
	}
	over := errors.New("the runner stops")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(over)
	c := collector{cfg: cfg, path: p, builder: self(), maker: self()}
	for name, do := range map[string]func(context.Context, string) error{"check": c.check, "own": c.own} {
		if err := do(ctx, p.out()); !errors.Is(err, over) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Of a folder with too much in it no more is read than tells that.
func TestListOfTooMany(t *testing.T) {
	dir := t.TempDir()
	for i := range maxEntries + 5000 {
		if err := os.Symlink("/", filepath.Join(dir, strconv.Itoa(i))); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := &walk{}
	var refused *refusal
	if _, err := w.list(f); !errors.As(err, &refused) || w.entries > maxEntries+1000 {
		t.Errorf("%d names were read, %v", w.entries, err)
	}
}

func TestArtifacts(t *testing.T) {
	m := newMachine(t)
	store(t, m)
	m.start()
	m.submit("j", fmt.Sprintf(`echo a >$OUT/a
mkdir -p $OUT/b/c $OUT/empty
echo "d" >"$OUT/b/c/ü name.txt"
chmod 000 $OUT/a
ln -s %s/def-link/x.iso $OUT/image.iso
`, m.cfg.Store))
	if f := m.finished("j"); f.Status != pipe.StatusSucceeded || f.Artifacts != 3 {
		t.Fatalf("finished: %+v", f)
	}
	image := filepath.Join(m.cfg.Store, "abc-image/iso/x.iso")
	want := map[string]string{"a": "a\n", "b/c/ü name.txt": "d\n", "image.iso": "iso\n"}
	for _, e := range find(m.events(), ofType(pipe.TypeArtifact)) {
		a := e.Artifact
		data, err := os.ReadFile(a.Path)
		if err != nil {
			t.Fatal(err)
		}
		if string(data) != want[a.Name] || a.SHA256 != digestOf(want[a.Name]) || a.Size != int64(len(data)) {
			t.Errorf("%+v holds %q", a, data)
		}
		delete(want, a.Name)
		if a.Name == "image.iso" {
			if a.Path != image {
				t.Errorf("path %s, want %s", a.Path, image)
			}
			continue
		}
		info, err := os.Stat(a.Path)
		if err != nil || info.Mode() != 0o640 {
			t.Errorf("%s: %v, %v", a.Path, info.Mode(), err)
		}
	}
	if len(want) > 0 {
		t.Errorf("not announced: %v", want)
	}
	p := m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1})
	roots, err := os.ReadDir(p.roots)
	if err != nil || len(roots) != 1 {
		t.Fatalf("roots: %v, %v", roots, err)
	}
	target, err := os.Readlink(filepath.Join(p.roots, roots[0].Name()))
	if err != nil || target != filepath.Join(m.cfg.Store, "abc-image") {
		t.Errorf("root leads to %s, %v", target, err)
	}
	m.send(1, ackHeader("j", 1), "")
	if exists(p.roots) {
		t.Error("the root outlives the job")
	}
}

func TestFailedJobShipsNothing(t *testing.T) {
	m := boot(t)
	m.submit("j", "echo a >$OUT/a; exit 1")
	if f := m.finished("j"); f.Artifacts != 0 || exists(m.cfg.paths(pipe.JobRef{Job: "j", Attempt: 1}).artifacts) {
		t.Errorf("finished: %+v", f)
	}
}

func TestDownload(t *testing.T) {
	cfg := Config{Host: "localhost", Port: 2022, PipeUser: "builder"}
	for path, want := range map[string]string{
		"/data/artifacts/j-1/a.iso":   "sftp -P 2022 builder@localhost:/data/artifacts/j-1/a.iso",
		"/data/artifacts/j-1/a b.iso": `sftp -P 2022 'builder@localhost:/data/artifacts/j-1/a\ b.iso'`,
		"/data/artifacts/j-1/*'":      `sftp -P 2022 'builder@localhost:/data/artifacts/j-1/\*\'\'''`,
		"/data/artifacts/j-1/$(x);":   `sftp -P 2022 'builder@localhost:/data/artifacts/j-1/$(x);'`,
	} {
		if got := download(cfg, path); got != want {
			t.Errorf("download %s: %s, want %s", path, got, want)
		}
	}
}
