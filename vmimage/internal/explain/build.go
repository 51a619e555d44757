package explain

import (
	"fmt"
	"regexp"
	"strings"
	"syscall"

	"osbuilder/vmimage/internal/nixlog"
)

// drvPath is a derivation's, as messages quote it.
const drvPath = `'(/[^' ]+\.drv)(?:[\^!][^']*)?'`

var (
	// 2.8 to 2.31, and 2.32 and later.
	failedOld  = regexp.MustCompile(`builder for ` + drvPath + ` (failed[^;\n]*)`)
	failedNew  = regexp.MustCompile(`(?s)Cannot build ` + drvPath + `\.\s*Reason: (builder [^\n]*?)\.?\n`)
	aDrv       = regexp.MustCompile(drvPath)
	exitCode   = regexp.MustCompile(`exit code (\d+)`)
	signalSaid = regexp.MustCompile(`signal (\d+)(?: \(([^)]*)\))?`)
)

// A failure is the derivation at the root of a failed build.
type failure struct {
	drv, how string
}

// failing finds the derivation whose own builder failed, not one that waits for it.
func failing(f Facts) (failure, bool) {
	for _, e := range f.Errors {
		for _, re := range []*regexp.Regexp{failedNew, failedOld} {
			if m := re.FindStringSubmatch(e.Message + "\n"); m != nil {
				return failure{m[1], strings.TrimPrefix(m[2], "builder ")}, true
			}
		}
	}
	return failure{}, false
}

// blamed is the derivation that a message names, or that was under way.
func blamed(f Facts, said string) string {
	if b, ok := failing(f); ok {
		return b.drv
	}
	if m := aDrv.FindStringSubmatch(said); m != nil {
		return m[1]
	}
	if len(f.Building) > 0 {
		return f.Building[0]
	}
	return ""
}

// lastLines are a derivation's, from the log, or else from the message itself.
func lastLines(f Facts, drv, said string) []string {
	if lines := f.BuildLog(drv); len(lines) > 0 {
		return lines
	}
	var lines []string
	for line := range strings.SplitSeq(said, "\n") {
		if rest, ok := strings.CutPrefix(strings.TrimSpace(line), "> "); ok {
			lines = append(lines, rest)
		}
	}
	return lines
}

func ours(_ Facts, said string) (Explanation, bool) {
	const mark = "osbuilder: unsupported"
	i := strings.Index(said, mark)
	if i < 0 {
		return Explanation{}, false
	}
	text := strings.TrimLeft(headline(said[i+len(mark):]), ": ")
	return Explanation{
		Class:   Unsupported,
		Summary: "unsupported: " + text,
		Advice:  "Choose another FORMAT, or another NIXPKGS.",
	}, true
}

var daemonGone = regexp.MustCompile(`(?m)^.*(cannot connect to (?:socket|daemon)|Nix daemon disconnected unexpectedly|opening a connection to remote store|daemon-socket/socket|error: Nix daemon|error: unexpected end-of-file).*$`)

func daemon(_ Facts, said string) (Explanation, bool) {
	m := daemonGone.FindString(said)
	if m == "" {
		return Explanation{}, false
	}
	e := Explanation{Class: Daemon, Summary: "nix-daemon in the builder VM can't be reached: " + bare(m)}
	e.Advice = "It is a fault of the builder VM, not of the configuration: restart the VM and drop the job again."
	if strings.Contains(said, "disconnected unexpectedly") || strings.Contains(said, "unexpected end-of-file") {
		e.Summary = "nix-daemon in the builder VM ended during the build"
		e.Advice = "Most likely it ran out of memory: give the VM more (RAM_SIZE), or restart it, and drop the job again."
	}
	return e, true
}

func bare(message string) string {
	return strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(message), "error:"))
}

var (
	hashMismatch = regexp.MustCompile(`hash mismatch in (?:fixed-output derivation|file downloaded from|input) ?'([^']*)'|hash mismatch for '([^']*)'`)
	hashSides    = regexp.MustCompile(`(?m)^\s*(?:>\s*)?(specified|wanted|expected|got):\s+(\S+)`)
)

