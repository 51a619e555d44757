package setup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe"
	"osbuilder/pipe/effect"
)

// folders gives the folders their owner. Of what lies in them it gives away
// what an earlier owner made as the daemon: the rest can be the user's. Of
// root's only what made names is the daemon's without a doubt.
func (c Config) folders() error {
	users, _ := os.ReadFile(c.UserMap) // none where there are no user namespaces
	if remapped(string(users)) && c.UID != 0 {
		if err := c.spare(string(users)); err != nil {
			return err
		}
		fmt.Fprintln(c.Out, "note: Docker is rootless here, or gives users other numbers. The user who runs it is 0 in there: "+
			"for folders of yours set PUID=0 and PGID=0 in .env, then: docker compose up -d")
	}
	// Private, since what lies in it is.
	if err := c.give(c.ClientKeys, 0o700, ""); err != nil {
		return err
	}
	dirs := []string{c.VMKeys, c.ClientKeys}
	for _, name := range c.Builders {
		dirs = append(dirs, filepath.Join(c.VMKeys, name))
	}
	for _, dir := range dirs {
		if err := sweep(dir, time.Now()); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("look into %s: %w", dir, err)
		}
	}
	if err := c.giveState(); err != nil {
		return err
	}
	c.noteProject()
	if err := c.give(c.Jobs, 0, "JOBS_DIR"); err != nil {
		return err
	}
	if err := c.giveAll(c.Output, "OUTPUT_DIR"); err != nil {
		return err
	}
	if err := c.giveMade(c.Output, madeInOutput); err != nil {
		return c.refused(err, c.Output, "OUTPUT_DIR")
	}
	for _, name := range []string{"rejected", ".taken"} {
		path := filepath.Join(c.Jobs, name)
		if err := effect.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return c.refused(err, path, "JOBS_DIR")
		}
		if err := c.giveAll(path, "JOBS_DIR"); err != nil {
			return err
		}
	}
	taken := filepath.Join(c.Jobs, ".taken")
	if err := c.giveMade(taken, madeInTaken); err != nil {
		return c.refused(err, taken, "JOBS_DIR")
	}
	return nil
}

// nobody is whose everything seems to be that belongs to a user whom the
// container doesn't know: see user_namespaces(7).
const nobody = 65534

// noteProject says whose the project is, if that is not whom the folders are
// given to: a jobs/ that Docker made is nobody's, and tells nothing.
func (c Config) noteProject() {
	info, err := os.Stat(c.Folder)
	if err != nil {
		return
	}
	uid, gid := ownerOf(info)
	if uid == 0 || uid == c.UID || uid == nobody {
		return
	}
	if info, err = os.Stat(c.Jobs); err != nil {
		return // which is said elsewhere
	}
	if was, _ := ownerOf(info); was != 0 && was != c.UID {
		return // give notes that
	}
	fmt.Fprintf(c.Out, "note: the project's folder is of user %d, and %s and %s are given to user %d. "+
		"If the first is you, and they are to be yours, set PUID=%d and PGID=%d in .env, then: docker compose up -d\n", uid, c.Jobs, c.Output, c.UID, uid, gid)
}

// giveState gives away the state folder and all in it, which is the daemon's
// alone. It goes from the inside to the outside, so that one that was killed is
// begun again.
func (c Config) giveState() error {
	// The jobs' folders count, too: a daemon that still ran may have made some
	// while an earlier init was at it. The sources in them it only reads.
	info, err := os.Stat(c.State)
	if err == nil && info.IsDir() && c.foreign(c.State, 3) {
		if err := c.giveBelow(c.State, func(os.FileInfo) bool { return true }); err != nil && !open(info, false) {
			return c.refused(err, c.State, "")
		}
	}
	return c.give(c.State, 0, "")
}

