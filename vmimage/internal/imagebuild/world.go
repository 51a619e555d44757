package imagebuild

import (
	"fmt"
	"regexp"
	"strings"

	"osbuilder/vmimage/internal/explain"
	"osbuilder/vmimage/internal/nixlog"
)

// A nixpkgs that is built without a cache begins with these.
var fromNothing = regexp.MustCompile(`^bootstrap-(?:stage|tools)`)

// noCache is what Nix says of a cache that it can't reach.
var noCache = regexp.MustCompile(`(?:unable to download|cannot open|failed to (?:open|connect)).*nix-cache-info|substituter '[^']*' is disabled|disabling binary cache`)

// worldSize is how many derivations are a world: a minimal image wants 3,250
// without a cache, and few tens with it.
const worldSize = 100

// world refuses to compile everything from the first compiler on, which would
// take days: that is never meant.
func world(log *nixlog.Log) error {
	plan := log.Plan()
	first := ""
	for _, drv := range plan.Build {
		if name := nixlog.DrvName(drv); fromNothing.MatchString(name) {
			first = name
			break
		}
	}
	said := unreachable(log)
	// With a cache, something of such a list comes from it.
	if first == "" || len(plan.Build) < worldSize || len(said) == 0 && len(plan.Fetch) > 0 {
		return nil
	}
	return tooMuch(fmt.Sprintf("all %d packages would be compiled, from %s on", len(plan.Build), first), said)
}

func tooMuch(what string, said []string) error {
	return &explain.Error{Explanation: explain.Explanation{
		Class:   explain.Cache,
		Summary: "no binary cache can be reached: " + what,
		Advice:  "That would take days, so it was not begun. Check that the Docker host reaches https://cache.nixos.org; a cache of your own goes into the VM's nix.conf (substituters, trusted-public-keys).",
		Lines:   said,
	}}
}

// unreachable is what Nix said of caches that it can't reach.
func unreachable(log *nixlog.Log) []string {
	var said []string
	for _, warning := range log.Warnings() {
		if noCache.MatchString(warning) && !retry.MatchString(warning) {
			said = append(said, strings.Split(warning, "\n")...)
		}
	}
	return said
}

// A worldWatch stops an evaluation that itself begins to build the world: what
// it imports from derivations is built without a plan.
type worldWatch struct {
	say  func(line string)
	stop func()

	warned  bool
	stopped string // what it began with; empty if it wasn't stopped
}

func (w *worldWatch) line(line string) {
	w.say(line)
	if noCache.MatchString(line) {
		w.warned = true
	}
	name, ok := strings.CutPrefix(line, "building ")
	if ok && w.warned && w.stopped == "" && fromNothing.MatchString(name) {
		w.stopped = name
		w.stop()
	}
}
