// Package product finds the image among what a build made.
package product

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Products is where a build says what of its output is meant for people.
const Products = "nix-support/hydra-build-products"

// most bounds the search for an output's only file.
const most = 100

// line is TYPE SUBTYPE PATH [DEFAULT]; a path with blanks is quoted.
var line = regexp.MustCompile(`^\s*(\S+)\s+(\S+)\s+(?:"([^"]*)"|(\S+))`)

// Find returns the image files in an output of a build, absolute and with
// links followed: those that it declares itself; else filePath, which is
// relative to the output and may be empty; else its only file.
func Find(output, filePath string) ([]string, error) {
	st, err := os.Stat(output)
	if err != nil {
		return nil, fmt.Errorf("find the image: %w", err)
	}
	if !st.IsDir() {
		return resolve(output)
	}
	declared, err := declared(output)
	if err != nil {
		return nil, err
	}
	if len(declared) > 0 {
		return resolve(declared...)
	}
	if filePath != "" {
		if path := filepath.Join(output, filePath); isFile(path) {
			return resolve(path)
		}
	}
	return only(output)
}

func declared(output string) ([]string, error) {
	text, err := os.ReadFile(filepath.Join(output, Products))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find the image: %w", err)
	}
	var found []string
	for l := range strings.SplitSeq(string(text), "\n") {
		m := line.FindStringSubmatch(l)
		if m == nil || m[1] != "file" {
			continue
		}
		path := m[3] + m[4]
		if !filepath.IsAbs(path) {
			path = filepath.Join(output, path)
		}
		if isFile(path) && !slices.Contains(found, path) {
			found = append(found, path)
		}
	}
	return found, nil
}

func only(output string) ([]string, error) {
	var files []string
	err := filepath.WalkDir(output, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path == filepath.Join(output, "nix-support"):
			return fs.SkipDir
		case d.IsDir() || !isFile(path):
			return nil
		}
		if files = append(files, path); len(files) > most {
			return fs.SkipAll
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("find the image: %w", err)
	}
	switch {
	case len(files) == 0:
		return nil, fmt.Errorf("find the image: %s holds no file", output)
	case len(files) > 1:
		return nil, fmt.Errorf("find the image: %s holds several files and doesn't say which of them it is: %s and %s",
			output, files[0], files[1])
	}
	return resolve(files...)
}

func isFile(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular()
}

func resolve(paths ...string) ([]string, error) {
	for i, path := range paths {
		file, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fmt.Errorf("find the image: %w", err)
		}
		paths[i] = file
	}
	return paths, nil
}
