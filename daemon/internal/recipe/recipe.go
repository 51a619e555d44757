// Package recipe knows what can be built: which drop is which kind of job, what
// is wrong with one that can't be, and what a VM is given for it: the Bash of
// the request, and the inputs that are uploaded before it.
//
// Each recipe has a file of its own. What all have in common is here.
package recipe

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

// takes says what can be dropped.
const takes = "Drop a NixOS configuration, NAME.nix, or a folder with configuration.nix in it, or a Bash script, NAME.sh."

// Classify says by which recipe a drop of that name is built.
func Classify(drop string, isDir bool) (job.Recipe, error) {
	ext := filepath.Ext(drop)
	switch {
	case isDir, ext == ".nix":
		return job.RecipeNixOS, nil
	case ext == ".sh":
		return job.RecipeScript, nil
	case strings.EqualFold(ext, ".sh"), strings.EqualFold(ext, ".nix"):
		right := strings.ToLower(ext)
		return "", refuse("Rename it to "+strings.TrimSuffix(drop, ext)+right+".", "its name ends in %s, not in %s", ext, right)
	case ext == ".yaml", ext == ".yml":
		return "", refuse(takes, "this version builds no %s files", ext)
	case archive(drop):
		return "", refuse("Unpack it, and drop the folder.", "it is an archive")
	default:
		return "", refuse(takes, "its name ends neither in .nix nor in .sh")
	}
}

func archive(drop string) bool {
	for _, end := range []string{".zip", ".tar", ".tgz", ".gz", ".xz", ".zst", ".bz2", ".7z"} {
		if strings.HasSuffix(strings.ToLower(drop), end) {
			return true
		}
	}
	return false
}

// Check says what is wrong with a drop, before it becomes a job.
func Check(recipe job.Recipe, path string) error {
	switch recipe {
	case job.RecipeScript:
		text, err := readText(path, maxScript)
		if err != nil {
			return err
		}
		return checkScript(text)
	case job.RecipeNixOS:
		return checkNixOS(path)
	default:
		return fmt.Errorf("check drop: unknown recipe %q", recipe)
	}
}

// Prepare completes a job from the copy of its drop, in the folder source: its
// entry, what it is to make, and the digest of its inputs.
func Prepare(j *job.Job, source string, defaults job.NixOS) error {
	switch j.Recipe {
	case job.RecipeScript:
		j.Entry = j.Drop
		return nil
	case job.RecipeNixOS:
		return prepareNixOS(j, source, defaults)
	default:
		return fmt.Errorf("prepare job: unknown recipe %q", j.Recipe)
	}
}

// Body returns the Bash that builds the job, from the copy of its drop in the
// folder source.
func Body(j job.Job, source string) ([]byte, error) {
	if !filepath.IsLocal(j.Entry) {
		return nil, fmt.Errorf("make request: entry %q leads out of the job's folder", j.Entry)
	}
	switch j.Recipe {
	case job.RecipeScript:
		text, err := readText(filepath.Join(source, j.Entry), maxScript)
		if err != nil {
			return nil, fmt.Errorf("make request: %w", err)
		}
		return scriptBody(text), nil
	case job.RecipeNixOS:
		return nixosBody(j, source)
	default:
		return nil, fmt.Errorf("make request: unknown recipe %q", j.Recipe)
	}
}

// Inputs writes the inputs of a job that has some: the same bytes each time.
func Inputs(j job.Job, source string, w io.Writer) error {
	switch j.Recipe {
	case job.RecipeNixOS:
		return nixosInputs(j, source, w)
	default:
		return fmt.Errorf("make inputs: recipe %q has none", j.Recipe)
	}
}

// maxScript leaves room for the header in the request, bytes.
const maxScript = pipe.MaxRequest - pipe.MaxHeader - 1024

// readText reads a file that is all of a drop, or the main one of it.
func readText(path string, limit int64) ([]byte, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, refuse("Drop the file itself.", "it is not a regular file")
	}
	if info.Size() > limit {
		return nil, refuse("Let it download or generate what makes it large.",
			"such a file has at most %s, this one has %s", pipe.Size(limit), pipe.Size(info.Size()))
	}
	return os.ReadFile(path)
}

// checkText says what keeps any text from being read as what it was meant to
// be. empty is what to do about an empty one; reader is the program that
// reads it.
func checkText(text []byte, reader, empty string) error {
	switch {
	case len(bytes.TrimSpace(text)) == 0:
		return refuse(empty, "it is empty")
	case bytes.HasPrefix(text, []byte("\xff\xfe")), bytes.HasPrefix(text, []byte("\xfe\xff")):
		return refuse("Save it as UTF-8.", "line 1: it is UTF-16 text, which %s can't read", reader)
	case bytes.HasPrefix(text, []byte("\xef\xbb\xbf")):
		return refuse("Save it as UTF-8 without a byte order mark.", "line 1: it begins with a byte order mark, which %s takes for a part of the text", reader)
	}
	return nil
}

// lineOf returns the number of the line in which the byte at i is.
func lineOf(text []byte, i int) int { return 1 + bytes.Count(text[:i], []byte("\n")) }

// shellQuote makes one word of s for Bash.
func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

func isNotExist(err error) bool { return errors.Is(err, fs.ErrNotExist) }
