// Command pipe-runner is the builder VM's half of the pipe: see package
// runner.
//
//	pipe-runner run [flags]         watch pipe_in and run jobs, as root, until SIGTERM
//	pipe-runner result --file PATH  the stop hook of a job's unit
//	pipe-runner version
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"osbuilder/pipe"
	"osbuilder/pipe/runner"
)

func main() {
	// SIGTERM ends the runner; the jobs are units of their own and go on.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	err := command(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		fmt.Fprintf(os.Stderr, "pipe-runner: %v\n", err)
		os.Exit(2)
	case errors.Is(err, errSaid):
		os.Exit(1)
	default:
		fmt.Fprintf(os.Stderr, "pipe-runner: %v\n", err)
		os.Exit(1)
	}
}

// errSaid: what went wrong was said elsewhere.
var errSaid = errors.New("said in the journal")

// errUsage: the command line is wrong.
var errUsage = errors.New("usage: pipe-runner run | result | version")

func command(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errUsage
	}
	flags := flag.NewFlagSet("pipe-runner "+args[0], flag.ContinueOnError)
	flags.SetOutput(stderr)
	switch args[0] {
	case "run":
		return run(ctx, flags, args[1:], stderr)
	case "result":
		file := flags.String("file", "", "where to write the result")
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		err := runner.WriteResult(*file, os.Getenv, func() bool { return stopping(ctx) })
		if err != nil && toJournal(err) {
			return errSaid
		}
		return err
	case "version":
		if err := parse(flags, args[1:]); err != nil {
			return err
		}
		_, err := fmt.Fprintf(stdout, "pipe-runner %s, protocol %d\n", pipe.Release, pipe.Version)
		return err
	default:
		return fmt.Errorf("%w: unknown command %q", errUsage, args[0])
	}
}

// toJournal says there what became of the stop hook: its standard error is the
// job's output. It reports whether that worked.
func toJournal(err error) bool {
	conn, dialErr := net.Dial("unixgram", "/run/systemd/journal/dev-log") //nolint:noctx // at once, or not at all
	if dialErr != nil {
		return false
	}
	defer conn.Close()
	_, writeErr := fmt.Fprintf(conn, "<3>pipe-runner: %v", err)
	return writeErr == nil
}

// stopping asks systemd whether the VM is on its way down.
func stopping(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	// Its exit status is not 0 for any word but "running".
	state, _ := exec.CommandContext(ctx, "systemctl", "is-system-running").Output()
	return strings.TrimSpace(string(state)) == "stopping"
}

func parse(flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("%w: unexpected %q", errUsage, flags.Arg(0))
	}
	return nil
}

func run(ctx context.Context, flags *flag.FlagSet, args []string, stderr io.Writer) error {
	cfg := runner.Config{Version: pipe.Release, Log: stderr}
	flags.StringVar(&cfg.Pipe, "pipe", pipe.Dir, "folder of pipe_in and pipe_out")
	flags.StringVar(&cfg.Data, "data", "/data", "folder on the data disk")
	flags.IntVar(&cfg.Slots, "slots", 0, fmt.Sprintf("how many jobs run at once; 0 is %d", runner.DefaultSlots))
	flags.StringVar(&cfg.UserPrefix, "user-prefix", "job-", "slot N runs its jobs as the user of this name and N")
	flags.StringVar(&cfg.PipeUser, "sftp-user", "builder", "who writes requests and fetches artifacts over SSH")
	flags.StringVar(&cfg.Image, "image", "", "name and version of the VM's image; empty reads it from -image-file")
	flags.StringVar(&cfg.SystemsFile, "systems-file", "/run/osbuilder/systems", "file that lists the Nix systems that this VM builds for; missing: its own alone")
	flags.StringVar(&cfg.NixSocket, "nix-socket", "/nix/var/nix/daemon-socket/socket", "where nix-daemon listens; hello tells if it is broken. Empty: nobody asks")
	memory := flags.Int64("job-memory", 0, "MiB that a job may hold; 0 is half of the VM's (at least 1536), or 85% of it with one slot")
	output := flags.Int64("job-output", 0, fmt.Sprintf("MiB of output that a job may have; 0 is %d", runner.DefaultMaxOutput>>20))
	imageFile := flags.String("image-file", "/etc/osbuilder-image", "file whose first line names the VM's image")
	if err := parse(flags, args); err != nil {
		return err
	}
	const most = 1 << 40 // MiB; more overflows
	if *memory > most || *output > most {
		return fmt.Errorf("%w: %d MiB of memory and %d of output for a job", errUsage, *memory, *output)
	}
	cfg.Memory, cfg.MaxOutput = *memory<<20, *output<<20
	if cfg.Image == "" {
		image, err := runner.ReadImage(*imageFile)
		if err != nil {
			return err
		}
		cfg.Image = image
	}
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the stop hook: %w", err)
	}
	cfg.Units = runner.SystemdUnits{Hook: program}
	return runner.New(cfg).Run(ctx)
}
