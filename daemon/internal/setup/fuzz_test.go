package setup

import (
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"
)

// FuzzAuthorizedKeys: what comes into the VM's authorized_keys is one public
// key a line, and nothing else.
func FuzzAuthorizedKeys(f *testing.F) {
	const key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIqVmbCtLGoxHkCEDMmnQOdB8dTL9zVrLmC4wUzFTSSf"
	for _, seed := range []string{
		key + " me", "# mine\n\n" + key, `command="x y",no-pty ` + key, key + " me\r\n" + key, "-----BEGIN OPENSSH PRIVATE KEY-----", key + "\x00", key[:40], "ssh-rsa AAAA",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		keys, err := parseAuthorized(text)
		if err != nil {
			return
		}
		for _, line := range keys {
			_, _, _, rest, err := ssh.ParseAuthorizedKey([]byte(line))
			if err != nil || len(rest) > 0 || strings.ContainsAny(line, "\n\r\x00") {
				t.Errorf("%q of %q: %v, %q", line, text, err, rest)
			}
		}
	})
}

// FuzzNixConf: what comes into the VM's nix.conf is settings and comments,
// and nothing that leads to another file.
func FuzzNixConf(f *testing.F) {
	for _, seed := range []string{
		"extra-substituters = https://cache.example.org\n# x\n", "!include /etc/shadow", "include x", "a = b\n include c", "a = b\r\n!include c", "substituters =", "a=b", "a = b\x00",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, lines string) {
		if checkNixConf(lines) != nil {
			return
		}
		// As Nix reads it: lines end with \n, words with blanks, # begins a comment.
		for line := range strings.SplitSeq(nixConf(lines), "\n") {
			line, _, _ = strings.Cut(line, "#")
			words := strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune(" \t\n\r", r) })
			if len(words) == 0 {
				continue
			}
			if len(words) < 2 || words[1] != "=" || strings.Contains(words[0], "include") {
				t.Errorf("%q of %q", line, lines)
			}
		}
	})
}
