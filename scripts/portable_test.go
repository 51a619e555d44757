package scripts

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// userScripts are all that lie here, so that none is forgotten: make runs them
// on people's own machines, macOS among them, or others source them.
var userScripts = func() []string {
	all, err := filepath.Glob("*.sh")
	if err != nil || len(all) < 15 {
		panic(fmt.Sprint("the scripts are not found: ", all, err))
	}
	return all
}()

// A construct is one that Bash 3.2, which macOS has, or BSD's tools don't know.
type construct struct {
	name    string
	pattern *regexp.Regexp
	bad     []string // examples that have it
	good    []string // that look alike and don't
}

// word is a command's name where a command can stand.
func word(names string) string { return `(?:^|[|;&(!{]|\bthen|\bdo|\belse|\$\()\s*(?:` + names + `)\b` }

// args are what follows, up to the end of the command.
const args = `[^|;&)]*?\s`

var constructs = []construct{
	{"associative array", regexp.MustCompile(`\b(?:declare|local|typeset)\s+-[a-zA-Z]*A`), []string{"declare -A x", "local -rA y"}, []string{"declare -a x"}},
	{"name reference or global from within", regexp.MustCompile(`\b(?:declare|local|typeset)\s+-[a-zA-Z]*[ngl u]`), []string{"local -n r=x", "declare -g y"}, []string{"local n=1", "local u"}},
	{"local -", regexp.MustCompile(`\blocal -(\s|;|$)`), []string{"local -"}, nil},
	{"change of case", regexp.MustCompile(`\$\{[A-Za-z0-9_@*\[\]]+(\^|,)`), []string{"${x,,}", "${x^}", `"${a[@]^^}"`}, []string{"${x%,*}", "${x:-,}", "${x#^}"}},
	{"transformation", regexp.MustCompile(`\$\{[A-Za-z0-9_\[\]@*]+@[A-Za-z]\}`), []string{"${x@Q}", "${a[@]@Q}"}, []string{"${a[@]}", "${!p@}"}},
	{"mapfile", regexp.MustCompile(word(`mapfile|readarray|coproc`)), []string{"mapfile -t x <f", "if true; then readarray x"}, []string{"say mapfile_x"}},
	{"|& or &>>", regexp.MustCompile(`\|&|&>>`), []string{"a |& b", "a &>>b"}, []string{"a | b", "a 2>&1 | b", "a >>b 2>&1"}},
	{";& or ;;&", regexp.MustCompile(`;&`), []string{"x) a ;&", "x) a ;;&"}, []string{"a ; b &"}},
	{"wait -n", regexp.MustCompile(`\bwait\s+-[np]`), []string{"wait -n"}, []string{`wait "$pid"`}},
	{"negative index", regexp.MustCompile(`\$\{[A-Za-z0-9_]+\[-`), []string{"${a[-1]}"}, []string{"${a[0]-x}"}},
	{"negative length", regexp.MustCompile(`\$\{[A-Za-z0-9_]+:[^}:]*:\s*-[0-9]`), []string{"${x:0:-1}"}, []string{"${x: -1}", "${x:-1}"}},
	{"test -v", regexp.MustCompile(`\[\[?\s+(!\s+)?-[vR]\s`), []string{"[[ -v x ]]", "[ -v x ]"}, []string{"[ -n x ]"}},
	{"time by printf", regexp.MustCompile(`%\([^)]*\)T`), []string{"printf '%(%s)T'"}, nil},
	{"newer variable", regexp.MustCompile(`\$\{?(EPOCHSECONDS|EPOCHREALTIME|BASHPID|SRANDOM|BASH_ARGV0|READLINE_)`), []string{"$EPOCHSECONDS", "${BASHPID}"}, []string{"$BASH_VERSION"}},
	{"fraction for read -t", regexp.MustCompile(`\bread\b[^;|&]*-t\s*[0-9]*\.[0-9]`), []string{"read -r -t 0.5 x"}, []string{"read -r -t 30", "read -r x; sleep 0.5"}},
	{"newer option of read", regexp.MustCompile(`\bread\s+(-[a-z]+\s+)*-[a-z]*[Ni]`), []string{"read -N 1 x", "read -e -i y x"}, []string{"read -r -n 1 x"}},
	{"file descriptor by name", regexp.MustCompile(`\{[A-Za-z_]+\}[<>]`), []string{"exec {fd}>x"}, []string{"exec 9<>x", `>"${x}"`}},
	{"steps or zeros in braces", regexp.MustCompile(`\{(0[0-9]+\.\.|[0-9]+\.\.[0-9]+\.\.)`), []string{"{1..9..2}", "{01..10}"}, []string{"{1..9}"}},
	{"newer option of shopt", regexp.MustCompile(`shopt.*(globstar|lastpipe|inherit_errexit|assoc_expand_once|localvar_)`), []string{"shopt -s globstar"}, []string{"shopt -s extglob"}},
	{"\\u in quotes", regexp.MustCompile(`\$'[^']*\\[uU]`), []string{`$'\u00e4'`}, []string{`$'\n'`}},
	// Under `set -u` an empty list counts as unset. code() takes ${x[@]+"${x[@]}"} away.
	{"list that may be empty", regexp.MustCompile(`\$\{[A-Za-z_]+\[[@*]\]\}`), []string{`a "${files[@]}"`}, []string{"${COMPOSE[*]-docker compose}"}},

	{"sed in place", regexp.MustCompile(word(`sed`) + args + `-[a-zA-Z]*i|` + word(`sed`) + `\s+-[a-zA-Z]*i`), []string{"sed -i s/a/b/ f", "sed -n -i x f"}, []string{"sed -n '/i/p'", "sed 's/-i/x/'"}},
	{"GNU's sed", regexp.MustCompile(word(`sed`) + `[^|;]*?(\s-[rzs]\b|\\[+?|swWbt<>])`), []string{`sed -r s/a/b/`, `sed 's/a\+/b/'`, `sed 's/\s//'`, `x | sed 's/a\|b//'`, `sed 's/\t/ /'`}, []string{`sed -E 's/a+/b/'`, `sed -n 's/\(a\)\{0,1\}/\1/p'`}},
	{"GNU's grep", regexp.MustCompile(word(`grep`) + `[^|;]*?(\s-[a-zA-Z]*P|\\[swWdb<>+?|])`), []string{`grep -oP x`, `a | grep 'x\s'`, `grep 'a\|b'`}, []string{`grep -Eq 'a|b'`, `grep -F -- P`}},
	{"GNU's readlink or realpath", regexp.MustCompile(`\breadlink\s+-|` + word(`realpath`)), []string{"readlink -f x", "x=$(realpath y)"}, []string{"readlink x"}},
	{"GNU's date", regexp.MustCompile(`\bdate\s+(-u\s+)?(-[dIR]|--)|\bdate\b[^|;)]*%N`), []string{"date -d @1", "date +%s%N", "date --iso"}, []string{"date -u +%s", "date +%s"}},
	{"stat", regexp.MustCompile(word(`stat`)), []string{"x=$(stat -c %s f)", "stat -f %z f"}, []string{"status x", "a_stat b"}},
	{"GNU's mktemp", regexp.MustCompile(`\bmktemp\b[^|;)]*\s(-p|-t|--)`), []string{"mktemp -p x", "mktemp --suffix=y"}, []string{"mktemp", "mktemp -d"}},
	{
		"long option", regexp.MustCompile(word(`cp|mv|rm|ls|ln|mkdir|rmdir|cat|sort|uniq|head|tail|cut|tr|wc|df|du|touch|chmod|chown|dirname|basename|tee|sed|find|xargs|awk|ps|kill|sleep|sync`) + `[^|;&)]*\s--[a-z]`),
		[]string{"cp --reflink=auto a b", "x | sort --unique", "df --output=avail x", "tail --pid=1"},
		[]string{"rm -f -- x", "docker rm --force x", `grep -F -- "--x"`},
	},
	{
		"GNU's option", regexp.MustCompile(`\b(cp|mv)\s+-[a-z]*[tuT]|\bln\s+-[a-z]*[rT]|\bsort\s+-[a-zA-Z]*[VR]|\bdu\s+-[a-z]*b|\bdf\s+-[a-zA-Z]*[BT]|\bls\s+-[a-zA-Z]*v|\btouch\s+-d|\bbase64\s+-w|\binstall\s+-[a-z]*D|\bhostname\s+-I`),
		[]string{"cp -t d f", "sort -V", "df -B1 x", "ln -sr a b"},
		[]string{"cp -R a b", "sort -u", "df -Pk x", "ln -s a b"},
	},
	{"GNU's xargs", regexp.MustCompile(`\bxargs\b[^|;]*\s-[a-zA-Z0-9 ]*[rda]\b`), []string{"xargs -r rm", "xargs -0 -r rm", "xargs -d x"}, []string{"xargs -0 rm"}},
	{"GNU's head or tail", regexp.MustCompile(`\bhead\s+-[cn]\s*("?-|[0-9]+[A-Za-z])|\btail\s+-[cn]\s*\+?[0-9]+[A-Za-z]`), []string{"head -n -1", "head -c 1M", "tail -c 10K"}, []string{"head -c 10", `tail -c "+$((n + 1))"`}},
	{"GNU's find", regexp.MustCompile(word(`find`) + `(\s+-|[^|;]*-(printf|regextype|readable|executable|writable))`), []string{"find -name x", "find x -printf y", "x=$(find . -executable)"}, []string{"find x -mindepth 1 -maxdepth 1", "finder -x"}},
	{
		"tool that BSD lacks", regexp.MustCompile(word(`timeout|nproc|tac|shuf|numfmt|setsid|flock|getent|free|md5sum|stdbuf|truncate|pidof|mountpoint|ip|sha256sum|systemctl`)),
		[]string{"timeout 5 x", "n=$(nproc)", "x && flock y"},
		[]string{"have sha256sum", "a_timeout", "die timeout", "docker ip"},
	},
	{"GNU's tar", regexp.MustCompile(word(`tar`) + `[^|]*--(transform|wildcards|owner|group|sort|mtime)`), []string{"tar -C x --transform a -c ."}, []string{"tar -C x -c ."}},
	{"GNU's awk", regexp.MustCompile(`\b(gensub|strftime|systime|asort|asorti|strtonum|PROCINFO|IGNORECASE)\b`), []string{"awk '{ print strftime() }'"}, []string{"awk '{ sub(/a/, b) }'"}},
	{"echo with options or escapes", regexp.MustCompile(word(`echo`) + `\s+-[neE]`), []string{"echo -e x", "echo -n x"}, []string{"echo x"}},
	{"which", regexp.MustCompile(word(`which`)), []string{"which x"}, []string{"have which"}},
}

