package runner

import (
	"fmt"

	"golang.org/x/sys/unix"

	"osbuilder/pipe/effect"
)

// exchange swaps two names in one step, so that pipe_in is never missing.
func exchange(a, b string) error {
	effect.Before("rename", b)
	if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange %s and %s: %w", a, b, err)
	}
	return nil
}
