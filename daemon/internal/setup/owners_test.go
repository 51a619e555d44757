package setup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"osbuilder/daemon/internal/hint"
	"osbuilder/internal/testenv"
)

// Owners that a clone's folders and the volumes can have, with the real
// chown, which only root may.

func rootOnly(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		testenv.Lacks(t, "only root can give files away")
	}
}

// put makes a file, or with a name that ends in / a folder, of a user.
func put(t *testing.T, path string, uid int) {
	t.Helper()
	var err error
	if strings.HasSuffix(path, "/") {
		err = os.MkdirAll(path, 0o755)
	} else {
		err = os.WriteFile(path, []byte("x"), 0o600)
	}
	if err := errors.Join(err, os.Lchown(path, uid, uid)); err != nil {
		t.Fatal(err)
	}
}

// owners returns whose everything in a folder is.
func owners(t *testing.T, dir string) map[string]int {
	t.Helper()
	all := map[string]int{}
	if err := filepath.Walk(dir, func(path string, info fs.FileInfo, err error) error {
		if err == nil {
			name, _ := filepath.Rel(dir, path)
			all[name], _ = ownerOf(info)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// can reports whether a user may make and remove a file in a folder.
func can(t *testing.T, uid int, dir string) error {
	t.Helper()
	done := make(chan error)
	go func() {
		// The thread ends with this goroutine, which keeps it.
		runtime.LockOSThread()
		if _, err := unix.SetfsuidRetUid(uid); err != nil {
			done <- err
			return
		}
		path := filepath.Join(dir, "probe")
		done <- errors.Join(os.WriteFile(path, nil, 0o600), os.Remove(path))
	}()
	return <-done
}

func TestOwnersOfAClone(t *testing.T) {
	rootOnly(t)
	for _, owner := range []int{0, 1000, 1001} {
		for _, puid := range []int{0, 1000, 1001} {
			t.Run(fmt.Sprintf("of %d for %d", owner, puid), func(t *testing.T) {
				c, out := world(t)
				c.UID, c.GID = puid, puid
				base := filepath.Dir(c.Jobs) // of the test: all users shall pass
				if err := errors.Join(os.Chmod(base, 0o755), os.Chmod(filepath.Dir(base), 0o755)); err != nil {
					t.Fatal(err)
				}
				for _, dir := range []string{c.Jobs, c.Output} {
					put(t, dir+"/", owner)
					put(t, filepath.Join(dir, ".gitkeep"), owner)
				}
				put(t, c.State+"/", 0) // a fresh volume
				put(t, filepath.Join(c.Jobs, "mine/"), owner)
				mustRun(t, c)
				for _, dir := range []string{c.Jobs, c.Output, c.State, filepath.Join(c.Jobs, ".taken"), filepath.Join(c.Jobs, "rejected")} {
					if err := can(t, puid, dir); err != nil {
						t.Errorf("the daemon can't write: %v", err)
					}
				}
				for _, kept := range []string{filepath.Join(c.Jobs, "mine"), filepath.Join(c.Jobs, ".gitkeep"), filepath.Join(c.Output, ".gitkeep")} {
					if got := owners(t, kept)["."]; got != owner {
						t.Errorf("%s is of %d now", kept, got)
					}
				}
				told := strings.Count(out.String(), fmt.Sprintf("If that is you, set PUID=%d and PGID=%d in .env, then: docker compose up -d", owner, owner))
				if want := map[bool]int{true: 2}[owner != 0 && owner != puid]; told != want {
					t.Errorf("told %d times, want %d: %s", told, want, out)
				}
			})
		}
	}
}

// Folders that Docker made are root's, and only the project's owner tells who
// may want to use them.
func TestOwnersOfTheProject(t *testing.T) {
	rootOnly(t)
	for _, tt := range []struct {
		name                string
		project, jobs, puid int
		note                string
	}{
		{"another's", 1001, 0, 1000, "note: the project's folder is of user 1001, and %s and %s are given to user 1000. " +
			"If the first is you, and they are to be yours, set PUID=1001 and PGID=1001 in .env, then: docker compose up -d\n"},
		{"told before, by jobs/ itself", 1001, 1001, 1000, ""},
		{"told again", 1001, 1000, 1000, "note: the project's folder is of user 1001, and %s and %s are given to user 1000. " +
			"If the first is you, and they are to be yours, set PUID=1001 and PGID=1001 in .env, then: docker compose up -d\n"},
		{"the daemon's", 1001, 0, 1001, ""},
		{"root's", 0, 0, 1000, ""},
		{"one's whom the container doesn't know", 65534, 0, 1000, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, out := world(t)
			c.UID, c.GID, c.Folder = tt.puid, tt.puid, filepath.Join(filepath.Dir(c.Jobs), "project")
			put(t, c.Folder+"/", tt.project)
			put(t, c.Jobs+"/", tt.jobs)
			put(t, c.Output+"/", tt.jobs)
			mustRun(t, c)
			note := tt.note
			if note != "" {
				note = fmt.Sprintf(note, c.Jobs, c.Output)
			}
			if got := strings.Count(out.String(), "the project's folder is of"); !strings.Contains(out.String(), note) || got > 0 != (note != "") || got > 1 {
				t.Errorf("it says %q, want %q", out, note)
			}
		})
	}
}

// PUID was changed: what the daemon made as another user is still its own.
func TestOwnersAfterPUIDChanged(t *testing.T) {
	rootOnly(t)
	const was, now = 1000, 1001
	c, _ := world(t)
	c.UID, c.GID = was, was
	mustRun(t, c)
	for _, path := range []string{
		c.State + "/osbuilder.db", c.State + "/jobs/", c.State + "/jobs/ID/", c.State + "/jobs/ID/source/", c.State + "/jobs/ID/source/a.sh",
		c.Output + "/image/", c.Output + "/image/ID/", c.Output + "/image/ID/x.iso", c.Output + "/.partial/",
		c.Jobs + "/.taken/ID/", c.Jobs + "/.taken/ID/a.sh", c.Jobs + "/rejected/x.yml.txt", c.Jobs + "/next.sh",
	} {
		put(t, path, was)
	}
	victim := filepath.Join(t.TempDir(), "victim")
	put(t, victim, was)
	if err := errors.Join(os.Symlink(victim, c.Output+"/image/latest"), os.Lchown(c.Output+"/image/latest", was, was)); err != nil {
		t.Fatal(err)
	}
	put(t, c.Jobs+"/.taken/ID/of-a-third", 77)
	c.UID, c.GID = now, now
	mustRun(t, c)
	for dir, want := range map[string]map[string]int{
		c.State: {".": now, "osbuilder.db": now, "jobs": now, "jobs/ID": now, "jobs/ID/source": now, "jobs/ID/source/a.sh": now},
		c.Output: {
			".": now, ".partial": now, "image": now, "image/ID": now, "image/ID/x.iso": now, "image/latest": now,
		},
		c.Jobs: {
			".": now, ".taken": now, ".taken/ID": now, ".taken/ID/a.sh": now, ".taken/ID/of-a-third": 77,
			"rejected": now, "rejected/x.yml.txt": was, "next.sh": was, // the user's, or harmless
		},
	} {
		if diff := cmp.Diff(want, owners(t, dir)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", dir, diff)
		}
	}
	if got := owners(t, victim)["."]; got != was {
		t.Errorf("what a link leads to is of %d now", got)
	}
	// One that a daemon made which still ran meanwhile.
	put(t, c.State+"/jobs/ID/build.log", was)
	mustRun(t, c)
	if got := owners(t, c.State)["jobs/ID/build.log"]; got != now {
		t.Errorf("it is of %d", got)
	}
}

// The daemon ran as root, with PUID=0: what it made is handed over, and what
// may be root's own stays.
func TestOwnersAfterRoot(t *testing.T) {
	rootOnly(t)
	const now = 1000
	for name, given := range map[string]bool{"by init": false, "the folders by hand before": true} {
		t.Run(name, func(t *testing.T) {
			c, _ := world(t)
			c.UID, c.GID = 0, 0
			mustRun(t, c)
			put(t, c.Output+"/mine/", 0)
			put(t, c.Output+"/mine/id/", 0)
			for _, path := range []string{
				"/.partial/", "/.partial/id/", "/.partial/id/x.iso", "/begun/",
				"/image/", "/image/id/", "/image/id/x.iso", "/image/id/result.json", "/image/notes", "/image/more/", "/image/more/notes",
				"/mine/id/notes", "/open/", "/lost+found/", "/notes",
			} {
				put(t, c.Output+path, 0)
			}
			for _, path := range []string{"/.taken/id/", "/.taken/id/a/", "/.taken/id/a/configuration.nix", "/.taken/Mine/", "/rejected/a/", "/next/", "/next.sh"} {
				put(t, c.Jobs+path, 0)
			}
			put(t, c.Output+"/another/", 77)
			put(t, c.Output+"/another/id/", 0)
			put(t, c.Output+"/another/id/result.json", 0)
			if err := errors.Join(os.Symlink("id", c.Output+"/image/latest"), os.Chmod(c.Output+"/open", 0o777)); err != nil {
				t.Fatal(err)
			}
			if given {
				for _, dir := range []string{c.Jobs, c.Output} {
					if err := os.Chown(dir, now, now); err != nil {
						t.Fatal(err)
					}
				}
			}
			c.UID, c.GID = now, now
			for range 2 { // the second time there is nothing to do
				mustRun(t, c)
			}
			for dir, want := range map[string]map[string]int{
				c.Output: {
					".": now, ".partial": now, ".partial/id": now, ".partial/id/x.iso": now, "begun": now,
					"image": now, "image/latest": now, "image/id": now, "image/id/x.iso": now, "image/id/result.json": now,
					"image/notes": 0, "image/more": 0, "image/more/notes": 0, "mine": 0, "mine/id": 0, "mine/id/notes": 0, "open": 0, "lost+found": 0, "notes": 0,
					"another": 77, "another/id": 0, "another/id/result.json": 0,
				},
				c.Jobs: {
					".": now, ".taken": now, ".taken/id": now, ".taken/id/a": now, ".taken/id/a/configuration.nix": now, ".taken/Mine": 0,
					"rejected": now, "rejected/a": 0, "next": 0, "next.sh": 0,
				},
			} {
				if diff := cmp.Diff(want, owners(t, dir)); diff != "" {
					t.Errorf("%s (-want +got):\n%s", dir, diff)
				}
			}
		})
	}
}

// A volume, or a folder of the host, whose owners can't be changed.
func TestOwnersThatStay(t *testing.T) {
	rootOnly(t)
	for name, tc := range map[string]struct {
		path func(Config) string
		want string
	}{
		"state":  {func(c Config) string { return c.State }, "Use a local volume, or set PUID and PGID in .env to the owner of"},
		"jobs":   {func(c Config) string { return c.Jobs }, "sudo chown 1234:2345 FOLDER, where FOLDER is what JOBS_DIR names"},
		"output": {func(c Config) string { return c.Output }, "sudo chown 1234:2345 FOLDER, where FOLDER is what OUTPUT_DIR names"},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := world(t)
			dir := tc.path(c)
			put(t, dir+"/", 1000)
			put(t, filepath.Join(dir, ".taken/"), 1000)
			put(t, filepath.Join(dir, "rejected/"), 1000)
			if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
				testenv.Lacks(t, "nothing can be mounted here: %v", err)
			}
			defer func() {
				if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}()
			if err := unix.Mount("", dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatal(err)
			}
			err := Run(t.Context(), c)
			if err == nil || !errors.Is(err, syscall.EROFS) {
				t.Fatal(err)
			}
			if hints := strings.Join(hint.Of(err), " "); !strings.Contains(hints, tc.want) {
				t.Errorf("hints %q", hints)
			}
		})
	}
}

