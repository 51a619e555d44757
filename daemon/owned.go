package main

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"osbuilder/daemon/internal/dispatch"
	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/store"
)

// owned are the records as everybody but the dispatcher reads them. The store
// sets a damaged one aside as soon as it is read. If its job is in flight, the
// dispatcher knows it by heart, and writes it anew at once.
type owned struct {
	*store.SQLite
	dispatcher *dispatch.Dispatcher
	log        *zap.Logger
}

// Get is that of the store.
func (o owned) Get(ctx context.Context, id job.ID) (job.Job, error) {
	j, err := o.SQLite.Get(ctx, id)
	if errors.Is(err, store.ErrDamaged) && o.healed(ctx, []store.Damaged{{ID: id, Err: err}}) {
		return o.SQLite.Get(ctx, id)
	}
	return j, err
}

// List is that of the store, without the damaged records. The last page is the
// first one that is empty.
func (o owned) List(ctx context.Context, after job.ID, limit int) ([]job.Job, error) {
	for {
		jobs, damaged, err := o.SQLite.List(ctx, after, limit)
		if err != nil || len(damaged) == 0 {
			return jobs, err
		}
		if !o.healed(ctx, damaged) && len(jobs) > 0 {
			return jobs, nil
		}
	}
}

// Named is that of the store, without the damaged records.
func (o owned) Named(ctx context.Context, name string, limit int) ([]job.Job, error) {
	jobs, damaged, err := o.SQLite.Named(ctx, name, limit)
	if err == nil && o.healed(ctx, damaged) {
		jobs, _, err = o.SQLite.Named(ctx, name, limit)
	}
	return jobs, err
}

// healed reports whether any of the damaged records is sound again.
func (o owned) healed(ctx context.Context, damaged []store.Damaged) bool {
	some := false
	for _, bad := range damaged {
		switch err := o.dispatcher.Heal(ctx, bad.ID); {
		case err == nil:
			some = true // the store says so
		case !errors.Is(err, dispatch.ErrUnknown):
			bad.Err = errors.Join(bad.Err, err)
			fallthrough
		default:
			sayDamaged(o.log, []store.Damaged{bad})
		}
	}
	return some
}

func sayDamaged(log *zap.Logger, damaged []store.Damaged) {
	for _, bad := range damaged {
		log.Error("record is damaged and was set aside; the others go on", zap.String("id", string(bad.ID)), zap.Error(bad.Err))
	}
}