// allowed lines have a construct where it can do no harm: file, what the line
// has in it, why.
var allowed = [][3]string{
	{"engine.sh", "mountpoint -q /sys/fs/cgroup", "start_dockerd is for Linux alone, which start_engine sees to"},
	{"engine.sh", "setsid dockerd", "the same"},
	{"engine.sh", "have systemctl; then systemctl mask", "Debian's packages are installed on Debian"},
	{"images.sh", "--transform", "base images are made where mmdebstrap is"},
	{"lib.sh", "if have sha256sum; then sha256sum", "and shasum else"},
	{"e2e.sh", `need_packages "The test" "${missing[@]}"`, "after the list was seen to have something in it"},
	{"demo.sh", "${COMPOSE[@]}", "find_compose left the command in it"},
	{"project.sh", "${COMPOSE[", "the same"},
	{"e2e.sh", "${COMPOSE[*]}", "the same"},
	{"world.sh", "${COMPOSE[*]}", "the same, since WORLD_COMPOSE is set with it"},
	{"images.sh", "${args[@]}", "filled at its beginning"},
	{"boot-nixos.sh", "${all[@]}", "the same"},
	{"boot-nixos.sh", "cp --remove-destination", "in a container"},
	{"check-nixos.sh", "${TREES[@]}", "of NIXPKGS, which was seen to be set"},
	{"check-nixos.sh", "${MOUNTS[@]}", "the same"},
	{"check-nixos.sh", "${INSIDE[@]}", "the same"},
	{"images.sh", "${changes[@]}", "filled at its beginning"},
}