func hash(f Facts, said string) (Explanation, bool) {
	m := hashMismatch.FindStringSubmatch(said)
	if m == nil {
		return Explanation{}, false
	}
	what := m[1] + m[2]
	if strings.HasSuffix(what, ".drv") {
		what = nixlog.DrvName(what)
	}
	e := Explanation{
		Class:   Hash,
		Summary: "a download is not what was expected: " + what,
		At:      inDrop(f, said),
		Advice:  "What lies at that address has changed, or the hash in the configuration is wrong. If you trust the download, write the hash that was got into the configuration.",
	}
	seen := map[string]bool{}
	for _, side := range hashSides.FindAllStringSubmatch(said, -1) {
		if line := side[1] + ": " + side[2]; !seen[line] {
			seen[line] = true
			e.Lines = append(e.Lines, line)
		}
	}
	return e, true
}

var (
	wantsOld = regexp.MustCompile(`a '([^']*)' with features \{([^}]*)\} is required to build '([^']*)', but I am a '([^']*)' with features \{([^}]*)\}`)
	// 2.32 and later say only what is missing.
	wantsNew     = regexp.MustCompile(`Reason: (?:platform mismatch|missing system features)`)
	wantSystem   = regexp.MustCompile(`Required system: '([^']*)'`)
	haveSystem   = regexp.MustCompile(`Current system: '([^']*)'`)
	wantFeatures = regexp.MustCompile(`Required features: \{([^}]*)\}`)
	haveFeatures = regexp.MustCompile(`Available features: \{([^}]*)\}`)
)

func unsupported(_ Facts, said string) (Explanation, bool) {
	var drv, system, features, own, has string
	switch m := wantsOld.FindStringSubmatch(said); {
	case m != nil:
		system, features, drv, own, has = m[1], m[2], m[3], m[4], m[5]
	case wantsNew.MatchString(said):
		drv = first(aDrv, said)
		system, own = first(wantSystem, said), first(haveSystem, said)
		features, has = first(wantFeatures, said), first(haveFeatures, said)
	default:
		return Explanation{}, false
	}
	name := nixlog.DrvName(drv)
	missing := missingFeatures(features, has)
	if system == own && len(missing) > 0 {
		e := Explanation{
			Class:   Unsupported,
			Summary: fmt.Sprintf("building %s wants the feature %s, which this builder VM doesn't have", name, strings.Join(missing, ", ")),
			Advice:  "Choose a format that is built without it: iso and install-iso are.",
		}
		if missing[0] == "kvm" {
			e.Advice += " The feature kvm is there where the Docker host gives the VM nested virtualisation."
		}
		return e, true
	}
	return Explanation{
		Class:   Unsupported,
		Summary: fmt.Sprintf("building %s wants a machine of the system %s; this builder VM is %s", name, system, own),
		Advice:  "Set SYSTEM, and nixpkgs.hostPlatform in the configuration if it is there, to a system that the builder VM has.",
	}, true
}

// first is a pattern's first group, empty where it isn't found.
func first(re *regexp.Regexp, text string) string {
	if m := re.FindStringSubmatch(text); m != nil {
		return m[1]
	}
	return ""
}

func missingFeatures(want, have string) []string {
	has := map[string]bool{}
	for _, feature := range strings.Split(have, ",") {
		has[strings.TrimSpace(feature)] = true
	}
	var missing []string
	for _, feature := range strings.Split(want, ",") {
		if feature = strings.TrimSpace(feature); feature != "" && !has[feature] {
			missing = append(missing, feature)
		}
	}
	return missing
}

var timedOut = regexp.MustCompile(`timed out after (\d+) seconds( of silence)?`)

