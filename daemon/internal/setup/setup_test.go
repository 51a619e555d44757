package setup

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"osbuilder/daemon/internal/hint"
)

const somebody = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ9HHN5cTm0fhE9lC8WxnzRbzhJ0M3aQ0VtJ0xX0dV3k somebody"

// world returns a configuration whose folders are there and empty. Where the
// tests run as root, the owner is another user.
func world(t *testing.T) (Config, *bytes.Buffer) {
	t.Helper()
	dir := t.TempDir()
	var out bytes.Buffer
	c := Config{
		VMKeys: filepath.Join(dir, "vm-keys"), ClientKeys: filepath.Join(dir, "client-keys"),
		Jobs: filepath.Join(dir, "jobs"), Output: filepath.Join(dir, "output"), State: filepath.Join(dir, "state"),
		UID: os.Getuid(), GID: os.Getgid(),
		Builders: []string{"vm", "vm-2"}, Project: "osbuilder", Out: &out,
	}
	if os.Getuid() == 0 {
		c.UID, c.GID = 1234, 2345
	}
	for _, path := range []string{c.VMKeys, c.ClientKeys, c.Jobs, c.Output, c.State} {
		if err := os.Mkdir(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return c, &out
}

func mustRun(t *testing.T, c Config) {
	t.Helper()
	if err := Run(t.Context(), c); err != nil {
		t.Fatal(err, hint.Of(err))
	}
}

// tree returns every file below the folders of keys with its content.
func tree(t *testing.T, c Config) map[string]string {
	t.Helper()
	files := map[string]string{}
	for _, root := range []string{c.VMKeys, c.ClientKeys} {
		err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			files[strings.TrimPrefix(path, filepath.Dir(root))] = string(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

func TestMakesEverythingOnce(t *testing.T) {
	c, out := world(t)
	c.Authorized = "# mine\n\n" + somebody + "\r\nfrom=\"10.0.0.0/8\" " + somebody + "\n"
	mustRun(t, c)
	first := tree(t, c)
	if len(first) != 9 {
		t.Errorf("files: %v", first)
	}

	signer, err := ssh.ParsePrivateKey([]byte(first["/client-keys/id_ed25519"]))
	if err != nil {
		t.Fatal(err)
	}
	public := first["/client-keys/id_ed25519.pub"]
	if want := string(ssh.MarshalAuthorizedKey(signer.PublicKey())); strings.TrimSuffix(public, " osbuilder\n") != strings.TrimSpace(want) {
		t.Errorf("public key %q, want that of the private one, %q", public, want)
	}
	for _, vm := range c.Builders {
		want := public + somebody + "\nfrom=\"10.0.0.0/8\" " + somebody + "\n"
		if diff := cmp.Diff(want, first["/vm-keys/"+vm+"/authorized_keys"]); diff != "" {
			t.Error(diff)
		}
		host, err := ssh.ParsePrivateKey([]byte(first["/vm-keys/"+vm+"/ssh_host_ed25519_key"]))
		if err != nil {
			t.Fatal(err)
		}
		check, err := knownhosts.New(filepath.Join(c.ClientKeys, KnownHosts))
		if err != nil {
			t.Fatal(err)
		}
		if err := check(vm+":22", address("172.18.0.2:22"), host.PublicKey()); err != nil {
			t.Errorf("known_hosts does not know %s: %v", vm, err)
		}
		if err := check(vm+":22", address("172.18.0.2:22"), signer.PublicKey()); err == nil {
			t.Errorf("known_hosts takes any key for %s", vm)
		}
	}
	if first["/vm-keys/vm/ssh_host_ed25519_key"] == first["/vm-keys/vm-2/ssh_host_ed25519_key"] {
		t.Error("two builders share a host key")
	}

	for path, want := range map[string]struct {
		mode     os.FileMode
		uid, gid int
	}{
		c.ClientKeys: {0o700, c.UID, c.GID}, c.Jobs: {0o755, c.UID, c.GID}, c.Output: {0o755, c.UID, c.GID}, c.State: {0o755, c.UID, c.GID},
		c.ClientKeys + "/id_ed25519": {0o400, c.UID, c.GID}, c.ClientKeys + "/id_ed25519.pub": {0o444, c.UID, c.GID},
		c.ClientKeys + "/known_hosts": {0o444, c.UID, c.GID},
		c.Jobs + "/rejected":          {0o755, c.UID, c.GID}, c.Jobs + "/.taken": {0o755, c.UID, c.GID},
		c.VMKeys + "/vm/ssh_host_ed25519_key": {0o400, os.Getuid(), os.Getgid()}, c.VMKeys + "/vm/authorized_keys": {0o444, os.Getuid(), os.Getgid()},
	} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid, gid := ownerOf(info); info.Mode().Perm() != want.mode || uid != want.uid || gid != want.gid {
			t.Errorf("%s is %o of %d:%d, want %o of %d:%d", path, info.Mode().Perm(), uid, gid, want.mode, want.uid, want.gid)
		}
	}

	out.Reset()
	mustRun(t, c)
	if diff := cmp.Diff(first, tree(t, c)); diff != "" || out.Len() > 0 {
		t.Errorf("a second run changed something: %s\n%s", diff, out)
	}
}

type address string

func (address) Network() string  { return "tcp" }
func (a address) String() string { return string(a) }

func TestDerivedFilesFollow(t *testing.T) {
	c, _ := world(t)
	mustRun(t, c)
	before := tree(t, c)
	c.Authorized = somebody
	c.Builders = []string{"vm", "vm-3"}
	for _, file := range []string{KnownHosts, ClientPublic} { // lost and garbled
		if err := os.Remove(filepath.Join(c.ClientKeys, file)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(c.ClientKeys, KnownHosts), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	mustRun(t, c)
	after := tree(t, c)
	for _, key := range []string{"/client-keys/id_ed25519", "/client-keys/id_ed25519.pub", "/vm-keys/vm/ssh_host_ed25519_key", "/vm-keys/vm-2/ssh_host_ed25519_key"} {
		if before[key] != after[key] {
			t.Errorf("%s changed", key)
		}
	}
	if !strings.HasSuffix(after["/vm-keys/vm/authorized_keys"], "\n"+somebody+"\n") {
		t.Errorf("authorized_keys: %q", after["/vm-keys/vm/authorized_keys"])
	}
	if known := after["/client-keys/known_hosts"]; !strings.Contains(known, "vm-3 ssh-ed25519 ") || strings.Contains(known, "vm-2") {
		t.Errorf("known_hosts: %q", known)
	}
}

func TestTwiceAtOnce(t *testing.T) {
	c, _ := world(t)
	var group sync.WaitGroup
	errs := make([]error, 8)
	for n := range errs {
		mine := c
		mine.Out = &bytes.Buffer{}
		group.Go(func() { errs[n] = Run(t.Context(), mine) })
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	all := tree(t, c)
	if len(all) != 9 {
		t.Errorf("left over: %v", all)
	}
	mustRun(t, c)
	if diff := cmp.Diff(all, tree(t, c)); diff != "" {
		t.Errorf("what they left did not fit together: %s", diff)
	}
}

func TestDamagedKeys(t *testing.T) {
	ec, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(ec, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"empty": "", "blank": "\n\n", "garbage": "not a key", "of another kind": string(pem.EncodeToMemory(block)),
		"cut": "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n",
	} {
		for _, file := range []struct{ path, volume string }{
			{"client-keys/id_ed25519", "osbuilder_client-keys"}, {"vm-keys/vm-2/ssh_host_ed25519_key", "osbuilder_vm-keys"},
		} {
			t.Run(name+" "+file.path, func(t *testing.T) {
				c, _ := world(t)
				path := filepath.Join(filepath.Dir(c.VMKeys), file.path)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
				err := Run(t.Context(), c)
				if err == nil || !strings.Contains(err.Error(), path) {
					t.Errorf("%v: want %s named", err, path)
				}
				if hints := strings.Join(hint.Of(err), ""); !strings.Contains(hints, "docker volume rm "+file.volume) {
					t.Errorf("hints %q", hints)
				}
				if now, err := os.ReadFile(path); err != nil || string(now) != content {
					t.Errorf("it was touched: %q, %v", now, err)
				}
			})
		}
	}
}

func TestAuthorizedKeys(t *testing.T) {
	for name, tt := range map[string]struct{ text, want string }{
		"no key":        {somebody + "\n\nhello there", "AUTHORIZED_KEYS, line 3: \"hello there\" is no public key"},
		"cut":           {somebody[:40], "line 1"},
		"a private key": {"-----BEGIN OPENSSH PRIVATE KEY-----", "private key"},
		"control":       {somebody + " \x1b[2J", `'\x1b'`},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := world(t)
			c.Authorized = tt.text
			err := Run(t.Context(), c)
			if err == nil || !strings.Contains(err.Error(), tt.want) || len(hint.Of(err)) != 1 {
				t.Errorf("%v, hints %q; want %q", err, hint.Of(err), tt.want)
			}
			if made := tree(t, c); len(made) > 0 {
				t.Errorf("made %v all the same", made)
			}
		})
	}
}

func TestSweepsWhatAKilledInitLeft(t *testing.T) {
	c, _ := world(t)
	old, young := filepath.Join(c.ClientKeys, tempPrefix+"1"), filepath.Join(c.ClientKeys, tempPrefix+"2")
	for _, path := range []string{old, young} {
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chtimes(old, time.Time{}, time.Now().Add(-2*staleAfter)); err != nil {
		t.Fatal(err)
	}
	mustRun(t, c)
	if _, err := os.Stat(old); !os.IsNotExist(err) {
		t.Errorf("the old one: %v", err)
	}
	if _, err := os.Stat(young); err != nil {
		t.Errorf("one that may be in use: %v", err)
	}
}

func TestFolders(t *testing.T) {
	t.Run("absent", func(t *testing.T) {
		c, _ := world(t)
		c.Output = filepath.Join(c.Output, "none")
		if err := Run(t.Context(), c); err == nil || !strings.Contains(err.Error(), c.Output) {
			t.Error(err)
		}
	})
	t.Run("what lies in them stays its owner's", func(t *testing.T) {
		c, _ := world(t)
		path := filepath.Join(c.Jobs, "mine.sh")
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		mustRun(t, c)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if uid, _ := ownerOf(info); uid != os.Getuid() {
			t.Errorf("it is of %d now", uid)
		}
	})
	t.Run("a refusal says what to do", func(t *testing.T) {
		c, _ := world(t)
		for setting, want := range map[string]string{"JOBS_DIR": "sudo chown", "": "local volume"} {
			if hints := hint.Of(c.refused(os.ErrPermission, "/jobs", setting)); len(hints) != 1 || !strings.Contains(hints[0], want) {
				t.Errorf("%q: %q", setting, hints)
			}
		}
	})
}