// code is a script's text by lines, without its comments and without what it
// only hands to another machine, as it stands.
func code(text string) []string {
	lines := strings.Split(text, "\n")
	here, end := regexp.MustCompile(`<<'([A-Z]+)'`), ""
	for i, line := range lines {
		if end != "" {
			lines[i] = ""
		}
		if line == end {
			end = ""
		} else if m := here.FindStringSubmatch(lines[i]); m != nil {
			end = m[1]
		}
	}
	comment := regexp.MustCompile(`(^|\s)#.*$`)
	guarded := regexp.MustCompile(`\$\{([A-Za-z_]+)\[@\]\+"\$\{([A-Za-z_]+)\[@\]\}"\}`)
	for i, line := range lines {
		if !strings.ContainsAny(line, `'"`) || strings.HasPrefix(strings.TrimSpace(line), "#") {
			lines[i] = comment.ReplaceAllString(line, "")
		}
		lines[i] = guarded.ReplaceAllString(lines[i], "")
	}
	return lines
}

func TestScriptsArePortable(t *testing.T) {
	for _, c := range constructs {
		for _, bad := range c.bad {
			if !c.pattern.MatchString(bad) {
				t.Errorf("%s is not found in %q", c.name, bad)
			}
		}
		for _, good := range c.good {
			if c.pattern.MatchString(good) {
				t.Errorf("%s is found in %q", c.name, good)
			}
		}
	}
	used := map[int]bool{}
	for _, name := range userScripts {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range code(string(text)) {
			for _, c := range constructs {
				if !c.pattern.MatchString(line) {
					continue
				}
				n := slices.IndexFunc(allowed, func(a [3]string) bool { return a[0] == name && strings.Contains(line, a[1]) })
				if n < 0 {
					t.Errorf("%s:%d: %s: %s", name, i+1, c.name, strings.TrimSpace(line))
					continue
				}
				used[n] = true
			}
		}
	}
	for i, a := range allowed {
		if !used[i] {
			t.Errorf("nothing needs this any more: %v", a)
		}
	}
}
