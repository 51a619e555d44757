package config

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/dotenv"
	"github.com/compose-spec/compose-go/v2/interpolation"
	"github.com/compose-spec/compose-go/v2/loader"
	"github.com/compose-spec/compose-go/v2/template"
	"github.com/compose-spec/compose-go/v2/types"

	"osbuilder/daemon/internal/hint"
)

// Label marks a service as a builder.
const Label = "osbuilder.builder"

// ErrProject: the Compose project can't be read, or names no builder.
var ErrProject = errors.New("the Compose project cannot be used")

// A Builder is a service that builds.
type Builder struct {
	Name string // of the service
	Addr string // of its SSH server, as other services reach it

	Image       string
	Environment map[string]string // as far as it can be known here
}

// Builders returns the builders of the Compose project in dir, by name, as
// docker compose sees them: COMPOSE_FILE, overrides, .env, profiles, include
// and extends count. What lies outside dir is not to be seen from inside a
// container; files that COMPOSE_FILE names there are passed over, and notes
// say so. A variable that only docker compose knows does no harm either, as
// long as no builder's label or profile depends on it.
func Builders(ctx context.Context, dir string, c Compose) (builders []Builder, notes []string, err error) {
	return findBuilders(ctx, dir, c, os.Environ())
}

func findBuilders(ctx context.Context, dir string, c Compose, environ []string) (builders []Builder, notes []string, err error) {
	vars, notes := variables(dir, c, environ)
	files, skipped, err := composeFiles(dir, vars)
	notes = append(notes, skipped...)
	if err != nil {
		return nil, notes, fmt.Errorf("%w: %w", ErrProject, err)
	}
	services, err := readServices(ctx, dir, files, vars)
	if err != nil {
		return nil, notes, hint.With(fmt.Errorf("%w: read %s: %w", ErrProject, strings.Join(files, ", "), err), "`docker compose config` shows what is wrong in it.")
	}
	lookup := func(s string) string { return substitute(s, vars) }
	active := strings.FieldsFunc(vars["COMPOSE_PROFILES"], func(r rune) bool { return r == ',' || r == ' ' })
	for _, name := range slices.Sorted(maps.Keys(services)) {
		service, ok := services[name].(map[string]any)
		if !ok || !yes(lookup(labels(service)[Label])) {
			continue
		}
		var profiles []string
		list, _ := service["profiles"].([]any)
		for _, p := range list {
			profiles = append(profiles, lookup(fmt.Sprint(p)))
		}
		if !(types.ServiceConfig{Profiles: profiles}).HasProfile(active) {
			continue
		}
		if !serviceName.MatchString(name) {
			return nil, notes, fmt.Errorf("%w: the service %q can't be a builder: its name becomes a folder and a host", ErrProject, name)
		}
		image, _ := service["image"].(string)
		environment := pairs(service["environment"])
		for key, value := range environment {
			environment[key] = lookup(value)
		}
		builders = append(builders, Builder{Name: name, Addr: name + ":22", Image: lookup(image), Environment: environment})
	}
	if len(builders) == 0 {
		return nil, notes, hint.With(
			fmt.Errorf("%w: no service of it is a builder (files: %s)", ErrProject, strings.Join(files, ", ")),
			"Add to the service that runs the VM:\n    labels:\n      "+Label+`: "true"`)
	}
	return builders, notes, nil
}

var serviceName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

func yes(s string) bool {
	v, err := yesNo(s)
	return err == nil && v
}

// variables are those by which docker compose interpolates the project, as far
// as they are known here: what the container was given, then .env.
func variables(dir string, c Compose, environ []string) (types.Mapping, []string) {
	vars := types.Mapping{}
	for _, entry := range environ {
		// Compose hands over empty what was not set; .env may say it then.
		if key, value, ok := strings.Cut(entry, "="); ok && value != "" {
			vars[key] = value
		}
	}
	for key, value := range map[string]string{
		"COMPOSE_FILE": c.Files, "COMPOSE_PATH_SEPARATOR": c.Separator, "COMPOSE_PROFILES": c.Profiles, "COMPOSE_PROJECT_NAME": c.Project,
	} {
		if value != "" {
			vars[key] = value
		}
	}
	name := filepath.Join(dir, ".env")
	file, err := dotenv.GetEnvFromFile(vars, []string{name})
	if err == nil {
		return vars.Merge(file), nil
	}
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return vars, nil
	}
	return vars, []string{fmt.Sprintf("%s was passed over: %v", name, err)}
}