func timeout(f Facts, said string) (Explanation, bool) {
	m := timedOut.FindStringSubmatch(said)
	if m == nil {
		return Explanation{}, false
	}
	drv := blamed(f, said)
	what := "a build"
	if drv != "" {
		what = "building " + nixlog.DrvName(drv)
	}
	limit := "took longer than " + m[1] + " seconds"
	if m[2] != "" {
		limit = "said nothing for " + m[1] + " seconds"
	}
	return Explanation{
		Class:   Timeout,
		Summary: what + " " + limit,
		Advice:  "Nix's own limits ended it (timeout and max-silent-time in nix.conf). Look at its last lines: it may hang, or need more time.",
		Lines:   f.BuildLog(drv),
	}, true
}

var noSpace = regexp.MustCompile(`No space left on device|database or disk is full|(?i:lack of free disk space)|Disk quota exceeded`)

func disk(f Facts, said string) (Explanation, bool) {
	drv := blamed(f, said)
	lines := lastLines(f, drv, said)
	// A builder that fails for this says so itself, at its end.
	if !noSpace.MatchString(said) && !noSpace.MatchString(strings.Join(tail(lines, 10), "\n")) {
		return Explanation{}, false
	}
	summary := "no space left on the builder VM's data disk"
	if drv != "" {
		summary += ", while building " + nixlog.DrvName(drv)
	}
	return Explanation{
		Class:   Disk,
		Summary: summary,
		Advice:  "Give the VM a larger disk (DISK_SIZE in .env) and restart it, or make the image smaller.",
		Lines:   lines,
	}, true
}

var (
	noMemory      = regexp.MustCompile(`Cannot allocate memory|std::bad_alloc|GC Warning: Out of Memory|(?m:^error: out of memory$)|(?i:virtual memory exhausted)`)
	builderMemory = regexp.MustCompile(`Cannot allocate memory|std::bad_alloc|(?i:virtual memory exhausted)|fatal error: Killed signal terminated program|MemoryError|OutOfMemoryError|JavaScript heap out of memory|(?i:out of memory)`)
)

func memory(f Facts, said string) (Explanation, bool) {
	const advice = "Give the VM more memory (RAM_SIZE in .env) and restart it"
	if f.Step == Evaluate && (f.Signal == syscall.SIGKILL || noMemory.MatchString(said)) {
		return Explanation{
			Class:   Memory,
			Summary: "out of memory while evaluating the configuration",
			Advice:  advice + "; evaluation needs 1 to 2 GB. If it has that, look for a list or an attribute set in the configuration that has no end.",
		}, true
	}
	drv := blamed(f, said)
	b, failed := failing(f)
	lines := lastLines(f, drv, said)
	killed := failed && strings.Contains(b.how, "signal 9")
	switch {
	case killed && f.OOM:
	case builderMemory.MatchString(strings.Join(tail(lines, 10), "\n")):
	case noMemory.MatchString(said):
	case f.Signal == syscall.SIGKILL:
	default:
		return Explanation{}, false
	}
	summary := "out of memory"
	if drv != "" {
		summary += " while building " + nixlog.DrvName(drv)
	}
	return Explanation{
		Class:   Memory,
		Summary: summary,
		Advice:  advice + ", or let fewer jobs run at once (SLOTS).",
		Lines:   lines,
	}, true
}

func signal(f Facts, said string) (Explanation, bool) {
	if f.Signal != 0 {
		return Explanation{
			Class:   Killed,
			Summary: fmt.Sprintf("Nix was ended by signal %d (%s) while %s", f.Signal, f.Signal, f.Step.doing()),
			Advice:  "An evaluation that crashes most often recurses without end. Else it is a fault of the builder: report it with the log.",
		}, true
	}
	b, ok := failing(f)
	if !ok {
		return Explanation{}, false
	}
	m := signalSaid.FindStringSubmatch(b.how)
	if m == nil {
		return Explanation{}, false
	}
	e := Explanation{
		Class:   Killed,
		Summary: fmt.Sprintf("the builder of %s was ended by signal %s", nixlog.DrvName(b.drv), m[1]),
		Advice:  "The program that it ran crashed: look at its last lines.",
		Lines:   lastLines(f, b.drv, said),
	}
	if m[2] != "" {
		e.Summary += " (" + m[2] + ")"
	}
	if m[1] == "9" {
		e.Advice = "Most often that is the kernel, for want of memory: give the VM more (RAM_SIZE in .env) and restart it."
	}
	return e, true
}

