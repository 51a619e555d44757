package recipe

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"strings"

	"osbuilder/daemon/internal/job"
	"osbuilder/pipe"
)

// configuration is the file of a folder that is built.
const configuration = "configuration.nix"

// maxNix bounds the file that is built; modules of real configurations have a
// few thousand bytes.
const maxNix = 16 << 20

// checkNixOS looks at a configuration: a file, or a folder with one.
func checkNixOS(drop string) error {
	info, err := os.Lstat(drop)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return checkNix(drop, "")
	}
	entry := filepath.Join(drop, configuration)
	switch info, err := os.Stat(entry); {
	case isNotExist(err):
		return explainFolder(drop)
	case err != nil:
		return err
	case !info.Mode().IsRegular():
		return refuse("Put the configuration into the file "+configuration+".", "its %s is not a regular file", configuration)
	}
	if info, err := os.Lstat(entry); err != nil || !info.Mode().IsRegular() {
		return err // a link: whether it stays in the folder is seen when it is copied
	}
	return checkNix(entry, configuration+", ")
}

// checkNix says what would keep Nix from reading a file. where begins what is
// said of a line.
func checkNix(file, where string) error {
	text, err := readText(file, maxNix)
	if err != nil {
		return err
	}
	if err := checkText(text, "Nix", writeHidden); err != nil {
		return err
	}
	if i := bytes.IndexByte(text, 0); i >= 0 {
		return refuse("Drop a NixOS configuration: a text in the language Nix.", "%sline %d: it has a NUL byte, so it is no text", where, lineOf(text, i))
	}
	return nil
}

// explainFolder says what is missing in a folder that has no
// configuration.nix, from what is there instead.
func explainFolder(drop string) error {
	entries, err := os.ReadDir(drop)
	if err != nil {
		return err
	}
	var nix, folders []string
	flake := false
	for _, e := range entries {
		switch {
		case e.IsDir():
			if _, err := os.Stat(filepath.Join(drop, e.Name(), configuration)); err == nil {
				folders = append(folders, e.Name())
			}
		case strings.EqualFold(e.Name(), configuration):
			return refuse(fmt.Sprintf("Rename %s to %s.", e.Name(), configuration), "it has no %s", configuration)
		case e.Name() == "flake.nix":
			flake = true
		case filepath.Ext(e.Name()) == ".nix":
			nix = append(nix, e.Name())
		}
	}
	switch {
	case flake:
		return refuse("Put a "+configuration+" beside flake.nix that imports the modules of one machine.",
			"it has a flake.nix and no %s, and this version builds no flakes", configuration)
	case len(folders) == 1:
		return refuse(fmt.Sprintf("Drop the folder %s, which has one.", folders[0]), "it has no %s itself", configuration)
	case len(folders) > 1:
		return refuse("Drop each of them: "+strings.Join(folders, ", ")+".", "it has no %s itself, but folders with one", configuration)
	case len(nix) == 1:
		return refuse(fmt.Sprintf("Rename %s to %s, or, if it needs no other file, drop it alone.", nix[0], configuration), "it has no %s", configuration)
	case len(entries) == 0:
		return refuse("Fill it under a hidden name, such as .machine, and rename it when it is whole.", "it is an empty folder")
	}
	return refuse("A folder is built from the file "+configuration+" in it: add one that imports the others.", "it has no %s", configuration)
}

// prepareNixOS fills in what a configuration's job is.
func prepareNixOS(j *job.Job, source string, defaults job.NixOS) error {
	j.NixOS = &defaults
	j.Entry = j.Drop
	if info, err := os.Lstat(filepath.Join(source, j.Drop)); err != nil {
		return err
	} else if info.IsDir() {
		j.Entry = path.Join(j.Drop, configuration)
	}
	sum := sha256.New()
	size := counter{w: sum}
	if err := nixosInputs(*j, source, &size); err != nil {
		return err
	}
	if size.n > pipe.MaxInputs {
		return refuse("Remove what the configuration doesn't need, and let it download the rest.",
			"it has %d bytes, at most %d can be taken", size.n, int64(pipe.MaxInputs))
	}
	j.Inputs = &job.Inputs{SHA256: hex.EncodeToString(sum.Sum(nil)), Size: size.n}
	return nil
}

