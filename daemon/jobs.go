package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"osbuilder/daemon/internal/control"
	"osbuilder/daemon/internal/dispatch"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/inbox"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
)

// A backend is the daemon as the commands about jobs see it.
type backend struct {
	dispatcher *dispatch.Dispatcher
	records    owned
	drops      *inbox.Inbox
}

func (b *backend) InFlight(ctx context.Context) ([]job.Job, error) { return b.dispatcher.InFlight(ctx) }

func (b *backend) Get(ctx context.Context, id job.ID) (job.Job, error) {
	j, err := b.records.Get(ctx, id)
	return j, asked(err)
}

func (b *backend) List(ctx context.Context, after job.ID, limit int) ([]job.Job, error) {
	return b.records.List(ctx, after, limit)
}

func (b *backend) Named(ctx context.Context, name string, limit int) ([]job.Job, error) {
	return b.records.Named(ctx, name, limit)
}

func (b *backend) Cancel(ctx context.Context, id job.ID, reason string) (job.Job, error) {
	j, err := b.dispatcher.Cancel(ctx, id, reason)
	return b.answer(ctx, id, j, err)
}

func (b *backend) Retry(ctx context.Context, id job.ID) (job.Job, error) {
	j, err := b.dispatcher.Retry(ctx, id)
	return b.answer(ctx, id, j, err)
}

func (b *backend) Prioritize(ctx context.Context, id job.ID, priority int) (job.Job, error) {
	j, err := b.dispatcher.Prioritize(ctx, id, priority)
	return b.answer(ctx, id, j, err)
}

func (b *backend) Again(ctx context.Context, ended job.Job) (job.Job, error) {
	j, err := b.drops.Again(ctx, ended)
	if err != nil {
		return j, err
	}
	// It is on record: should the dispatcher, or all of the daemon, stop just
	// now, the next start takes it up.
	if err := b.dispatcher.Take(ctx, j.ID); err != nil && !errors.Is(err, dispatch.ErrStopped) && ctx.Err() == nil {
		return j, err
	}
	return j, nil
}

// answer puts what the dispatcher says into the words of package control. What
// is not in flight any more has ended in the meantime.
func (b *backend) answer(ctx context.Context, id job.ID, j job.Job, err error) (job.Job, error) {
	if errors.Is(err, dispatch.ErrUnknown) {
		if j, err = b.Get(ctx, id); err == nil {
			err = fmt.Errorf("job %s: %w: it is %s", id, control.ErrEnded, j.State)
		}
	}
	return j, asked(err)
}

// asked translates the errors that say what the user did.
func asked(err error) error {
	for from, to := range map[error]error{
		store.ErrNotFound: control.ErrNotFound, dispatch.ErrEnded: control.ErrEnded, dispatch.ErrRunning: control.ErrRunning,
	} {
		if errors.Is(err, from) {
			return &translated{err, to}
		}
	}
	if errors.Is(err, dispatch.ErrStopped) {
		return hint.With(err, "It is started again by itself: try again then.")
	}
	return err
}

// translated is an error that counts as another one, in its own words.
type translated struct {
	error
	as error
}

func (t *translated) Unwrap() []error { return []error{t.error, t.as} }

// aboutJobs returns the commands that ask the running daemon.
func aboutJobs(socket *string, out io.Writer) []*cobra.Command {
	client := func() control.Client { return control.Client{Path: *socket} }
	var all, asJSON bool
	var reason string
	show := func(j control.Job, err error) error {
		switch {
		case err != nil:
			return err
		case asJSON:
			return writeJSON(out, j)
		}
		return control.WriteJob(out, j, time.Now())
	}
	say := func(j control.Job, err error, text func() string) error {
		switch {
		case err != nil:
			return err
		case asJSON:
			return writeJSON(out, j)
		}
		_, err = fmt.Fprintln(out, text())
		return err
	}
	list := &cobra.Command{
		Use: "jobs", Short: "List the jobs that wait or run", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return listJobs(cmd.Context(), client(), out, all, asJSON) },
	}
	list.Flags().BoolVarP(&all, "all", "a", false, "also those that ended")
	cancel := &cobra.Command{
		Use: "cancel ID|NAME", Short: "Don't run a job, or not on", Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			j, err := client().Cancel(cmd.Context(), args[0], reason)
			return say(j, err, func() string { return cancelText(j) })
		},
	}
	cancel.Flags().StringVar(&reason, "reason", "cancelled by hand", "is put on record")
	commands := []*cobra.Command{
		list, cancel,
		{
			Use: "show ID|NAME", Short: "Show all that is known of a job", Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error { return show(client().Show(cmd.Context(), args[0])) },
		},
		{
			Use: "retry ID|NAME", Short: "Try again at once, where a job failed", Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				j, err := client().Retry(cmd.Context(), args[0])
				return say(j, err, func() string { return retryText(j) })
			},
		},
		{
			Use: "priority ID|NAME NUMBER", Short: "Let a waiting job go before others, or behind", Args: exactly(2),
			Long: fmt.Sprintf("Of the jobs that wait the one with the highest number is next, and of two alike the older.\n"+
				"Numbers go from %d to %d; every drop begins with 0.", job.MinPriority, job.MaxPriority),
			RunE: func(cmd *cobra.Command, args []string) error {
				n, err := strconv.Atoi(args[1])
				if err != nil {
					return usageError{fmt.Errorf("priority %q is not a whole number", args[1])}
				}
				j, err := client().Prioritize(cmd.Context(), args[0], n)
				return say(j, err, func() string { return fmt.Sprintf("job %s has priority %d now", j.ID, j.Priority) })
			},
		},
	}
	for _, c := range commands {
		c.Flags().BoolVar(&asJSON, "json", false, "for programs")
	}
	return commands
}