// foreign reports whether a folder, or anything in it down to a depth, belongs
// to others.
func (c Config) foreign(path string, depth int) bool {
	info, err := os.Lstat(path)
	if err != nil {
		return false
	}
	if uid, gid := ownerOf(info); uid != c.UID || gid != c.GID {
		return true
	}
	if depth == 0 || !info.IsDir() {
		return false
	}
	entries, err := os.ReadDir(path)
	return err == nil && slices.ContainsFunc(entries, func(e os.DirEntry) bool {
		return c.foreign(filepath.Join(path, e.Name()), depth-1)
	})
}

// giveAll gives away a folder, and what is in the folders in it that was its
// earlier owner's: of the user that the daemon ran as before PUID changed.
func (c Config) giveAll(path, setting string) error {
	info, err := os.Stat(path)
	if err != nil || !info.IsDir() {
		return c.give(path, 0, setting) // which says it
	}
	was, _ := ownerOf(info)
	if was == c.UID || was == 0 {
		return c.give(path, 0, setting)
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return c.refused(err, path, setting)
	}
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		if err := c.giveBelow(filepath.Join(path, e.Name()), func(info os.FileInfo) bool {
			uid, _ := ownerOf(info)
			return uid == was
		}); err != nil {
			return c.refused(err, path, setting)
		}
	}
	return c.give(path, 0, setting)
}