// composeFiles returns the project's files, the first one the base.
func composeFiles(dir string, vars types.Mapping) (files, notes []string, err error) {
	if vars["COMPOSE_FILE"] == "" {
		for i, names := range [][]string{cli.DefaultFileNames, cli.DefaultOverrideFileNames} {
			n := slices.IndexFunc(names, func(name string) bool { return canRead(filepath.Join(dir, name)) == nil })
			if n >= 0 {
				files = append(files, filepath.Join(dir, names[n]))
			} else if i == 0 {
				return nil, nil, hint.With(fmt.Errorf("there is no compose.yaml to be read in %s", dir),
					"Mount the project's folder there: the services init and sidecar want the volume `.:/project:ro`. "+
						"The daemon must be allowed to read it.")
			}
		}
		return files, nil, nil
	}
	separator := vars["COMPOSE_PATH_SEPARATOR"]
	if separator == "" {
		separator = string(os.PathListSeparator)
	}
	for _, name := range strings.Split(vars["COMPOSE_FILE"], separator) {
		if name == "" {
			continue
		}
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		err := canRead(path)
		switch {
		case err == nil:
			files = append(files, path)
		case filepath.IsAbs(name) || !filepath.IsLocal(name):
			notes = append(notes, fmt.Sprintf("%s of COMPOSE_FILE lies outside the project's folder and was passed over: "+
				"if it makes a service a builder, move it into that folder and name it from there", name))
		default:
			return nil, notes, hint.With(fmt.Errorf("read %s of COMPOSE_FILE: %w", name, err),
				"Paths in COMPOSE_FILE are taken from the project's folder, where compose.yaml lies.")
		}
	}
	if len(files) == 0 {
		return nil, notes, hint.With(fmt.Errorf("no file of COMPOSE_FILE=%s is to be seen in %s", vars["COMPOSE_FILE"], dir),
			"Name them relative to the project's folder, such as COMPOSE_FILE=compose.yaml:my.yaml")
	}
	return files, notes, nil
}

func canRead(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", path)
	}
	return err
}

// readServices returns the services of the merged project as plain YAML. It
// asks for no more than that, so that what can't be known here, such as a
// variable of an env file elsewhere, spoils nothing: first with every variable
// that is known put in, which include may need, and if the result makes no
// sense then without any.
func readServices(ctx context.Context, dir string, files []string, vars types.Mapping) (map[string]any, error) {
	var first error
	for _, raw := range []bool{false, true} {
		options, err := cli.NewProjectOptions(files, cli.WithWorkingDirectory(dir), cli.WithLoadOptions(func(o *loader.Options) {
			o.SkipInterpolation = raw
			o.SkipValidation = true
			o.SkipNormalization = true
			o.SkipConsistencyCheck = true
			o.SkipResolveEnvironment = true
			o.SkipDefaultValues = true
			o.ResolvePaths = false
			o.SetProjectName(vars["COMPOSE_PROJECT_NAME"], vars["COMPOSE_PROJECT_NAME"] != "")
			o.Interpolate = &interpolation.Options{
				LookupValue: func(key string) (string, bool) { value, ok := vars[key]; return value, ok },
				Substitute: func(s string, _ template.Mapping) (string, error) {
					return substitute(s, vars), nil
				},
			}
		}))
		if err != nil {
			return nil, err
		}
		options.Environment = vars
		model, err := options.LoadModel(ctx)
		if err == nil {
			services, _ := model["services"].(map[string]any)
			return services, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

// substitute puts variables in; where that is impossible s stays as it is.
func substitute(s string, vars types.Mapping) string {
	out, err := template.SubstituteWithOptions(s, func(key string) (string, bool) {
		value, ok := vars[key]
		return value, ok
	}, template.WithoutLogging)
	if err != nil {
		return s
	}
	return out
}

func labels(service map[string]any) map[string]string { return pairs(service["labels"]) }

// pairs reads both forms that Compose allows.
func pairs(value any) map[string]string {
	out := map[string]string{}
	switch list := value.(type) {
	case map[string]any:
		for key, value := range list {
			if value != nil { // nil is what only the shell of docker compose knows
				out[key] = fmt.Sprint(value)
			}
		}
	case []any:
		for _, entry := range list {
			key, value, _ := strings.Cut(fmt.Sprint(entry), "=")
			out[key] = value
		}
	}
	return out
}
