package setup

import (
	"strings"
	"testing"

	"osbuilder/daemon/internal/hint"
)

func TestNixConf(t *testing.T) {
	c, _ := world(t)
	mustRun(t, c)
	// QEMU hands an empty file over without a word, and then there is none.
	if got := tree(t, c)["/vm-keys/vm/nix.conf"]; !strings.HasPrefix(got, "#") || strings.Count(got, "\n") != 1 {
		t.Errorf("nothing set: %q", got)
	}
	c.NixConf = "\nextra-substituters = https://cache.example.org\n  # ours\nsubstituters =\nmax-jobs\t=\t2\nextra-trusted-public-keys = a-1:b=\n\n"
	mustRun(t, c)
	for _, vm := range c.Builders {
		got := tree(t, c)["/vm-keys/"+vm+"/nix.conf"]
		if !strings.HasSuffix(got, "\nextra-substituters = https://cache.example.org\n  # ours\nsubstituters =\nmax-jobs\t=\t2\nextra-trusted-public-keys = a-1:b=\n") {
			t.Errorf("%s: %q", vm, got)
		}
	}
}

// What the VM's nix-daemon would stop at is said here, with its line.
func TestNixConfThatIsNone(t *testing.T) {
	c, _ := world(t)
	for _, lines := range []string{
		"max-jobs = 2\nhttps://cache.example.org",
		"# one\n!include /etc/shadow",
		"# one\ninclude /etc/shadow",
		"# one\nSubstituters = x",
		"max-jobs = 2\nsubstituters=https://x",
		"max-jobs = 2\nmax-jobs =2",
		"max-jobs = 2\nmax-jobs= 2",
	} {
		c.NixConf = lines
		err := Run(t.Context(), c)
		if err == nil || !strings.Contains(err.Error(), "VM_NIX_CONF, line 2: ") || len(hint.Of(err)) != 1 {
			t.Errorf("%q: %v, hints %q", lines, err, hint.Of(err))
		}
		if files := tree(t, c); len(files) != 0 {
			t.Errorf("%q: made %v", lines, files)
		}
	}
}
