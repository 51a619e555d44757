package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/health"
	"osbuilder/daemon/internal/logging"
	"osbuilder/daemon/internal/preflight"
	"osbuilder/daemon/internal/setup"
	"osbuilder/daemon/internal/store"
	"osbuilder/pipe"
)

// command returns the command line. The paths are flags, hidden ones, for
// tests alone: in the containers they are what compose.yaml mounts.
func command(args []string, stdout, stderr io.Writer) *cobra.Command {
	paths := config.DefaultPaths()
	root := &cobra.Command{
		Use:           "osbuilder",
		Short:         "Put a job into jobs/, find a bootable image in output/",
		SilenceErrors: true, // explain shows them
		SilenceUsage:  true,
	}
	root.SetArgs(negativeLast(args))
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usageError{err} })
	for name, value := range map[string]*string{
		"jobs": &paths.Jobs, "output": &paths.Output, "state": &paths.State, "keys": &paths.Keys,
		"client-keys": &paths.ClientKeys, "vm-keys": &paths.VMKeys, "project": &paths.Project, "health": &paths.Health,
		"control": &paths.Control,
	} {
		root.PersistentFlags().StringVar(value, name, *value, "")
		if err := root.PersistentFlags().MarkHidden(name); err != nil {
			panic(err) // the flag was defined in the line above
		}
	}
	root.AddCommand(aboutJobs(&paths.Control, stdout)...)
	root.AddCommand(
		&cobra.Command{
			Use: "run", Short: "Take jobs and have them built, until SIGTERM", Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := config.Load()
				if err == nil {
					cfg.Paths = paths
					err = run(cmd.Context(), cfg, stdout)
				}
				if err != nil && cfg.LogFormat == logging.JSON { // which was read, whatever else is wrong
					err = logError{err}
				}
				return err
			},
		},
		&cobra.Command{
			Use: "init", Short: "Make the keys that are missing and give the folders to PUID:PGID", Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := config.LoadInit()
				if err != nil {
					return err
				}
				cfg.Paths = paths
				return initialise(cmd.Context(), cfg, stdout)
			},
		},
		&cobra.Command{
			Use: "preflight", Short: "Say what this machine has, against what the VM is given", Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				cfg, err := config.Load()
				if err != nil {
					return err
				}
				cfg.Paths = paths
				builders, _, err := config.Builders(cmd.Context(), cfg.Paths.Project, cfg.Compose)
				if err != nil {
					return err
				}
				_, err = fmt.Fprint(stdout, preflight.Text(world(cfg, builders)))
				return err
			},
		},
		&cobra.Command{
			Use: "healthcheck", Short: "Ask the running daemon whether it works", Args: noArgs,
			RunE: func(cmd *cobra.Command, _ []string) error { return health.Check(cmd.Context(), paths.Health) },
		},
		restore(&paths.State, stdout),
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: noArgs,
			RunE: func(*cobra.Command, []string) error {
				_, err := fmt.Fprintln(stdout, "osbuilder", pipe.Release)
				return err
			},
		},
	)
	return root
}

// restore returns the command that exchanges damaged records for a copy.
func restore(state *string, out io.Writer) *cobra.Command {
	var empty bool
	cmd := &cobra.Command{
		Use: "restore [COPY]", Short: "Put a copy of the records in the place of damaged ones; the daemon must not run",
		Args: func(cmd *cobra.Command, args []string) error {
			if err := cobra.MaximumNArgs(1)(cmd, args); err != nil {
				return usageError{err}
			}
			if empty && len(args) > 0 {
				return usageError{errors.New("a copy and --empty can't both be")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			path := filepath.Join(*state, database)
			var r store.Restoring
			var err error
			switch {
			case empty:
				r, err = store.RestoreEmpty(cmd.Context(), path)
			case len(args) > 0:
				r, err = store.Restore(cmd.Context(), path, args[0])
			default:
				r, err = store.Restore(cmd.Context(), path, "")
			}
			if err != nil {
				return err
			}
			if r.Kept != "" {
				fmt.Fprintln(out, "kept the file that was there:", r.Kept)
			}
			if r.From == "" {
				fmt.Fprintln(out, "the records are empty now")
			} else {
				fmt.Fprintln(out, "put in its place:", r.From)
			}
			fmt.Fprintln(out, "start the daemon, and look at its log: docker compose up -d sidecar")
			return nil
		},
	}
	cmd.Flags().BoolVar(&empty, "empty", false, "begin anew, with no jobs on record")
	return cmd
}

func noArgs(cmd *cobra.Command, args []string) error {
	if err := cobra.NoArgs(cmd, args); err != nil {
		return usageError{err}
	}
	return nil
}

func initialise(ctx context.Context, cfg config.Init, out io.Writer) error {
	builders, notes, err := config.Builders(ctx, cfg.Paths.Project, cfg.Compose)
	for _, note := range notes {
		fmt.Fprintln(out, "note:", shown(note))
	}
	if err != nil {
		return err
	}
	names := make([]string, len(builders))
	for i, b := range builders {
		names[i] = b.Name
	}
	if err := setup.Run(ctx, setup.Config{
		VMKeys: cfg.Paths.VMKeys, ClientKeys: cfg.Paths.ClientKeys,
		Jobs: cfg.Paths.Jobs, Output: cfg.Paths.Output, State: cfg.Paths.State, Folder: cfg.Paths.Project,
		UserMap: "/proc/self/uid_map", UID: cfg.UID, GID: cfg.GID,
		Builders: names, Authorized: cfg.AuthorizedKeys, NixConf: cfg.NixConf, Project: cfg.Project, Out: out,
	}); err != nil {
		return err
	}
	fmt.Fprintln(out, "keys and folders are ready")
	return nil
}
