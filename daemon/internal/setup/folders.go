package setup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

// folders gives the folders their owner: the folders alone, for what lies in
// them can be the user's and much.
func (c Config) folders() error {
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
	for _, f := range []struct{ path, setting string }{{c.State, ""}, {c.Jobs, "JOBS_DIR"}, {c.Output, "OUTPUT_DIR"}} {
		if err := c.give(f.path, 0, f.setting); err != nil {
			return err
		}
	}
	for _, name := range []string{"rejected", ".taken"} {
		path := filepath.Join(c.Jobs, name)
		if err := effect.Mkdir(path, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return c.refused(err, path, "JOBS_DIR")
		}
		if err := c.give(path, 0, "JOBS_DIR"); err != nil {
			return err
		}
	}
	return nil
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
		if uid != c.UID && uid != 0 {
			fmt.Fprintf(c.Out, "note: %s was of user %d; what lies in it still is (docs/configuration.md, PUID and PGID)\n", path, uid)
		}
	}
	if info.Mode().Perm() != mode {
		if err := effect.Chmod(path, mode); err != nil {
			return c.refused(fmt.Errorf("let its owner write in %s: %w", path, err), path, setting)
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
