package dispatch

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"osbuilder/daemon/internal/job"
	"osbuilder/daemon/internal/vm"
	"osbuilder/pipe"
)

const waitLine = "drops wait, for no VM is ready"

// waitLines returns what was said of drops that wait, without its times.
func waitLines(logs *observer.ObservedLogs) []map[string]any {
	var all []map[string]any
	for _, e := range logs.FilterMessage(waitLine).All() {
		fields := e.ContextMap()
		delete(fields, "since")
		all = append(all, fields)
	}
	return all
}

// While the VM isn't ready the log says each minute how many drops wait, for
// which rung, since when and what to do; while nothing waits, or the VM is
// ready, it says nothing.
func TestEachMinuteTheLogSaysWhyDropsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.cfg.SyncEvery = time.Second
		core, logs := observer.New(zap.InfoLevel)
		b.cfg.Log = zap.New(core)
		d := New(b.cfg, b.unsettled())
		d.Add(b.vm)
		linked := make(chan struct{})
		stop := b.startWith(d, func(ctx context.Context, d *Dispatcher) error {
			select {
			case <-linked:
				return b.link(ctx, d)
			case <-ctx.Done():
				return nil
			}
		})
		defer stop()
		began := time.Now()
		broken := &vm.RungError{Rung: vm.RungUserKey, Err: errors.New("vm:22 refuses user builder")}
		if err := d.Down(t.Context(), "vm", broken); err != nil {
			t.Fatal(err)
		}
		wantLines := func(after time.Duration, want int) {
			t.Helper()
			<-time.After(after)
			synctest.Wait()
			if n := logs.FilterMessage(waitLine).Len(); n != want {
				t.Fatalf("%d lines after %s, want %d", n, time.Since(began), want)
			}
		}
		wantLines(5*time.Minute, 0) // nothing waits

		first, second := b.add("one"), b.add("two")
		for _, j := range b.unsettled() {
			if err := d.do(t.Context(), func(ctx context.Context) error { return d.take(ctx, j.ID) }); err != nil {
				t.Fatal(err)
			}
		}
		wantLines(59*time.Second, 0) // each said for itself
		wantLines(2*time.Second, 1)
		wantLines(time.Minute, 2)
		wantLines(10*time.Minute, 12)
		want := map[string]any{
			"drops": int64(2), "builder": "vm", "rung": "user key", "for": "no link to vm: vm:22 refuses user builder",
			"hint": "the VM doesn't know the sidecar's key; restart the VM so that it takes it: docker compose restart vm",
		}
		if diff := cmp.Diff(want, waitLines(logs)[11]); diff != "" {
			t.Errorf("what the user reads (-want +got):\n%s", diff)
		}
		since, _ := logs.FilterMessage(waitLine).All()[11].ContextMap()["since"].(time.Time)
		if since.Before(began) || since.After(began.Add(2*time.Second)) {
			t.Errorf("since %s, the VM is not ready since %s", since, began)
		}
		for _, j := range b.unsettled() { // what `osbuilder jobs` shows has what to do, too
			if want := "no link to vm: user key: vm:22 refuses user builder; the VM doesn't know the sidecar's key; "; !strings.HasPrefix(j.Why, want) {
				t.Errorf("%s waits for %q, want %q", j.Name, j.Why, want)
			}
		}
		close(linked)
		b.settled(first)
		b.settled(second)
		wantLines(10*time.Minute, 12)
	})
}

