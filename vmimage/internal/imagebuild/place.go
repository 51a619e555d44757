package imagebuild

import (
	"errors"
	"io"
	"os"
	"strings"
)

// store is where links may lead to.
const store = "/nix/store/"

// place puts a file into the folder for results: a link where it lies in the
// store, else a copy.
func place(file, to string) error {
	if strings.HasPrefix(file, store) {
		return os.Symlink(file, to)
	}
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
