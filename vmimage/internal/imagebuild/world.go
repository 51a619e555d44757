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
	var said []string
	for _, warning := range log.Warnings() {
		if noCache.MatchString(warning) {
			said = append(said, strings.Split(warning, "\n")...)
		}
	}
	// With a cache, something of such a list comes from it.
	if first == "" || len(plan.Build) < worldSize || len(said) == 0 && len(plan.Fetch) > 0 {
		return nil
	}
	e := explain.Explanation{
		Class:   explain.Cache,
		Summary: fmt.Sprintf("no binary cache can be reached: all %d packages would be compiled, from %s on", len(plan.Build), first),
		Advice:  "That would take days, so it was not begun. Check that the Docker host reaches https://cache.nixos.org; a cache of your own goes into the VM's nix.conf (substituters, trusted-public-keys).",
		Lines:   said,
	}
	return &explain.Error{Explanation: e}
}