func cancelText(j control.Job) string {
	switch {
	case j.State == job.Collecting || j.State.Terminal():
		return fmt.Sprintf("job %s is cancelled", j.ID)
	case j.State == job.Sending:
		return fmt.Sprintf("job %s is cancelled as soon as %s says whether it has it", j.ID, j.Builder)
	default:
		return fmt.Sprintf("job %s is being cancelled: %s is told as soon as the link to it is up, and ends it within seconds", j.ID, j.Builder)
	}
}

func retryText(j control.Job) string {
	switch {
	case j.RetryOf != "" && j.Attempt == 0 && len(j.History) == 1:
		return fmt.Sprintf("job %s does again what %s did", j.ID, j.RetryOf)
	case j.State == job.Collecting:
		return fmt.Sprintf("job %s is published again now, without being built again", j.ID)
	default:
		return fmt.Sprintf("job %s is tried again now", j.ID)
	}
}

// listJobs writes the jobs, of all on record a page at a time.
func listJobs(ctx context.Context, c control.Client, out io.Writer, all, asJSON bool) error {
	list := lister(&tableOfJobs{table: control.Table{Out: out, Now: time.Now()}, all: all})
	if asJSON {
		list = &jsonOfJobs{out: out}
	}
	if all {
		if err := c.AllJobs(ctx, list.add); err != nil {
			return err
		}
		return list.end()
	}
	jobs, err := c.Jobs(ctx)
	if err != nil {
		return err
	}
	if err := list.add(jobs); err != nil {
		return err
	}
	return list.end()
}

// A lister writes jobs as they come.
type lister interface {
	add(jobs []control.Job) error
	end() error
}

type tableOfJobs struct {
	table      control.Table
	all, begun bool
}

func (t *tableOfJobs) add(jobs []control.Job) error {
	if len(jobs) == 0 {
		return nil
	}
	t.begun = true
	return t.table.Write(jobs)
}

func (t *tableOfJobs) end() error {
	text := "no job waits or runs; osbuilder jobs --all lists those that ended"
	switch {
	case t.begun:
		return nil
	case t.all:
		text = "no job is on record"
	}
	_, err := fmt.Fprintln(t.table.Out, text)
	return err
}

// jsonOfJobs writes one array, as writeJSON would.
type jsonOfJobs struct {
	out   io.Writer
	begun bool
}

func (a *jsonOfJobs) add(jobs []control.Job) error {
	for _, j := range jobs {
		text, err := json.MarshalIndent(j, "  ", "  ")
		if err != nil {
			return err
		}
		between := "[\n  "
		if a.begun {
			between = ",\n  "
		}
		a.begun = true
		if _, err := fmt.Fprintf(a.out, "%s%s", between, text); err != nil {
			return err
		}
	}
	return nil
}

func (a *jsonOfJobs) end() error {
	text := "[]\n"
	if a.begun {
		text = "\n]\n"
	}
	_, err := io.WriteString(a.out, text)
	return err
}

func writeJSON(out io.Writer, v any) error {
	e := json.NewEncoder(out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// negativeLast lets a negative number be a priority, where the command line
// would take it for a flag.
func negativeLast(args []string) []string {
	if len(args) == 0 || args[0] != "priority" || slices.Contains(args, "--") {
		return args
	}
	var flags, numbers []string
	for _, arg := range args {
		if n, err := strconv.Atoi(arg); err == nil && n < 0 {
			numbers = append(numbers, arg)
		} else {
			flags = append(flags, arg)
		}
	}
	if len(numbers) == 0 {
		return args
	}
	return append(append(flags, "--"), numbers...)
}

func exactly(n int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := cobra.ExactArgs(n)(cmd, args); err != nil {
			return usageError{fmt.Errorf("%w: %s", err, cmd.UseLine())}
		}
		return nil
	}
}