// giveMade gives away what a daemon made that ran as root, with PUID=0. What
// else is root's in there is left alone, and where a folder is not root's,
// others may have put into it what they like.
func (c Config) giveMade(path string, made func(dir string) (whole, itself []string)) error {
	if c.UID == 0 {
		return nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(path, e.Name())
		info, err := os.Lstat(dir)
		if err != nil || !info.IsDir() || !isRoots(info) || open(info, false) {
			continue // open to all it can be on a share where everything seems to be root's
		}
		whole, itself := made(dir)
		for _, dir := range whole {
			if err := c.giveBelow(dir, isRoots); err != nil {
				return err
			}
		}
		for _, path := range itself {
			effect.Before("chown", path)
			if err := os.Lchown(path, c.UID, c.GID); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// madeInOutput is what the daemon made of a folder in output/: downloads under
// way, or jobs of one name with the link to the newest. An empty folder is one
// whose first job was about to come.
func madeInOutput(dir string) (whole, itself []string) {
	if filepath.Base(dir) == ".partial" {
		return []string{dir}, nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil
	}
	for _, e := range entries {
		job := filepath.Join(dir, e.Name())
		info, err := e.Info()
		if err != nil || !info.IsDir() || !isRoots(info) || !pipe.ValidID(e.Name()) {
			continue
		}
		if _, err := os.Lstat(filepath.Join(job, "result.json")); err == nil {
			whole = append(whole, job)
		}
	}
	if len(whole) == 0 && (len(entries) > 0 || filepath.Base(dir) == "lost+found") {
		return nil, nil
	}
	if latest, err := os.Lstat(filepath.Join(dir, "latest")); err == nil && latest.Mode()&os.ModeSymlink != 0 && isRoots(latest) {
		itself = append(itself, filepath.Join(dir, "latest"))
	}
	return whole, append(itself, dir)
}

// madeInTaken is what the daemon made in jobs/.taken: a folder for each job,
// which holds the drop.
func madeInTaken(dir string) (whole, itself []string) {
	if !pipe.ValidID(filepath.Base(dir)) {
		return nil, nil
	}
	return []string{dir}, nil
}

func isRoots(info os.FileInfo) bool {
	uid, _ := ownerOf(info)
	return uid == 0
}

// giveBelow gives away what is in a folder, and at last the folder, where
// wanted says so. Links are given away, not followed.
func (c Config) giveBelow(dir string, wanted func(os.FileInfo) bool) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if info.IsDir() {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := c.giveBelow(filepath.Join(dir, e.Name()), wanted); err != nil {
				return err
			}
		}
	}
	uid, gid := ownerOf(info)
	if uid == c.UID && gid == c.GID || !wanted(info) {
		return nil
	}
	effect.Before("chown", dir)
	return os.Lchown(dir, c.UID, c.GID)
}

// give makes the folder its owner's, who must be able to write there. With
// mode 0 the permissions of others stay as they are. setting is the variable
// that names the folder on the host, if one does.
func (c Config) give(path string, mode os.FileMode, setting string) error {
	info, err := os.Stat(path)
	if err != nil {
		return hint.With(fmt.Errorf("give %s to its owner: %w", path, err), "compose.yaml mounts it into the service init.")
	}
	if !info.IsDir() {
		return fmt.Errorf("give %s to its owner: it is no folder", path)
	}
	if mode == 0 {
		mode = info.Mode().Perm() | 0o700
	}
	uid, gid := ownerOf(info)
	if uid != c.UID || gid != c.GID {
		if err := effect.Chown(path, c.UID, c.GID); err != nil {
			if open(info, gid == c.GID) {
				return nil // a share that knows no owners, and lets the daemon write
			}
			return c.refused(fmt.Errorf("give %s (of %d:%d) to %d:%d: %w", path, uid, gid, c.UID, c.GID, err), path, setting)
		}
		fmt.Fprintf(c.Out, "gave %s to %d:%d\n", path, c.UID, c.GID)
		if uid != c.UID && uid != 0 && setting != "" && filepath.Dir(path) != c.Jobs {
			fmt.Fprintf(c.Out, "note: %s was of user %d. If that is you, set PUID=%d and PGID=%d in .env, then: docker compose up -d\n", path, uid, uid, gid)
		}
	}
	if info.Mode().Perm() != mode {
		if err := effect.Chmod(path, mode); err != nil {
			return c.refused(fmt.Errorf("let its owner write in %s: %w", path, err), path, setting)
		}
	}
	return nil
}

// remapped reports whether root here is another user outside, by the text of
// uid_map, see user_namespaces(7).
func remapped(text string) bool {
	f := strings.Fields(text)
	return len(f) >= 3 && f[0] == "0" && f[1] != "0"
}

// rootless reports whether root here is the one user outside who runs Docker.
func rootless(text string) bool {
	return remapped(text) && strings.Fields(text)[2] == "1"
}

// spare refuses to give away what belongs to the user of a rootless Docker, who
// is 0 here: any other number is nobody he could be, and to get at his own
// folder again he would have to be root.
func (c Config) spare(users string) error {
	if !rootless(users) {
		return nil
	}
	for _, path := range []string{c.Jobs, c.Output} {
		info, err := os.Stat(path)
		if err != nil {
			continue // which is said elsewhere
		}
		if uid, _ := ownerOf(info); uid == 0 {
			return hint.With(fmt.Errorf("%s belongs to the user who runs this rootless Docker, and PUID=%d would take it from him", path, c.UID),
				"In a rootless Docker you are user 0. Put PUID=0 and PGID=0 into .env, then: docker compose up -d")
		}
	}
	return nil
}

// open reports that the daemon may write there without owning it.
func open(info os.FileInfo, group bool) bool {
	return info.Mode()&0o003 == 0o003 || group && info.Mode()&0o030 == 0o030
}

func (c Config) refused(err error, path, setting string) error {
	if setting == "" {
		return hint.With(err, fmt.Sprintf("Its volume lets nobody change owners. Use a local volume, or set PUID and PGID in .env to the owner of %s.", path))
	}
	return hint.With(err, fmt.Sprintf(
		"The file system of this folder does not let init do it (a network share, perhaps, or it is read-only). "+
			"On the host, either give it away yourself: sudo chown %d:%d FOLDER, where FOLDER is what %s names; "+
			"or set PUID and PGID in .env to its owner: stat -c %%u:%%g FOLDER; or set %s to a folder on a local disk.",
		c.UID, c.GID, setting, setting))
}
