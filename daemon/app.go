package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.uber.org/zap"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
	"golang.org/x/sync/errgroup"

	"osbuilder/daemon/internal/buildlog"
	"osbuilder/daemon/internal/config"
	"osbuilder/daemon/internal/console"
	"osbuilder/daemon/internal/control"
	"osbuilder/daemon/internal/deliver"
	"osbuilder/daemon/internal/disk"
	"osbuilder/daemon/internal/dispatch"
	"osbuilder/daemon/internal/health"
	"osbuilder/daemon/internal/hint"
	"osbuilder/daemon/internal/inbox"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/logging"
	"osbuilder/daemon/internal/preflight"
	"osbuilder/daemon/internal/recipe"
	"osbuilder/daemon/internal/room"
	"osbuilder/daemon/internal/store"
	"osbuilder/daemon/internal/vm"
	"osbuilder/pipe"
)

// Variables, because tests that stop the program at every step have no time.
var (
	now                 = time.Now
	answerTimeout       = 30 * time.Second // a VM without KVM needs a few seconds
	syncEvery           = time.Second
	retryAfter          = 2 * time.Second
	consumeEvery  int64 = 16 << 20 // bytes of events; more of them would lie in the VM for nothing
)

// run is the daemon: it reads what it was given, wires the parts and runs them
// until ctx is done or one of them can't go on.
func run(ctx context.Context, cfg config.Config, stdout io.Writer) (err error) {
	log, output, err := logging.New(logging.Options{
		Format: cfg.LogFormat, Level: cfg.LogLevel, Color: cfg.Color(logging.IsTerminal(stdout)),
	}, stdout)
	if err != nil {
		return err
	}
	// The log is the first part to run and the last to stop.
	logging, stopLogging := context.WithCancel(context.WithoutCancel(ctx))
	logged := make(chan error, 1)
	go func() { logged <- output.Run(logging) }()
	defer func() {
		stopLogging()
		err = errors.Join(err, <-logged)
	}()

	found, notes, err := config.Builders(ctx, cfg.Paths.Project, cfg.Compose)
	for _, note := range notes {
		log.Warn("Compose project", zap.String("note", note))
	}
	if err != nil {
		return err
	}
	links, err := identify(found, cfg.Paths.Keys, console.Folder(cfg.Paths.Status))
	if err != nil {
		return err
	}
	log.Info("sidecar started", zap.String("version", pipe.Release), zap.String("jobs", cfg.Paths.Jobs), zap.Int("builders", len(links)))
	sayWorld(cfg, found, log.Named("preflight"))
	err = serve(ctx, cfg, links, log)
	log.Info("sidecar stopped")
	return err
}

// database is the file of the records, in the state folder.
const database = "osbuilder.db"

// world holds this host against what the VMs are given.
func world(cfg config.Config, builders []config.Builder) []preflight.Line {
	asked := preflight.Asked{JobTimeout: cfg.JobTimeout}
	for _, b := range builders {
		asked.VMs = append(asked.VMs, preflight.VM{
			Name: b.Name, Image: b.Image, Cores: b.Environment["CPU_CORES"], Memory: b.Environment["RAM_SIZE"],
			Disk: b.Environment["DISK_SIZE"], KVM: b.Environment["KVM"],
		})
	}
	return preflight.Check(asked, preflight.Look(cfg.Paths.Output, cfg.Paths.State, database))
}

func sayWorld(cfg config.Config, builders []config.Builder, log *zap.Logger) {
	for _, l := range world(cfg, builders) {
		fields := []zap.Field{zap.String("has", l.Has)}
		if l.Asked != "" {
			fields = append(fields, zap.String("asked", l.Asked))
		}
		if l.Then == "" {
			log.Info(l.What, fields...)
			continue
		}
		fields = append(fields, zap.String("then", l.Then))
		if len(l.Set) > 0 {
			fields = append(fields, zap.String("set", strings.Join(l.Set, " ")))
		}
		log.Warn(l.What, fields...)
	}
}

