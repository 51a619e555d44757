package setup

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"osbuilder/daemon/internal/hint"
)

// nixConf returns what the VM is handed as its site's nix.conf. It is never
// empty, since QEMU can't hand over an empty file.
func nixConf(lines string) string {
	text := "# VM_NIX_CONF of this installation.\n"
	if lines = strings.TrimSpace(lines); lines != "" {
		text += lines + "\n"
	}
	return text
}

// Nix splits a line at white space: the = is a word of its own.
var nixSetting = regexp.MustCompile(`^[a-z][a-z0-9-]*[ \t]+=([ \t]|$)`)

// checkNixConf finds what would stop nix-daemon in the VM, where it is hard to
// see: a line that is no setting. Includes are refused, since what they name
// lies in the VM.
func checkNixConf(lines string) error {
	var problems []error
	for i, line := range strings.Split(lines, "\n") {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "#") && !nixSetting.MatchString(line) {
			problems = append(problems, fmt.Errorf("VM_NIX_CONF, line %d: %.40q is no setting", i+1, line))
		}
	}
	return hint.With(errors.Join(problems...),
		"Each line is a setting as in nix.conf: extra-substituters = https://cache.example.org. Several lines stand in double quotes in .env.")
}