var (
	// Nix's own, and what builders' downloaders say at their end.
	noDownload  = regexp.MustCompile(`unable to download '([^']*)': ?([^\n]*)`)
	noHost      = regexp.MustCompile(`(?m)^.*(?:Could ?n[o']t resolve host|Temporary failure in name resolution|Name or service not known|Network is unreachable|Connection refused|Connection timed out|Failed to connect to|cannot download \S+ from any mirror).*$`)
	httpMissing = regexp.MustCompile(`HTTP error (\d+)|error: (\d{3})`)
)

func network(f Facts, said string) (Explanation, bool) {
	drv := blamed(f, said)
	var lines []string
	if drv != "" {
		lines = lastLines(f, drv, said)
	}
	all := said + "\n" + strings.Join(tail(lines, 10), "\n")
	m := noDownload.FindStringSubmatch(all)
	if m == nil {
		// A builder of another kind may have its own reason to fail after it
		// could not reach something, so only one that was to download counts.
		host := noHost.FindString(all)
		if _, failed := failing(f); host == "" || !failed && f.Step == Evaluate {
			return Explanation{}, false
		}
		m = []string{"", nixlog.DrvName(drv), bare(host)}
	}
	e := Explanation{
		Class:   Network,
		Summary: fmt.Sprintf("no network: can't download %s: %s", m[1], tidy(m[2])),
		At:      inDrop(f, said),
		Advice:  "Check that the Docker host reaches that address, and its name service. The VM knows no proxy: behind one, jobs need a cache that it reaches without (substituters, in VM_NIX_CONF).",
		Lines:   lines,
	}
	if status := httpMissing.FindStringSubmatch(m[2]); status != nil {
		e.Summary = fmt.Sprintf("can't download %s: %s", m[1], tidy(m[2]))
		e.Advice = "The server answered, but not with the file: is the address right?"
	}
	return e, true
}

var (
	blanks   = regexp.MustCompile(`\s+`)
	curlCode = regexp.MustCompile(`\s*\(\d+\)`)
)

func tidy(reason string) string {
	reason = blanks.ReplaceAllString(strings.TrimSpace(reason), " ")
	// «Could not resolve hostname (6) Could not resolve host: X» says it twice.
	if i := curlCode.FindStringIndex(reason); i != nil && i[1] < len(reason) {
		reason = strings.TrimSpace(reason[i[1]:])
	}
	if !strings.Contains(reason, "(") {
		reason = strings.TrimRight(reason, ")")
	}
	return strings.TrimSuffix(reason, ".")
}

var noOutput = regexp.MustCompile(`failed to produce output path`)

func build(f Facts, said string) (Explanation, bool) {
	b, ok := failing(f)
	if !ok {
		if f.Step != Realise || len(f.Errors) == 0 {
			return Explanation{}, false
		}
		e := Explanation{Class: Build, Summary: headline(cause(f.Errors[0]))}
		if drv := blamed(f, said); drv != "" {
			e.Lines = lastLines(f, drv, said)
		}
		e.Advice = "The whole log says more."
		return e, true
	}
	name := nixlog.DrvName(b.drv)
	e := Explanation{
		Class:   Build,
		Summary: fmt.Sprintf("building %s failed", name),
		Lines:   lastLines(f, b.drv, said),
		Advice:  "Its last lines say why. A package that fails for everyone is fixed in another revision of nixpkgs (NIXPKGS).",
	}
	if m := exitCode.FindStringSubmatch(b.how); m != nil {
		e.Summary += " with exit code " + m[1]
	}
	if noOutput.MatchString(b.how) {
		e.Summary += ": it ended well, but made nothing"
	}
	if f.Step == Evaluate {
		e.At = inDrop(f, said)
	}
	return e, true
}