// serve runs the parts, with a link to each builder.
func serve(ctx context.Context, cfg config.Config, links []vm.Config, log *zap.Logger) (err error) {
	records, err := store.Open(ctx, filepath.Join(cfg.Paths.State, database))
	if err != nil {
		return fullState(err, cfg.Paths.State)
	}
	defer func() { err = errors.Join(err, records.Close()) }()
	d, err := dispatcher(ctx, cfg, records, log)
	if err != nil {
		return err
	}
	shared := owned{records, d, log}
	drops := inbox.New(inbox.Config{
		Dir: cfg.Paths.Jobs, State: cfg.Paths.State,
		Settle: cfg.Settle, Rescan: cfg.Rescan, JobTimeout: cfg.JobTimeout, Keep: cfg.Keep(),
		Classify: recipe.Classify, Check: recipe.Check,
		Prepare: func(j *job.Job, source string) error {
			return recipe.Prepare(j, source, job.NixOS{Format: cfg.Format, System: cfg.System, Nixpkgs: cfg.Nixpkgs})
		},
		NotFound: store.ErrNotFound,
	}, shared, log)
	// Before the inbox sweeps, and after the damaged records were set aside.
	published := &deliver.Publisher{Output: cfg.Paths.Output, State: cfg.Paths.State}
	if err := drops.SayLost(ctx, records.IDs, published.All); err != nil {
		log.Warn("jobs that are not on record any more can't be found", zap.Error(err))
	}
	commands := &control.Server{Path: cfg.Paths.Control, Backend: &backend{d, shared, drops}, Log: log}
	checks := &health.Server{Path: cfg.Paths.Health, Probe: d.Probe, Log: log}

	parts, ctx := errgroup.WithContext(ctx)
	taken := make(chan job.ID)
	for _, c := range links {
		l := vm.New(c, d, log)
		d.Add(l)
		parts.Go(stopped(ctx, func() error { return l.Run(ctx) }))
	}
	parts.Go(func() error { return d.Run(ctx, taken) })
	parts.Go(stopped(ctx, func() error { return records.Run(ctx, log) }))
	parts.Go(stopped(ctx, func() error { return drops.Run(ctx, taken) }))
	parts.Go(stopped(ctx, func() error { return checks.Run(ctx) }))
	parts.Go(stopped(ctx, func() error { return commands.Run(ctx) }))
	return fullState(parts.Wait(), cfg.Paths.State)
}

// What to do about disks that are full.
const (
	outputHint = "Make room on the disk of the output folder, for example by removing old jobs' folders in it."
	stateHint  = "Make room on the disk of Docker's volumes: docker system df shows what takes it, docker builder prune gives some back. " +
		"The VM's disk grows on it, too: when it is full the VM stands still."
)

// guard watches the disks that must not fill up.
func guard(cfg config.Config, log *zap.Logger) *room.Guard {
	return &room.Guard{
		Least: int64(cfg.MinFree), Log: log, Now: now,
		Places: []room.Place{{Path: cfg.Paths.State, Hint: stateHint}, {Path: cfg.Paths.Output, Hint: outputHint}},
	}
}

// fullState says of an end for want of room how much there is and what to do.
// What was to be written comes again when the daemon is started again.
func fullState(err error, state string) error {
	if !disk.Full(err) {
		return err
	}
	free, _ := disk.Free(state)
	return hint.With(fmt.Errorf("%w: %w", &disk.NoRoom{Path: state, Free: free}, err), stateHint+" The sidecar is started again by itself, and goes on then.")
}

// stopped makes a part's end by ctx, or by the dispatcher's end, no error.
func stopped(ctx context.Context, part func() error) func() error {
	return func() error {
		err := part()
		if errors.Is(err, dispatch.ErrStopped) || ctx.Err() != nil && errors.Is(err, context.Canceled) {
			return nil // the dispatcher itself says why
		}
		return err
	}
}

// dispatcher makes the part that owns the jobs, with those on record.
func dispatcher(ctx context.Context, cfg config.Config, records *store.SQLite, log *zap.Logger) (*dispatch.Dispatcher, error) {
	owner, err := records.Owner(ctx)
	if err != nil {
		return nil, err
	}
	jobs, damaged, err := records.Unsettled(ctx)
	if err != nil {
		return nil, err
	}
	sayDamaged(log, damaged)
	if at := records.Restored(); !at.IsZero() {
		log.Warn("records are those of a copy; what became of the jobs since is found out", zap.Time("written", at))
	}
	source := func(j job.Job) string { return filepath.Join(cfg.Paths.State, "jobs", string(j.ID), "source") }
	publisher := &deliver.Publisher{Output: cfg.Paths.Output, State: cfg.Paths.State, Keep: int64(cfg.MinFree)}
	open := make(map[job.ID]bool, len(jobs))
	for _, j := range jobs {
		open[j.ID] = true
	}
	if err := publisher.Clean(ctx, func(id job.ID) bool { return open[id] }); err != nil {
		log.Warn("left-over downloads could not be removed", zap.Error(err))
	}
	return dispatch.New(dispatch.Config{
		Owner: owner, TakeOver: cfg.TakeOver, Store: records, Damaged: store.ErrDamaged, Gone: vm.ErrGone, NotFound: store.ErrNotFound, Log: log, Now: now,
		AnswerTimeout: answerTimeout, SyncEvery: syncEvery, RetryAfter: retryAfter, ConsumeEvery: consumeEvery,
		Room:   guard(cfg, log).Lacks,
		Body:   func(j job.Job) ([]byte, error) { return recipe.Body(j, source(j)) },
		Inputs: func(j job.Job, w io.Writer) error { return inputs(j, source(j), w) },
		OpenLog: func(j job.Job, m job.Mark) (dispatch.Log, error) {
			return buildlog.Open(cfg.Paths.State, j.ID, m, buildLine(log, j.Name))
		},
		Published: func(j job.Job) (dispatch.Outcome, bool, error) { return published(publisher, j) },
		Begun:     func(j job.Job) bool { return begun(cfg.Paths.State, j.ID) },
		Publish: func(ctx context.Context, j job.Job, from dispatch.Builder) (string, error) {
			return publish(ctx, publisher, log, j, from)
		},
	}, jobs), nil
}

