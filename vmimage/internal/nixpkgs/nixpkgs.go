// Package nixpkgs turns the name of a nixpkgs into one in the Nix store: a
// channel, a revision, a path or an address, with revision and hash, and
// keeps to them by a pin.
package nixpkgs

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nix"
	"osbuilder/vmimage/internal/nixlog"
)

// A Nixpkgs is one that is there. What isn't known of it is empty.
type Nixpkgs struct {
	Source   string `json:"source"`   // the name as it was given
	Revision string `json:"revision"` // of the repository, 40 hex digits
	Release  string `json:"release"`  // like 26.05.1234.abcdef012345
	Hash     string `json:"hash"`     // of the unpacked tree, sha256:… as Nix writes it
	Path     string `json:"path"`
	URL      string `json:"url,omitempty"` // what was downloaded
}

// A Pin is what a pin file holds.
type Pin struct {
	Source   string `json:"source"`
	URL      string `json:"url"`
	Revision string `json:"revision,omitempty"`
	Hash     string `json:"hash"`
}

// A Resolver gets nixpkgs.
type Resolver struct {
	Nix  nix.Runner
	Say  func(line string)
	Root string // where the garbage collector's root is put

	// Where channels and revisions are; empty is the usual place.
	Channels, Archives string
	Client             *http.Client
}

const (
	channels = "https://channels.nixos.org"
	archives = "https://github.com/NixOS/nixpkgs/archive"
	// answer bounds the wait for a server's answer to a small question.
	answer = 60 * time.Second
)

var (
	revision = regexp.MustCompile(`^[0-9a-f]{40}$`)
	channel  = regexp.MustCompile(`^[a-z]+-[a-z0-9][a-z0-9.-]*$`)
)

// Check says what is wrong with a name, before anything is done.
func Check(name string) error {
	switch {
	case revision.MatchString(name), channel.MatchString(name), filepath.IsAbs(name):
		return nil
	case strings.HasPrefix(name, "https://"), strings.HasPrefix(name, "http://"), strings.HasPrefix(name, "file:///"):
		return nil
	}
	return fmt.Errorf("nixpkgs %q is neither a channel like nixos-26.05, nor a revision of 40 hex digits, nor an absolute path, nor the address of a tarball", name)
}

// Resolve gets the nixpkgs of that name. With a pin file of the same name it
// is the pinned one; else the file is written. Errors are [*explain.Error].
func (r Resolver) Resolve(ctx context.Context, name, pinFile string) (Nixpkgs, error) {
	if filepath.IsAbs(name) {
		return r.path(ctx, name)
	}
	pin, pinned, err := readPin(pinFile, name)
	if err != nil {
		return Nixpkgs{}, err
	}
	if pinned {
		r.Say("nixpkgs is pinned: " + pin.URL)
	} else if pin, err = r.find(ctx, name); err != nil {
		return Nixpkgs{}, err
	}
	path, hash, err := r.fetch(ctx, pin)
	if err != nil {
		return Nixpkgs{}, err
	}
	n, err := r.look(path)
	if err != nil {
		return Nixpkgs{}, err
	}
	n.Source, n.URL, n.Hash = name, pin.URL, hash
	if n.Revision == "" {
		n.Revision = pin.Revision
	}
	if pinFile != "" && !pinned {
		pin.Hash, pin.Revision = hash, n.Revision
		if err := writePin(pinFile, pin); err != nil {
			return Nixpkgs{}, err
		}
	}
	return n, nil
}

// path is a tree that lies here. Only the store knows the hash of one that it holds.
func (r Resolver) path(ctx context.Context, path string) (Nixpkgs, error) {
	n, err := r.look(path)
	if err != nil {
		return Nixpkgs{}, err
	}
	n.Source = path
	if strings.HasPrefix(path, "/nix/store/") {
		if hash, err := r.Nix.Query(ctx, "nix-store", "--query", "--hash", path); err == nil {
			n.Hash = hash
		}
	}
	return n, nil
}

// look reads what a tree says of itself.
func (r Resolver) look(path string) (Nixpkgs, error) {
	if _, err := os.Stat(filepath.Join(path, "nixos/lib/eval-config.nix")); err != nil {
		return Nixpkgs{}, failed(explain.Explanation{
			Class:   explain.Evaluation,
			Summary: path + " in the builder VM is no nixpkgs: it has no nixos/lib/eval-config.nix",
			Advice:  "NIXPKGS names a channel, a revision, or the folder of a nixpkgs in the builder VM.",
		}, err)
	}
	read := func(name string) string {
		text, _ := os.ReadFile(filepath.Join(path, name)) // what isn't there isn't known
		return strings.TrimSpace(string(text))
	}
	n := Nixpkgs{Path: path}
	if n.Release = read(".version"); n.Release == "" {
		n.Release = read("lib/.version")
	}
	n.Release += read(".version-suffix")
	if rev := read(".git-revision"); revision.MatchString(rev) {
		n.Revision = rev
	}
	return n, nil
}

