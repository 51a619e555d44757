// Package config reads the settings from the environment and the builders from
// the Compose project. docs/configuration.md says what each setting does; a
// test holds the two, compose.yaml and .env.example against each other.
package config

import (
	"errors"
	"fmt"
	"os"
	"path"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/caarlos0/env/v11"

	"osbuilder/daemon/internal/hint"
)

// Config is what `osbuilder run` is told.
type Config struct {
	Compose
	Owner

	LogLevel   string        `env:"LOG_LEVEL" envDefault:"info"`
	LogFormat  string        `env:"LOG_FORMAT" envDefault:"console"`
	LogColor   string        `env:"LOG_COLOR" envDefault:"auto"`
	NoColor    string        `env:"NO_COLOR"` // see no-color.org; LOG_COLOR=always is asked for here and wins
	Settle     time.Duration `env:"SETTLE" envDefault:"2s"`
	Rescan     time.Duration `env:"RESCAN" envDefault:"10s"`
	JobTimeout time.Duration `env:"JOB_TIMEOUT" envDefault:"6h"` // 0: no limit
	TakeOver   bool          `env:"TAKE_OVER" envDefault:"N"`
	MinFree    Size          `env:"MIN_FREE" envDefault:"2G"`  // 0: no bound
	KeepDays   int           `env:"KEEP_DAYS" envDefault:"30"` // 0: for ever

	// What the VMs are given, for the Compose project to be read with: these can
	// come from a shell or an --env-file, which are not to be seen from inside.
	Cores  string `env:"CPU_CORES" envDefault:"4"`
	Memory string `env:"RAM_SIZE" envDefault:"16G"`
	Disk   string `env:"DISK_SIZE" envDefault:"128G"`
	KVM    string `env:"KVM"`

	// What NixOS configurations become; see [job.NixOS].
	Format  string `env:"FORMAT" envDefault:"iso"`
	System  string `env:"SYSTEM" envDefault:"x86_64-linux"`
	Nixpkgs string `env:"NIXPKGS" envDefault:"nixos-26.05"`

	Paths Paths `env:"-"`
}

// Init is what `osbuilder init` is told.
type Init struct {
	Compose
	Owner

	AuthorizedKeys string `env:"AUTHORIZED_KEYS"` // public keys, one a line
	NixConf        string `env:"VM_NIX_CONF"`     // lines of nix.conf

	Paths Paths `env:"-"`
}

// Compose is what docker compose itself was told; see [Builders].
type Compose struct {
	Files     string `env:"COMPOSE_FILE"`
	Separator string `env:"COMPOSE_PATH_SEPARATOR" envDefault:":"`
	Profiles  string `env:"COMPOSE_PROFILES"`
	Project   string `env:"COMPOSE_PROJECT_NAME" envDefault:"osbuilder"`
}

// Owner is to whom belongs what the daemon writes.
type Owner struct {
	UID int `env:"PUID" envDefault:"1000"`
	GID int `env:"PGID" envDefault:"1000"`
}

// Paths are where compose.yaml mounts things. They are no settings; tests
// move them.
type Paths struct {
	Jobs, Output, State string
	Keys                string // the daemon's keys, where it reads them
	ClientKeys, VMKeys  string // both volumes of keys, where init makes them
	Project             string // the folder of the Compose project
	Health              string // the socket of the health check
	Control             string // the socket of the commands about jobs
	Status              string // what the VMs' containers leave for the daemon
}

// DefaultPaths are those of compose.yaml.
func DefaultPaths() Paths {
	return Paths{
		Jobs: "/jobs", Output: "/output", State: "/state",
		Keys: "/keys", ClientKeys: "/client-keys", VMKeys: "/vm-keys",
		Project: "/project", Health: "/tmp/osbuilder-health.sock",
		Control: "/tmp/osbuilder-control.sock", Status: "/status",
	}
}

// Load reads and checks the settings of `osbuilder run`. Its error tells of
// every problem.
func Load() (Config, error) { return load[Config](os.Environ()) }

// LoadInit reads and checks the settings of `osbuilder init`, in the same way.
func LoadInit() (Init, error) { return load[Init](os.Environ()) }

// ErrSettings: what the user has set can't be used.
var ErrSettings = errors.New("the settings have mistakes")

func load[T any, P interface {
	*T
	problems() []error
	at(Paths)
}](environ []string) (T, error) {
	set := map[string]string{}
	for key, value := range env.ToMap(environ) {
		if value = strings.TrimSpace(value); value != "" { // in .env, `NAME=` is how one says "the default"
			set[key] = value
		}
	}
	var c T
	var problems []error
	err := env.ParseWithOptions(&c, env.Options{
		Environment: set,
		FuncMap: map[reflect.Type]env.ParserFunc{
			reflect.TypeFor[bool](): func(v string) (any, error) { return yesNo(v) },
		},
	})
	var all env.AggregateError
	switch {
	case errors.As(err, &all):
		for _, e := range all.Errors {
			problems = append(problems, readable(c, set, e))
		}
	case err != nil:
		problems = append(problems, err)
	default:
		problems = P(&c).problems()
	}
	if err != nil { // the fields that could be read are still worth checking
		for _, p := range P(&c).problems() {
			name, _, _ := strings.Cut(p.Error(), "=")
			if !slices.ContainsFunc(problems, func(q error) bool { return strings.HasPrefix(q.Error(), name+"=") }) {
				problems = append(problems, p)
			}
		}
	}
	if len(problems) > 0 {
		return c, hint.With(fmt.Errorf("%w:\n  %w", ErrSettings, &list{problems}),
			"Correct them in .env, then: docker compose up -d. docs/configuration.md explains every setting.")
	}
	P(&c).at(DefaultPaths())
	return c, nil
}