// In a rootless Docker root is the user, and every other number is a stranger
// who would keep him out of his own folders.
func TestOwnersInRootlessDocker(t *testing.T) {
	rootOnly(t)
	const (
		usual    = "         0          0 4294967295\n"
		rootless = "         0       1001          1\n         1     100000      65536\n"
		userns   = "         0     100000      65536\n" // of a daemon with userns-remap: 0 is nobody's number
	)
	for _, tt := range []struct {
		name                 string
		users                string
		jobs, output, puid   int
		refused              string // the folder that is spared
		noted                bool
		wantJobs, wantOutput int
	}{
		{"not rootless", usual, 0, 0, 1000, "", false, 1000, 1000},
		{"no user namespaces", "", 0, 0, 1000, "", false, 1000, 1000},
		{"the user himself", rootless, 0, 0, 0, "", false, 0, 0},
		{"another", rootless, 0, 0, 1000, "jobs", false, 0, 0},
		{"one folder is the user's", rootless, 1000, 0, 1000, "output", false, 1000, 0},
		{"given away before", rootless, 1000, 1000, 1000, "", true, 1000, 1000},
		{"back to the user", rootless, 1000, 1000, 0, "", false, 0, 0},
		{"other numbers for all", userns, 0, 0, 1000, "", true, 1000, 1000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, out := world(t)
			c.UID, c.GID, c.UserMap = tt.puid, tt.puid, filepath.Join(t.TempDir(), "uid_map")
			if err := os.WriteFile(c.UserMap, []byte(tt.users), 0o600); err != nil {
				t.Fatal(err)
			}
			put(t, c.Jobs+"/", tt.jobs)
			put(t, c.Output+"/", tt.output)
			err := Run(t.Context(), c)
			if tt.refused == "" && err != nil {
				t.Fatal(err)
			}
			if want := fmt.Sprintf("%s belongs to the user who runs this rootless Docker", filepath.Join(filepath.Dir(c.Jobs), tt.refused)); tt.refused != "" &&
				(err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(strings.Join(hint.Of(err), " "), "Put PUID=0 and PGID=0 into .env")) {
				t.Errorf("%v, hints %q", err, hint.Of(err))
			}
			if noted := strings.Contains(out.String(), "note: Docker is rootless here"); noted != tt.noted {
				t.Errorf("it says %q", out)
			}
			if jobs, output := owners(t, c.Jobs)["."], owners(t, c.Output)["."]; jobs != tt.wantJobs || output != tt.wantOutput {
				t.Errorf("jobs is of %d, output of %d", jobs, output)
			}
		})
	}
}

func TestRemapped(t *testing.T) {
	for text, want := range map[string]bool{
		"         0          0 4294967295\n": false, "": false, "nonsense": false,
		"         0       1000          1\n         1     100000      65536\n": true,
		"0 100000 65536\n": true,
	} {
		if got := remapped(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