// A counter counts what passes.
type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// nixosInputs writes the drop as an archive. A folder's content lies at its
// top; a file lies there under a name that is plain, because Nix takes some
// characters amiss in a path.
func nixosInputs(j job.Job, source string, w io.Writer) error {
	tree, err := os.OpenRoot(source)
	if err != nil {
		return fmt.Errorf("make inputs: %w", err)
	}
	defer func() { _ = tree.Close() }() // nothing is written by it
	rename := below(j.Drop)
	if j.Entry == j.Drop {
		rename = func(string) string { return nixosEntry(j) }
	}
	if err := writeTar(w, tree, j.Drop, rename); err != nil {
		return fmt.Errorf("make inputs: %w", err)
	}
	return nil
}

// nixosEntry is the name of the file to build in the archive.
func nixosEntry(j job.Job) string {
	if j.Entry == j.Drop {
		return job.OutputName(j.Drop) + ".nix"
	}
	return strings.TrimPrefix(j.Entry, j.Drop+"/")
}

// noProgram is what a job reports in a VM whose image is older than this
// recipe.
const noProgram = "the builder VM has no image-build, so it can't build NixOS configurations"

const oldRunner = "the builder VM's runner is older than the sidecar, so it can't build NixOS configurations"

const noProgramAdvice = "Its image is of another version: docker compose up -d --build, then docker compose restart vm."

// nixosBody unpacks the inputs and leaves the rest to image-build.
func nixosBody(j job.Job, source string) ([]byte, error) {
	if j.NixOS == nil {
		return nil, fmt.Errorf("make request: job %s has no target", j.ID)
	}
	report, err := json.Marshal(map[string]any{
		"kind":  "nixos-image",
		"error": map[string]string{"class": "unsupported", "summary": noProgram, "advice": noProgramAdvice},
	})
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	var b strings.Builder
	// A runner of before this recipe knows no inputs.
	fmt.Fprintf(&b, "set -euo pipefail\n[[ -n ${INPUTS-} ]] || {\n  echo %s >&2\n  exit 1\n}\n", shellQuote(oldRunner+". "+noProgramAdvice))
	fmt.Fprintf(&b, "mkdir source\ntar --extract --no-same-owner --file=\"$INPUTS\" --directory=source\n")
	fmt.Fprintf(&b, "if ! command -v image-build >/dev/null; then\n  printf '%%s\\n' %s >\"$REPORT\"\n  echo %s >&2\n  exit 1\nfi\n",
		shellQuote(string(report)), shellQuote(noProgram+". "+noProgramAdvice))
	command := []string{"image-build"}
	for _, option := range [][2]string{
		{"--entry", nixosEntry(j)},
		{"--format", j.NixOS.Format},
		{"--system", j.NixOS.System},
		{"--nixpkgs", j.NixOS.Nixpkgs},
		{"--name", j.Name},
	} {
		command = append(command, option[0], shellQuote(option[1]))
	}
	run := strings.Join(append(command, "source"), " ")
	neighbours, err := missing(j, source)
	if err != nil {
		return nil, fmt.Errorf("make request: %w", err)
	}
	if len(neighbours) == 0 {
		b.WriteString("exec " + run + "\n")
		return []byte(b.String()), nil
	}
	fmt.Fprintf(&b, "code=0\n%s || code=$?\nif ((code != 0)); then\n  echo %s\nfi\nexit \"$code\"\n", run, shellQuote(fmt.Sprintf(
		"note: %s mentions %s, and was dropped alone. If it needs other files, drop a folder that has them all, with %s as the main one.",
		j.Drop, strings.Join(neighbours, ", "), configuration)))
	return []byte(b.String()), nil
}

var (
	relativePath = regexp.MustCompile(`(?:^|[\s(\[=])(\.{1,2}/[A-Za-z0-9._+/-]+)`)
	comment      = regexp.MustCompile(`(?m)#.*$`)
)

// missing returns the neighbours that a single file speaks of. It only looks
// for what resembles a path, so it is good for a hint and no more.
func missing(j job.Job, source string) ([]string, error) {
	if j.Entry != j.Drop {
		return nil, nil
	}
	text, err := readText(filepath.Join(source, j.Entry), maxNix)
	if err != nil {
		return nil, err
	}
	var found []string
	seen := map[string]bool{}
	for _, m := range relativePath.FindAllSubmatch(comment.ReplaceAll(text, nil), -1) {
		name := string(m[1])
		if !seen[name] && len(found) < 5 {
			seen[name] = true
			found = append(found, name)
		}
	}
	return found, nil
}