// list joins errors as an indented list.
type list struct{ errs []error }

func (l *list) Error() string {
	lines := make([]string, len(l.errs))
	for i, err := range l.errs {
		lines[i] = err.Error()
	}
	return strings.Join(lines, "\n  ")
}

func (l *list) Unwrap() []error { return l.errs }

// readable says of a value that can't be read what its variable is called and
// what would be right; the library names the field and Go's type.
func readable[T any](c T, set map[string]string, err error) error {
	var parse env.ParseError
	if !errors.As(err, &parse) {
		return err
	}
	key, kind := variable(reflect.TypeOf(c), parse.Name)
	want := map[reflect.Type]string{
		reflect.TypeFor[time.Duration](): "a duration, such as 500ms, 2s, 90m or 6h",
		reflect.TypeFor[int]():           "a whole number",
		reflect.TypeFor[bool]():          "Y or N",
		reflect.TypeFor[Size]():          "a size with its unit, such as 500M or 2G, or 0",
	}[kind]
	return fmt.Errorf("%s=%s: want %s", key, set[key], want)
}

// variable returns the variable's name and the type of the field called name,
// in t or in what it embeds.
func variable(t reflect.Type, name string) (string, reflect.Type) {
	for _, f := range reflect.VisibleFields(t) {
		if f.Name == name {
			return f.Tag.Get("env"), f.Type
		}
	}
	return name, nil
}

func yesNo(v string) (bool, error) {
	switch strings.ToLower(v) {
	case "y", "yes", "true", "1", "on":
		return true, nil
	case "n", "no", "false", "0", "off":
		return false, nil
	}
	return false, strconv.ErrSyntax
}

func (c *Config) at(p Paths) { c.Paths = p }

func (c *Config) problems() []error {
	problems := c.Owner.problems()
	say := func(ok bool, format string, args ...any) {
		if !ok {
			problems = append(problems, fmt.Errorf(format, args...))
		}
	}
	say(slices.Contains([]string{"debug", "info", "warn", "error"}, c.LogLevel),
		"LOG_LEVEL=%s: want debug, info, warn or error", c.LogLevel)
	say(slices.Contains([]string{"console", "json"}, c.LogFormat),
		"LOG_FORMAT=%s: want console or json", c.LogFormat)
	say(slices.Contains([]string{"auto", "always", "never"}, c.LogColor),
		"LOG_COLOR=%s: want auto, always or never", c.LogColor)
	say(c.Settle > 0 && c.Settle <= time.Hour,
		"SETTLE=%v: want more than 0 and at most 1h, or a file is taken half written or never", c.Settle)
	say(c.Rescan >= 100*time.Millisecond && c.Rescan <= 24*time.Hour,
		"RESCAN=%v: want at least 100ms and at most 24h", c.Rescan)
	say(c.JobTimeout == 0 || c.JobTimeout >= time.Second,
		"JOB_TIMEOUT=%v: want at least 1s, or 0 for no limit", c.JobTimeout)
	say(c.KeepDays >= 0 && c.KeepDays <= maxKeepDays,
		"KEEP_DAYS=%d: want a number of days from 1 to %d, or 0 for ever", c.KeepDays, maxKeepDays)
	say(slices.Contains(formats, c.Format), "FORMAT=%s: want %s", c.Format, strings.Join(formats, " or "))
	say(slices.Contains(nixSystems, c.System), "SYSTEM=%s: want %s", c.System, strings.Join(nixSystems, " or "))
	say(isNixpkgs(c.Nixpkgs), "NIXPKGS=%s: want a channel such as nixos-26.05, a revision of 40 hexadecimal digits, "+
		"an absolute path in the VM, or the address of a tarball", c.Nixpkgs)
	return problems
}

// maxKeepDays is a hundred years.
const maxKeepDays = 36500

// Keep is KeepDays as a duration.
func (c *Config) Keep() time.Duration { return time.Duration(c.KeepDays) * 24 * time.Hour }

// Color reports whether the log is coloured.
func (c *Config) Color(terminal bool) bool {
	return c.LogColor == "always" || c.LogColor == "auto" && terminal && c.NoColor == ""
}

var (
	formats    = []string{"iso", "install-iso"}
	nixSystems = []string{"x86_64-linux", "aarch64-linux"}
)

var (
	channel  = regexp.MustCompile(`^(nixos|nixpkgs)-[a-z0-9][a-z0-9.-]*$`)
	revision = regexp.MustCompile(`^[0-9a-f]{40}$`)
)

// isNixpkgs reports whether image-build can take s for its nixpkgs. Whether
// there is such a one, only the VM can tell.
func isNixpkgs(s string) bool {
	if strings.ContainsFunc(s, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) }) {
		return false
	}
	if channel.MatchString(s) || revision.MatchString(s) || path.IsAbs(s) && path.Clean(s) == strings.TrimRight(s, "/") && s != "/" {
		return true
	}
	// As image-build looks at it: an address that has no host is not for this to find.
	return strings.HasPrefix(s, "https://") || strings.HasPrefix(s, "http://") || strings.HasPrefix(s, "file:///")
}

func (i *Init) at(p Paths) { i.Paths = p }

func (i *Init) problems() []error { return i.Owner.problems() }

// maxID is the largest number that every system takes for a user or a group.
const maxID = 1<<31 - 1

func (o Owner) problems() []error {
	var problems []error
	for _, id := range []struct {
		name string
		id   int
	}{{"PUID", o.UID}, {"PGID", o.GID}} {
		if id.id < 0 || id.id > maxID {
			problems = append(problems, fmt.Errorf("%s=%d: want a number from 0 to %d; yours: id -%c", id.name, id.id, maxID, id.name[1]|0x20))
		}
	}
	return problems
}
