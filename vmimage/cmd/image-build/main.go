// Command image-build turns a NixOS configuration into an image, in the
// builder VM, as a user that nix-daemon doesn't trust: see package imagebuild.
//
//	image-build [flags] SOURCE
//
// SOURCE is a folder with the configuration and its other files. The image is
// put into the folder $OUT, a report into the file $REPORT. It exits with 0
// when the image is there, with 1 when the build failed and was explained,
// with 2 when it was called wrongly.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"osbuilder/vmimage/internal/imagebuild"
	"osbuilder/vmimage/internal/nixlog"
	"osbuilder/vmimage/internal/nixpkgs"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	code := command(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

func command(ctx context.Context, args []string, env func(string) string, stdout, stderr io.Writer) int {
	o, report, err := options(args, env, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err != nil {
		fmt.Fprintf(stderr, "image-build: %v\n", err)
		return 2
	}
	// Lines are whole even if two ends of a pipe write at once.
	o.Say = func(line string) { fmt.Fprintln(stdout, line) }

	result, err := imagebuild.Build(ctx, o)
	if err != nil {
		imagebuild.Explain(*result.Error, err, o.Say)
	}
	if report != "" {
		if writeErr := write(report, result); writeErr != nil {
			fmt.Fprintf(stderr, "image-build: write the report: %v\n", writeErr)
		}
	}
	if err != nil {
		return 1
	}
	return 0
}

// most is what the runner takes as a report, less some room.
const most = 60 << 10

// write writes the report, shortened if need be: the lines of an error are in the log, too.
func write(file string, report imagebuild.Report) error {
	text, err := json.Marshal(report)
	for err == nil && len(text) > most && report.Error != nil && len(report.Error.Lines) > 0 {
		short := *report.Error
		short.Lines = short.Lines[(len(short.Lines)+1)/2:]
		report.Error = &short
		text, err = json.Marshal(report)
	}
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

func options(args []string, env func(string) string, stderr io.Writer) (imagebuild.Options, string, error) {
	var o imagebuild.Options
	flags := flag.NewFlagSet("image-build", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&o.Entry, "entry", "configuration.nix", "the configuration, a file in SOURCE")
	flags.StringVar(&o.Format, "format", "iso", "kind of image: "+strings.Join(imagebuild.Formats, ", "))
	flags.StringVar(&o.System, "system", native(), "Nix's name of the machines that the image is for")
	flags.StringVar(&o.Nixpkgs, "nixpkgs", "nixos-26.05", "channel, revision, absolute path, or address of a tarball")
	flags.StringVar(&o.Name, "name", "", "name of the image, without its suffix; empty is the build's own")
	flags.StringVar(&o.Attribute, "attribute", "", "instead of a format: this attribute of the evaluated configuration, like config.system.build.isoImage")
	flags.StringVar(&o.Pin, "pin", "", "file that keeps revision and hash of nixpkgs: written once, used from then on")
	flags.StringVar(&o.Out, "out", env("OUT"), "folder for the image; default $OUT")
	systems := flags.String("systems-file", "/run/osbuilder/systems", "file with the systems that this VM can build for, one a line")
	if err := flags.Parse(args); err != nil {
		return o, "", err
	}
	if flags.NArg() != 1 {
		return o, "", errors.New("usage: image-build [flags] SOURCE")
	}
	if o.Out == "" {
		return o, "", errors.New("set -out or $OUT: the folder for the image")
	}
	if !filepath.IsLocal(o.Entry) {
		return o, "", fmt.Errorf("-entry %q is not a file in SOURCE", o.Entry)
	}
	if strings.ContainsRune(o.Name, '/') || strings.HasPrefix(o.Name, ".") {
		return o, "", fmt.Errorf("-name %q is no file name", o.Name)
	}
	if err := nixpkgs.Check(o.Nixpkgs); err != nil {
		return o, "", err
	}
	if o.Attribute != "" {
		o.Format = ""
	}
	var err error
	if o.Systems, err = readSystems(*systems); err != nil {
		return o, "", err
	}
	if o.Work, err = os.Getwd(); err != nil {
		return o, "", err
	}
	o.Source = flags.Arg(0)
	for _, path := range []*string{&o.Source, &o.Out} {
		// As Nix will name files: with no link in it.
		if *path, err = filepath.Abs(*path); err != nil {
			return o, "", err
		}
		if *path, err = filepath.EvalSymlinks(*path); err != nil {
			return o, "", err
		}
	}
	return o, env("REPORT"), nil
}

// native is Nix's name of this machine.
func native() string {
	switch runtime.GOARCH {
	case "amd64":
		return "x86_64-linux"
	case "arm64":
		return "aarch64-linux"
	default:
		return runtime.GOARCH + "-linux"
	}
}

// readSystems is what the VM wrote at its boot; without it, this machine's own.
func readSystems(file string) ([]string, error) {
	systems := []string{native()}
	f, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return systems, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if s := nixlog.Plain(strings.TrimSpace(lines.Text())); s != "" && s != systems[0] {
			systems = append(systems, s)
		}
	}
	return systems, lines.Err()
}
