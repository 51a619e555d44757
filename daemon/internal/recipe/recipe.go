// Package recipe knows what can be built: which drop is which kind of job, and
// the Bash that a VM runs for it.
package recipe

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// ErrUnfit means that the drop can't be a job as it is. What wraps it says why
// and carries a hint; any other error means that it could not be looked at.
var ErrUnfit = errors.New("not a job")

// unfit is an ErrUnfit whose text is the reason alone.
type unfit struct{ reason string }

func (e *unfit) Error() string { return e.reason }

// Is makes it an ErrUnfit without its text.
func (e *unfit) Is(target error) bool { return target == ErrUnfit }

func refuse(hintText, format string, args ...any) error {
	return hint.With(&unfit{fmt.Sprintf(format, args...)}, hintText)
}

// Classify says by which recipe a drop of that name is built.
func Classify(drop string, isDir bool) (job.Recipe, error) {
	const takes = "Drop a Bash script named NAME.sh."
	ext := filepath.Ext(drop)
	switch {
	case isDir:
		return "", refuse(takes, "it is a folder, and this version builds no folders")
	case ext == ".sh":
		return job.RecipeScript, nil
	case strings.EqualFold(ext, ".sh"):
		return "", refuse("Rename it to "+strings.TrimSuffix(drop, ext)+".sh.", "its name ends in %s, not in .sh", ext)
	case ext == ".nix", ext == ".yaml", ext == ".yml":
		return "", refuse(takes, "this version builds no %s files", ext)
	default:
		return "", refuse(takes, "its name doesn't end in .sh")
	}
}

// Check says what is wrong with the file of a drop, before it becomes a job.
func Check(recipe job.Recipe, path string) error {
	switch recipe {
	case job.RecipeScript:
		text, err := readScript(path)
		if err != nil {
			return err
		}
		return checkScript(text)
	default:
		return fmt.Errorf("check drop: unknown recipe %q", recipe)
	}
}

// Body returns the Bash that builds the job, from the copy of its drop in the
// folder source.
func Body(j job.Job, source string) ([]byte, error) {
	switch j.Recipe {
	case job.RecipeScript:
		if !filepath.IsLocal(j.Entry) {
			return nil, fmt.Errorf("make request: entry %q leads out of the job's folder", j.Entry)
		}
		text, err := readScript(filepath.Join(source, j.Entry))
		if err != nil {
			return nil, fmt.Errorf("make request: %w", err)
		}
		return scriptBody(text), nil
	default:
		return nil, fmt.Errorf("make request: unknown recipe %q", j.Recipe)
	}
}

// maxScript leaves room for the header in the request, bytes.
const maxScript = pipe.MaxRequest - pipe.MaxHeader - 1024

func readScript(path string) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, refuse("Drop the file itself.", "it is not a regular file")
	}
	if info.Size() > maxScript {
		return nil, refuse("Let the script download large parts, or make them itself.",
			"a script has at most %d bytes, this one has %d", maxScript, info.Size())
	}
	return os.ReadFile(path)
}
