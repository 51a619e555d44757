package docs

import (
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// shell are scripts, with the words that begin what they say when something is
// wrong.
var shell = []struct{ glob, words string }{
	{"scripts/{demo,down,clean,vm-iso,test,prove-nixos,lib,world,engine,images,project}.sh", `die`},
	{"scripts/checks.sh", `die`},
	{"vmimage/install-image.sh", `fail`},
	{"vmimage/debian/install-image", `fail`},
	{"vmimage/debian/build/init", `say|give_up`},
	{"vmimage/debian/rootfs/usr/lib/osbuilder/data-disk", `say|give_up`},
	{"vmimage/debian/rootfs/usr/lib/osbuilder/{network,dhcp-event,import-config}", `echo`},
	{"vmimage/nixos/make-image", `fail|echo`},
	{"vmimage/nixos/scripts/{address,import-config,systems}.sh", `echo`},
	{"vmimage/nixos/store/store", `say|die|decline`},
	{"vmimage/qemu/entrypoint.sh", `die \S+|warn`},
	{"vmimage/qemu/start-hook.sh", `echo`},
	{"vmimage/qemu/watch-vm.sh", `echo`},
	{"vmimage/qemu/status.sh", `echo`},
}

// unread are scripts of vmimage whose words no user reads there.
var unread = []string{
	"vmimage/internal/",                             // for tests
	"vmimage/debian/build/",                         // where the image is built
	"vmimage/debian/rootfs/usr/lib/osbuilder/acpi/", // says nothing
	"vmimage/nixos/debian-packages/",                // for tests
	"vmimage/nixos/testdata/",
}

// well are the lines of those scripts that tell that all is well.
var well = []string{
	"starting", "osbuilder: address …", "osbuilder: …, SSH host key …", "osbuilder: settings for Nix were given to the VM", "osbuilder: builds for …",
	"…, … free", "copying … paths of the image, … MiB", "copied in … s", "the disk is still written to; systemd unmounts it …", "unmounted",
	"no nixpkgs chosen yet",
}

var (
	command   = regexp.MustCompile(`\$\([^()]*(\([^()]*(\([^()]*\)[^()]*)*\)[^()]*)*\)`)
	parameter = regexp.MustCompile(`\$\{([A-Za-z_]*)[^{}]*(?:\{[^{}]*\}[^{}]*)*\}|\$([A-Za-z_][A-Za-z0-9_]*)|\$[0-9#*@?!]`)
)

// quoted is a shell's text in double quotes.
const quoted = `"((?:[^"\\]|\\.)*)"`

// shellLines collects what the scripts can say.
func shellLines(t *testing.T) []line {
	t.Helper()
	var lines []line
	for _, s := range shell {
		says := regexp.MustCompile(`(?:^|[;&|{()!]|\bthen|\belse)\s*(?:` + s.words + `) ` + quoted)
		for _, path := range braces(s.glob) {
			text := script(t, path)
			for i, source := range text {
				for _, m := range says.FindAllStringSubmatch(source, -1) {
					from := fmt.Sprintf("%s:%d", path, i+1)
					lines = append(lines, line{shown(m[1]), from})
					for _, v := range parameter.FindAllStringSubmatch(m[1], -1) {
						lines = append(lines, assigned(text, v[1]+v[2], path)...)
					}
				}
			}
		}
	}
	return slices.DeleteFunc(lines, func(l line) bool { return literal(l.text) < 8 })
}

// script returns the lines of one, without the commands that they put in. A
// command goes on in the next line where one ends with ||, && or \.
func script(t *testing.T, path string) []string {
	t.Helper()
	text, err := fs.ReadFile(root(t), path)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	for i, l := range lines {
		lines[i] = command.ReplaceAllString(strings.TrimSpace(l), "…")
	}
	return lines
}

// assigned returns the texts that a script gives a variable which it prints.
func assigned(text []string, name, path string) (lines []line) {
	if name == "" {
		return nil
	}
	gives := regexp.MustCompile(`(?:^|[;&|{()]|\s)` + name + `=` + quoted)
	for i, source := range text {
		for _, m := range gives.FindAllStringSubmatch(source, -1) {
			lines = append(lines, line{shown(m[1]), fmt.Sprintf("%s:%d", path, i+1)})
		}
	}
	return lines
}

// shown is a text in double quotes as it is printed, with … for what is put in.
func shown(text string) string {
	text = parameter.ReplaceAllString(text, "…")
	text = strings.NewReplacer(`\"`, `"`, `\$`, `$`, `\\`, `\`).Replace(text)
	for _, who := range []string{"qemu: ", "warning: ", "vmimage: "} { // as say and warn put them
		text = strings.TrimPrefix(text, who)
	}
	return text
}

// braces expands one {a,b}.
func braces(glob string) []string {
	before, rest, ok := strings.Cut(glob, "{")
	if !ok {
		return []string{glob}
	}
	list, after, _ := strings.Cut(rest, "}")
	var out []string
	for _, name := range strings.Split(list, ",") {
		out = append(out, before+name+after)
	}
	return out
}

// No script that runs in the VM or in its containers is forgotten.
func TestScriptsOfTheVMAreRead(t *testing.T) {
	var read []string
	for _, s := range shell {
		read = append(read, braces(s.glob)...)
	}
	err := fs.WalkDir(root(t), "vmimage", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || slices.ContainsFunc(unread, func(dir string) bool { return strings.HasPrefix(path, dir) }) {
			return err
		}
		text, err := fs.ReadFile(root(t), path)
		if first, _, _ := strings.Cut(string(text), "\n"); err == nil && regexp.MustCompile(`^#.*\b(ba|da)?sh$`).MatchString(first) && !slices.Contains(read, path) {
			t.Errorf("%s is not read for what it says", path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
