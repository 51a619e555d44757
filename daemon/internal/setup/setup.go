// Package setup is what `osbuilder init` does: it makes the keys that the
// daemon and the VMs know each other by, and gives folders to their owner.
//
// It makes what is missing and replaces no key. It may be run again, twice at
// once, and be killed anywhere: files appear whole, and what is made from a
// key is made from the key that lies there.
package setup

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"osbuilder/daemon/internal/hint"
	"osbuilder/pipe/effect"
)

// The names of the files, in the volume of the client's keys and in the folder
// of a builder in the volume of the VMs' keys.
const (
	ClientKey      = "id_ed25519"
	ClientPublic   = "id_ed25519.pub"
	KnownHosts     = "known_hosts"
	HostKey        = "ssh_host_ed25519_key"
	AuthorizedKeys = "authorized_keys"
	NixConf        = "nix.conf"
)

// Config is what is to be made.
type Config struct {
	VMKeys, ClientKeys  string // folders
	Jobs, Output, State string // folders
	Folder              string // the project's; empty if it is not to be seen
	UserMap             string // uid_map of the user namespace: see user_namespaces(7)
	UID, GID            int    // owner of all but VMKeys
	Builders            []string
	Authorized          string // further public keys, one a line
	NixConf             string // lines of nix.conf for the VMs
	Project             string // name of the Compose project, for advice
	Out                 io.Writer
}

// Run makes what is missing. It tells Out of everything it changes.
func Run(ctx context.Context, c Config) error {
	authorized, err := parseAuthorized(c.Authorized)
	if err := errors.Join(err, checkNixConf(c.NixConf)); err != nil {
		return err
	}
	if err := c.folders(); err != nil {
		return err
	}
	client, err := c.key(c.client(ClientKey), "osbuilder", c.volume("client-keys"))
	if err != nil {
		return err
	}
	authorized = append([]string{publicLine(client, "osbuilder")}, authorized...)
	if err := c.put(c.client(ClientPublic), authorized[0]+"\n"); err != nil {
		return err
	}
	var known strings.Builder
	for _, builder := range c.Builders {
		if err := ctx.Err(); err != nil {
			return err
		}
		host, err := c.builder(builder, authorized)
		if err != nil {
			return err
		}
		known.WriteString(knownhosts.Line([]string{builder}, host) + "\n")
	}
	return c.put(c.client(KnownHosts), known.String())
}

// builder makes the files of one VM and returns its public host key.
func (c Config) builder(name string, authorized []string) (ssh.PublicKey, error) {
	dir := filepath.Join(c.VMKeys, name)
	if err := effect.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make folder of builder %s: %w", name, err)
	}
	root := func(file string, mode os.FileMode) target {
		return target{path: filepath.Join(dir, file), mode: mode, uid: os.Getuid(), gid: os.Getgid()}
	}
	host, err := c.key(root(HostKey, 0o400), name, c.volume("vm-keys"))
	if err != nil {
		return nil, err
	}
	if err := c.put(root(AuthorizedKeys, 0o444), strings.Join(authorized, "\n")+"\n"); err != nil {
		return nil, err
	}
	return host, c.put(root(NixConf, 0o444), nixConf(c.NixConf))
}

// client is a file in the volume of the daemon's keys.
func (c Config) client(file string) target {
	mode := os.FileMode(0o444)
	if file == ClientKey {
		mode = 0o400
	}
	return target{path: filepath.Join(c.ClientKeys, file), mode: mode, uid: c.UID, gid: c.GID}
}

func (c Config) volume(name string) string { return c.Project + "_" + name }

// key returns the public half of the key in the file, which it makes if it is
// absent.
func (c Config) key(file target, comment, volume string) (ssh.PublicKey, error) {
	data, err := os.ReadFile(file.path)
	if errors.Is(err, os.ErrNotExist) {
		data, err = c.makeKey(file, comment)
	}
	if err != nil {
		return nil, fmt.Errorf("make key %s: %w", file.path, err)
	}
	public, err := publicHalf(data)
	if err != nil {
		return nil, hint.With(fmt.Errorf("read key %s: %w", file.path, err), fmt.Sprintf(
			"A key that is there is never replaced. Put the right one back, or let new ones be made: "+
				"docker compose down && docker volume rm %s && docker compose up -d", volume))
	}
	if err := file.own(); err != nil {
		return nil, err
	}
	return public, nil
}

// makeKey writes a new key, unless another init was quicker, and returns the
// one that is there then.
func (c Config) makeKey(file target, comment string) ([]byte, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(private, comment)
	if err != nil {
		return nil, err
	}
	data := pem.EncodeToMemory(block)
	err = file.create(data)
	if errors.Is(err, os.ErrExist) {
		return os.ReadFile(file.path)
	}
	if err == nil {
		fmt.Fprintln(c.Out, "made the key", file.path)
	}
	return data, err
}

// put makes the file hold text.
func (c Config) put(file target, text string) error {
	old, err := os.ReadFile(file.path)
	if err == nil && bytes.Equal(old, []byte(text)) {
		return file.own()
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("read %s: %w", file.path, err)
	}
	if err := file.replace([]byte(text)); err != nil {
		return fmt.Errorf("write %s: %w", file.path, err)
	}
	fmt.Fprintln(c.Out, "wrote", file.path)
	return nil
}

func publicHalf(data []byte) (ssh.PublicKey, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, errors.New("the file is empty")
	}
	raw, err := ssh.ParseRawPrivateKey(data)
	if err != nil {
		return nil, err
	}
	private, ok := raw.(*ed25519.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("it is no ed25519 key (%T)", raw)
	}
	signer, err := ssh.NewSignerFromSigner(private)
	if err != nil {
		return nil, err
	}
	return signer.PublicKey(), nil
}

func publicLine(key ssh.PublicKey, comment string) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key))) + " " + comment
}

// parseAuthorized returns the lines of AUTHORIZED_KEYS that hold a key.
func parseAuthorized(text string) ([]string, error) {
	var keys []string
	var problems []error
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := checkAuthorized(line); err != nil {
			problems = append(problems, fmt.Errorf("AUTHORIZED_KEYS, line %d: %w", i+1, err))
			continue
		}
		keys = append(keys, line)
	}
	return keys, hint.With(errors.Join(problems...),
		"Each line is one public key as in a file id_ed25519.pub: ssh-ed25519 AAAA… name. Several lines stand in double quotes in .env.")
}

func checkAuthorized(line string) error {
	if strings.Contains(line, "PRIVATE KEY") {
		return errors.New("this is a part of a private key; it must stay where it is")
	}
	for _, r := range line {
		if r < ' ' && r != '\t' || r == 0x7f {
			return fmt.Errorf("it holds the control character %q", r)
		}
	}
	_, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
	switch {
	case err != nil:
		return fmt.Errorf("%.40q is no public key: %w", line, err)
	case len(rest) > 0:
		return fmt.Errorf("something follows the key: %.40q", rest)
	}
	return nil
}