// find turns a name into the address of something that doesn't change.
func (r Resolver) find(ctx context.Context, name string) (Pin, error) {
	switch {
	case revision.MatchString(name):
		return Pin{Source: name, URL: orDefault(r.Archives, archives) + "/" + name + ".tar.gz", Revision: name}, nil
	case channel.MatchString(name):
		return r.channel(ctx, name)
	default:
		return Pin{Source: name, URL: name}, nil
	}
}

func orDefault(s, other string) string {
	if s != "" {
		return s
	}
	return other
}

// channel follows a channel's redirection to the release that it is now.
func (r Resolver) channel(ctx context.Context, name string) (Pin, error) {
	ctx, cancel := context.WithTimeout(ctx, answer)
	defer cancel()
	url := orDefault(r.Channels, channels) + "/" + name + "/git-revision"
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return Pin{}, fmt.Errorf("ask for channel %s: %w", name, err)
	}
	client := r.Client
	if client == nil {
		client = http.DefaultClient
	}
	res, err := client.Do(req)
	if err != nil {
		return Pin{}, failed(explain.Explanation{
			Class:   explain.Network,
			Summary: fmt.Sprintf("no network: the channel %s can't be looked up", name),
			Advice:  "Check that the Docker host reaches " + url + ", or set NIXPKGS to a nixpkgs in the builder VM.",
			Lines:   []string{nixlog.Plain(err.Error())},
		}, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, 1000))
	rev := strings.TrimSpace(string(body))
	if err != nil || res.StatusCode != http.StatusOK || !revision.MatchString(rev) {
		e := explain.Explanation{
			Class:   explain.Network,
			Summary: fmt.Sprintf("the channel %s can't be looked up: %s answers %s", name, url, res.Status),
			Advice:  "Is there such a channel? https://channels.nixos.org lists them; NIXPKGS names it.",
		}
		return Pin{}, failed(e, err)
	}
	at := *res.Request.URL // after the redirection
	at.Path = strings.TrimSuffix(at.Path, "git-revision") + "nixexprs.tar.xz"
	return Pin{Source: name, URL: at.String(), Revision: rev}, nil
}

// fetch downloads and unpacks into the store, unless it is there, and roots it.
func (r Resolver) fetch(ctx context.Context, pin Pin) (path, hash string, err error) {
	r.Say("getting nixpkgs from " + nixlog.Plain(pin.URL))
	args := []string{"--unpack", "--print-path", "--name", "nixpkgs", pin.URL}
	if pin.Hash != "" {
		args = append(args, strings.TrimPrefix(pin.Hash, "sha256:"))
	}
	out, log, err := r.Nix.Run(ctx, "nix-prefetch-url", args...)
	if err != nil {
		err = explain.Failed(explain.Fetch, log, err, nil)
		var e *explain.Error
		if errors.As(err, &e) && e.Class == explain.Hash {
			e.Summary = "nixpkgs from " + nixlog.Plain(pin.URL) + " is not the one that was pinned"
			e.Advice = "What lies at that address has changed. If that is right, remove the pin: it is then written anew."
		}
		return "", "", err
	}
	lines := strings.Fields(string(out))
	if len(lines) != 2 {
		return "", "", fmt.Errorf("get nixpkgs: nix-prefetch-url says %q, not a hash and a path", out)
	}
	path, hash = lines[1], "sha256:"+lines[0]
	if _, err := r.Nix.Query(ctx, "nix-store", "--realise", path, "--add-root", r.Root, "--indirect"); err != nil {
		return "", "", fmt.Errorf("keep nixpkgs from being collected: %w", err)
	}
	return path, hash, nil
}

func failed(e explain.Explanation, cause error) error {
	return &explain.Error{Explanation: e, Cause: cause}
}

// readPin reads the pin for a name; false is none.
func readPin(file, name string) (Pin, bool, error) {
	if file == "" {
		return Pin{}, false, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return Pin{}, false, nil
	}
	if err != nil {
		return Pin{}, false, fmt.Errorf("read the pin: %w", err)
	}
	var pin Pin
	if err := json.Unmarshal(bytes.TrimSpace(text), &pin); err != nil {
		return Pin{}, false, fmt.Errorf("read the pin %s: %w", file, err)
	}
	if pin.Source != name || pin.URL == "" || pin.Hash == "" {
		return Pin{}, false, nil // another one was wanted then
	}
	return pin, true, nil
}

// writePin writes it whole, or not at all.
func writePin(file string, pin Pin) error {
	text, err := json.MarshalIndent(pin, "", "  ")
	if err != nil {
		return fmt.Errorf("write the pin: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(file), ".pin-*")
	if err != nil {
		return fmt.Errorf("write the pin: %w", err)
	}
	defer os.Remove(f.Name())
	_, err = f.Write(append(text, '\n'))
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write the pin: %w", err)
	}
	if err := os.Rename(f.Name(), file); err != nil {
		return fmt.Errorf("write the pin: %w", err)
	}
	return nil
}