// begun reports whether a job has a log, or had one.
func begun(state string, id job.ID) bool {
	_, err := os.Stat(buildlog.Path(state, id))
	return !errors.Is(err, fs.ErrNotExist) || inbox.Ended(state, id)
}

// buildLine shows a line of a job's output.
func buildLine(log *zap.Logger, name string) func([]byte) {
	return func(line []byte) { logging.Line(log, name, string(line)) }
}

// inputs writes a job's inputs, and tells when they are not those that are on
// record.
func inputs(j job.Job, source string, w io.Writer) error {
	sum := sha256.New()
	var broken error // of w, which says nothing about the source
	err := recipe.Inputs(j, source, io.MultiWriter(sum, writerFunc(func(p []byte) (int, error) {
		n, err := w.Write(p)
		if err != nil {
			broken = err
		}
		return n, err
	})))
	switch {
	case broken != nil:
		return broken
	case err != nil:
		return fmt.Errorf("%w: %w", dispatch.ErrSource, err)
	case hex.EncodeToString(sum.Sum(nil)) != j.Inputs.SHA256:
		return fmt.Errorf("%w: %s is not what was dropped any more; drop it again", dispatch.ErrSource, source)
	}
	return nil
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// publish tells the faults that lie in the VM from those that can mend
// themselves.
func publish(ctx context.Context, p *deliver.Publisher, log *zap.Logger, j job.Job, from dispatch.Builder) (string, error) {
	var src deliver.Source
	if from != nil {
		src = remote{from}
	}
	folder, err := p.Publish(ctx, j, src)
	if folder != "" {
		for _, a := range deliver.Renamed(j) {
			log.Warn("artifact has another name in output/: a file system may take its own for that of another file", zap.String("job", j.Name),
				zap.String("artifact", a.MadeAs), zap.String("file", a.Name), zap.String("id", string(j.ID)))
		}
	}
	switch {
	case errors.Is(err, deliver.ErrLatest):
		log.Warn("job published, its link is not made", zap.String("job", j.Name), zap.String("output", folder), zap.Error(err))
		return folder, nil
	case errors.Is(err, deliver.ErrDigest):
		return "", fmt.Errorf("%w: %w", dispatch.ErrDamaged, err)
	case errors.Is(err, deliver.ErrName):
		return "", fmt.Errorf("%w: %w", dispatch.ErrGone, err)
	}
	return folder, err
}

// published reads an outcome back.
func published(p *deliver.Publisher, j job.Job) (dispatch.Outcome, bool, error) {
	r, ok, err := p.Published(j)
	return dispatch.Outcome{
		Result: pipe.Finished{
			Status: r.Status, ExitCode: r.ExitCode, Signal: r.Signal, Reason: r.Reason, Duration: r.Duration,
			Memory: r.Memory, Scope: r.MemoryScope, Report: r.Report,
		},
		Attempt: r.Attempts, Builder: r.Builder,
	}, ok, err
}

// A remote tells a file that the VM lacks from one that is missing here.
type remote struct{ dispatch.Builder }

func (s remote) Copy(ctx context.Context, path string, offset int64, w io.Writer) (int64, error) {
	n, err := s.Builder.Copy(ctx, path, offset, w)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", dispatch.ErrGone, err)
	}
	return n, err
}

// identify says how to reach each builder, with the keys that init has made.
func identify(found []config.Builder, keys string, status console.Folder) ([]vm.Config, error) {
	name := filepath.Join(keys, "id_ed25519")
	key, err := os.ReadFile(name)
	if err != nil {
		return nil, keyHint(fmt.Errorf("read the sidecar's key: %w", err))
	}
	signer, err := ssh.ParsePrivateKey(key)
	if err != nil {
		return nil, keyHint(fmt.Errorf("read the sidecar's key %s: %w", name, err))
	}
	hosts, err := knownhosts.New(filepath.Join(keys, "known_hosts"))
	if err != nil {
		return nil, keyHint(fmt.Errorf("read the VMs' host keys: %w", err))
	}
	links := make([]vm.Config, len(found))
	for i, b := range found {
		links[i] = vm.Config{Name: b.Name, Addr: b.Addr, User: "builder", Signer: signer, HostKeys: hosts, Console: status.Of(b.Name)}
	}
	return links, nil
}

func keyHint(err error) error {
	what := "The service init makes the keys: docker compose up init, and read what it says."
	if errors.Is(err, fs.ErrPermission) {
		what = "PUID and PGID must be the same for init and sidecar: docker compose up -d runs both anew."
	}
	return hint.With(err, what)
}