// Behind the link, too, there are rungs.
func TestWhyDropsWaitForAVMThatAnswers(t *testing.T) {
	for name, tt := range map[string]struct {
		harm func(*machine)
		want map[string]any
	}{
		"owned by another sidecar": {
			func(m *machine) { m.owner = "somebody"; m.hello() },
			map[string]any{
				"drops": int64(1), "builder": "vm", "rung": "owner", "for": "vm is owned by somebody; set TAKE_OVER=Y to take it over on purpose",
				"hint": "one VM, one sidecar: stop the other one, or set TAKE_OVER=Y once",
			},
		},
		"Nix is broken": {
			func(m *machine) {
				m.unfit = "Nix is broken: nix-daemon closes the connection"
				m.hello()
			},
			map[string]any{
				"drops": int64(1), "builder": "vm", "rung": "nix", "for": "vm builds nothing: Nix is broken: nix-daemon closes the connection",
				"hint": "its console may say more: docker compose logs vm. To start it anew: docker compose restart vm; " +
					"if that does not help, its store is damaged: remove the volume vm-storage, and all is built from new",
			},
		},
		"Nix breaks later, in the same generation": {
			func(m *machine) {
				m.hello()
				m.unfit = "Nix is broken: nobody listens for it"
				m.hello()
			},
			map[string]any{
				"drops": int64(1), "builder": "vm", "rung": "nix", "for": "vm builds nothing: Nix is broken: nobody listens for it",
				"hint": "its console may say more: docker compose logs vm. To start it anew: docker compose restart vm; " +
					"if that does not help, its store is damaged: remove the volume vm-storage, and all is built from new",
			},
		},
		"no answer": {
			func(m *machine) { m.silent, m.hold = pipe.KindJob, true; m.hello() },
			map[string]any{
				"drops": int64(1), "builder": "vm", "rung": "answer", "for": "vm to answer: it left a request unanswered",
				"hint": "its runner stands still; its console: docker compose logs vm",
			},
		},
		"no hello": {
			func(*machine) {},
			map[string]any{
				"drops": int64(1), "builder": "vm", "rung": "hello", "for": "the runner of vm to say hello",
				"hint": "its console says why it doesn't: docker compose logs vm",
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.cfg.SyncEvery = time.Second
				core, logs := observer.New(zap.InfoLevel)
				b.cfg.Log = zap.New(core)
				b.vm.events, b.vm.said = nil, nil
				tt.harm(b.vm)
				id := b.add("one")
				_, stop := b.run()
				defer stop()
				<-time.After(2 * time.Minute)
				synctest.Wait()
				got := waitLines(logs)
				if len(got) == 0 {
					j, err := b.store.Get(t.Context(), id)
					t.Fatalf("no line; the job is %s, waits for %q, %v", j.State, j.Why, err)
				}
				if diff := cmp.Diff(tt.want, got[0]); diff != "" {
					t.Errorf("what the user reads (-want +got):\n%s", diff)
				}
			})
		})
	}
}

// A VM whose Nix is broken gets no job, and the next when it has said that it
// is mended.
func TestBrokenNixGetsNoJob(t *testing.T) {
	b := newBench(t)
	b.vm.unfit = "Nix is broken: nobody listens"
	b.vm.events, b.vm.said = nil, nil
	b.vm.hello()
	id := b.add("one")
	_, stop := b.run()
	defer stop()
	b.until(id, "waiting for Nix", func(j job.Job) bool { return j.Why == "vm builds nothing: Nix is broken: nobody listens" })
	b.vm.mu.Lock()
	if len(b.vm.spool) > 0 {
		t.Error("it got one")
	}
	b.vm.unfit = ""
	b.vm.hello()
	b.vm.mu.Unlock()
	if j := b.settled(id); j.State != job.Done {
		t.Errorf("then it is %s", j.State)
	}
}

// Where one VM is ready, drops wait for a slot of it.
func TestBusyIsReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.cfg.SyncEvery = time.Second
		core, logs := observer.New(zap.InfoLevel)
		b.cfg.Log = zap.New(core)
		b.vm.hold, b.vm.slots = true, 1
		b.vm.events, b.vm.said = nil, nil
		b.vm.hello()
		ids := []job.ID{b.add("one"), b.add("two")} // of one moment: either may be the first
		_, stop := b.run()
		defer stop()
		<-time.After(3 * time.Minute)
		synctest.Wait()
		if got := waitLines(logs); len(got) > 0 {
			t.Errorf("it says %v", got)
		}
		var reasons []string
		for _, id := range ids {
			j, err := b.store.Get(t.Context(), id)
			if err != nil {
				t.Fatal(err)
			}
			reasons = append(reasons, j.Why)
		}
		slices.Sort(reasons)
		if diff := cmp.Diff([]string{"", "a free slot on vm"}, reasons); diff != "" {
			t.Errorf("for what they wait (-want +got):\n%s", diff)
		}
	})
}
