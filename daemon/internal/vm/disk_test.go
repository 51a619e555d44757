package vm_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"
)

// noted has the VM note at its boot what became of its data disk.
func noted(t *testing.T, srv *vmtest.Server, text string) {
	t.Helper()
	dir := filepath.Join(srv.Dir(), "run")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "store.new"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, "store.new"), filepath.Join(dir, "store")); err != nil {
		t.Fatal(err)
	}
}

// A VM without its data disk would lose what it takes: it is not ready,
// whether its runner runs, in memory, or not. The VM's own words are told.
func TestDataDiskAbsentOrForeign(t *testing.T) {
	for name, test := range map[string]struct {
		note   string
		runner bool
		says   string
	}{
		"absent": {"none: there is none: give QEMU a virtio-blk disk with serial=builderdata\n", false, "the VM has no data disk that it can use: there is none: give QEMU"},
		"foreign": {
			"ephemeral: /dev/vda is neither blank nor the builder's (LABEL=photos TYPE=ext4 ): it was left alone\n", true,
			"the VM has no data disk that it can use: /dev/vda is neither blank nor the builder's (LABEL=photos TYPE=ext4 )",
		},
		"long, and no text": {"none: \xff" + strings.Repeat("x", 1<<20), false, "can use: xxxx"},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			noted(t, srv, test.note)
			if test.runner {
				vmtest.NewPipe(t, srv.Dir())
			}
			r := start(t, srv, newSink(pipe.Position{}), quick)
			err := r.sink.untilRung(t, vm.RungDisk)
			if !errors.Is(err, vm.ErrNoDisk) || len(err.Error()) > 2000 {
				t.Errorf("%d bytes: %.200v", len(err.Error()), err)
			}
			if !test.runner {
				vmtest.NewPipe(t, srv.Dir())
			}
			noted(t, srv, "persistent: /dev/vda\n")
			r.sink.untilUp(t, 1)
			wantLine(t, r.logs, vm.RungDisk, test.says, "remove it, then: docker compose restart vm")
		})
	}
}

// What says nothing of a disk keeps nobody away.
func TestNoNoteOfADisk(t *testing.T) {
	for name, put := range map[string]func(*testing.T, *vmtest.Server){
		"none":         func(*testing.T, *vmtest.Server) {},
		"an empty one": func(t *testing.T, srv *vmtest.Server) { noted(t, srv, "") },
		"at power-off": func(t *testing.T, srv *vmtest.Server) { noted(t, srv, "unmounted\n") },
		"a folder": func(t *testing.T, srv *vmtest.Server) {
			if err := os.MkdirAll(filepath.Join(srv.Dir(), "run", "store"), 0o755); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			srv := vmtest.New(t)
			vmtest.NewPipe(t, srv.Dir())
			put(t, srv)
			r := start(t, srv, newSink(pipe.Position{}), quick)
			r.sink.untilUp(t, 1)
		})
	}
}
