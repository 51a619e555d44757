package vm

import (
	"os"

	"github.com/pkg/sftp"

	"osbuilder/pipe/effect"
)

// create, remove and rename change the VM's files.

func create(c *sftp.Client, name string, flags int) (*remoteFile, error) {
	effect.Before("remote open", name)
	f, err := c.OpenFile(name, flags)
	if err != nil {
		return nil, err
	}
	return &remoteFile{f}, nil
}

func remove(c *sftp.Client, name string) error {
	effect.Before("remote remove", name)
	return c.Remove(name)
}

func rename(c *sftp.Client, from, to string) error {
	effect.Before("remote rename", to)
	return c.PosixRename(from, to)
}

// A remoteFile is an sftp.File whose changes are effects.
type remoteFile struct{ *sftp.File }

// Write is [sftp.File.Write].
func (f *remoteFile) Write(b []byte) (int, error) {
	effect.Before("remote write", f.Name())
	return f.File.Write(b)
}

// Sync is [sftp.File.Sync].
func (f *remoteFile) Sync() error {
	effect.Before("remote sync", f.Name())
	return f.File.Sync()
}

// Chmod is [sftp.File.Chmod].
func (f *remoteFile) Chmod(mode os.FileMode) error {
	effect.Before("remote chmod", f.Name())
	return f.File.Chmod(mode)
}

// Truncate is [sftp.File.Truncate].
func (f *remoteFile) Truncate(size int64) error {
	effect.Before("remote truncate", f.Name())
	return f.File.Truncate(size)
}
