package vm_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"osbuilder/daemon/internal/vm"
	"osbuilder/daemon/internal/vmtest"
	"osbuilder/pipe"

	"go.uber.org/zap"
)

var digest = strings.Repeat("ab", 32)

// whole and half are the two files of an upload.
func whole(r *rig) string { return filepath.Join(r.srv.Dir(), "inputs-"+digest) }
func half(r *rig) string  { return filepath.Join(r.srv.Dir(), ".inputs-"+digest) }

// content is n bytes that tell where they stood.
func content(n int) []byte {
	data := make([]byte, n)
	for i := range data {
		data[i] = byte(i ^ i>>8 ^ i>>16)
	}
	return data
}

// writes hands out data in pieces that fit nothing.
func writes(data []byte) func(io.Writer) error {
	return func(w io.Writer) error {
		for rest := data; len(rest) > 0; {
			n := min(len(rest), 10_007)
			if _, err := w.Write(rest[:n]); err != nil {
				return err
			}
			rest = rest[n:]
		}
		return nil
	}
}

func wantFile(t *testing.T, name string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(name)
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s has %d bytes, want %d: %v", filepath.Base(name), len(got), len(want), err)
	}
}

func absent(t *testing.T, name string) {
	t.Helper()
	if _, err := os.Lstat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", filepath.Base(name), err)
	}
}

func TestUpload(t *testing.T) {
	r, _ := up(t, quick)
	for _, size := range []int{0, 1, 261120, 261121, 1_000_000} {
		data := content(size)
		if err := r.b.Upload(t.Context(), digest, int64(size), false, writes(data)); err != nil {
			t.Fatal(err)
		}
		wantFile(t, whole(r), data)
		absent(t, half(r))
		if err := os.Remove(whole(r)); err != nil {
			t.Fatal(err)
		}
	}
	if r.srv.Requests("fsync@openssh.com") != 5 || r.srv.Requests("posix-rename@openssh.com") != 5 {
		t.Error("not each was synced and renamed")
	}
}

// What is there is left alone, unless it is known to be wrong.
func TestUploadAgain(t *testing.T) {
	r, _ := up(t, quick)
	data := content(300_000)
	other := bytes.Repeat([]byte("x"), len(data))
	if err := os.WriteFile(whole(r), other, 0o600); err != nil {
		t.Fatal(err)
	}
	untouched := func(io.Writer) error { return errors.New("it was asked for") }
	if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, untouched); err != nil {
		t.Error(err)
	}
	wantFile(t, whole(r), other)
	if err := os.WriteFile(half(r), other[:1000], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.b.Upload(t.Context(), digest, int64(len(data)), true, writes(data)); err != nil {
		t.Error(err)
	}
	wantFile(t, whole(r), data)
	absent(t, half(r))
	// Of another size, it is wrong for sure.
	if err := os.WriteFile(whole(r), []byte("short"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data)); err != nil {
		t.Error(err)
	}
	wantFile(t, whole(r), data)
}

func TestUploadGoesOn(t *testing.T) {
	r, _ := up(t, quick)
	data := content(1_000_000)
	for name, begun := range map[string][]byte{
		"half":        data[:400_001],
		"all":         data,
		"nothing":     nil,
		"more":        append(bytes.Clone(data), 1, 2, 3),
		"much longer": content(2_000_000),
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(half(r), begun, 0o600); err != nil {
				t.Fatal(err)
			}
			before := r.srv.Requests("write")
			if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data)); err != nil {
				t.Fatal(err)
			}
			wantFile(t, whole(r), data)
			if n := r.srv.Requests("write") - before; len(begun) == 400_001 && n > 3 {
				t.Errorf("%d writes for the rest", n)
			}
			if err := os.Remove(whole(r)); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// After each fault an upload that is tried again comes to its end.
func TestUploadFailsWhole(t *testing.T) {
	for name, tc := range map[string]struct {
		harm func(*vmtest.Faults)
		says string
		down bool
	}{
		"write":  {func(f *vmtest.Faults) { f.FailWrite = true }, "write ", false},
		"full":   {func(f *vmtest.Faults) { f.Full = true }, "no room on the VM's data disk: 1.0 MB are needed, 0 bytes are free (write ", false},
		"sync":   {func(f *vmtest.Faults) { f.FailFsync = true }, "sync ", false},
		"rename": {func(f *vmtest.Faults) { f.FailRename = true }, "rename ", false},
		"lost":   {func(f *vmtest.Faults) { f.LoseWrites = true }, "came short", false},
		"cut":    {func(f *vmtest.Faults) { f.CutWrites = 300_000 }, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := up(t, quick)
			data := content(1_000_000)
			r.srv.Set(tc.harm)
			err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data))
			if err == nil || errors.Is(err, vm.ErrDown) != tc.down || !strings.Contains(err.Error(), tc.says) || errors.Is(err, vm.ErrFull) != (name == "full") {
				t.Errorf("Upload: %v", err)
			}
			absent(t, whole(r))
			r.srv.Set(func(f *vmtest.Faults) { *f = vmtest.Faults{} })
			if tc.down {
				r.sink.untilUp(t, 2)
			}
			// What went wrong with bytes that are there is for the runner to find.
			if err := r.b.Upload(t.Context(), digest, int64(len(data)), true, writes(data)); err != nil {
				t.Fatal(err)
			}
			wantFile(t, whole(r), data)
		})
	}
}

// Cut again and again, it comes to its end, and no byte is wrong.
func TestUploadOverABadLink(t *testing.T) {
	r, _ := up(t, quick)
	data := content(2_000_000)
	r.srv.Set(func(f *vmtest.Faults) { f.CutWrites = 300_000 })
	tries := 0
	for {
		tries++
		err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data))
		if err == nil {
			break
		}
		if !errors.Is(err, vm.ErrDown) || tries > 20 {
			t.Fatalf("try %d: %v", tries, err)
		}
		r.sink.untilUp(t, tries+1)
	}
	wantFile(t, whole(r), data)
	if tries < 5 {
		t.Errorf("%d tries: the link was not that bad", tries)
	}
}

func TestUploadEnds(t *testing.T) {
	timings := quick
	timings.Stall = 100 * time.Millisecond
	for name, tc := range map[string]struct {
		timings vm.Timings
		want    error
	}{
		"stalled": {timings, vm.ErrStalled},
		"told to": {quick, context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			r, _ := up(t, tc.timings)
			r.srv.Set(func(f *vmtest.Faults) { f.StallWrite = ".inputs-" })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			began := make(chan struct{})
			data := content(1_000_000)
			go func() {
				<-began
				if errors.Is(tc.want, context.Canceled) {
					cancel()
				}
			}()
			err := r.b.Upload(ctx, digest, int64(len(data)), false, func(w io.Writer) error {
				close(began)
				return writes(data)(w)
			})
			if !errors.Is(err, tc.want) {
				t.Errorf("Upload: %v", err)
			}
			absent(t, whole(r))
			r.srv.Set(func(f *vmtest.Faults) { f.StallWrite = "" })
			if errors.Is(tc.want, vm.ErrStalled) {
				// With that little patience a busy machine would stall, too.
				if err := r.end(t); err != nil {
					t.Fatal(err)
				}
				r = start(t, r.srv, newSink(pipe.Position{}), quick)
				r.sink.untilUp(t, 1)
			}
			if err := r.b.Upload(t.Context(), digest, int64(len(data)), true, writes(data)); err != nil {
				t.Error(err)
			}
			wantFile(t, whole(r), data)
		})
	}
}

// Each sync has little to do.
func TestUploadSyncsOnTheWay(t *testing.T) {
	r, _ := up(t, quick)
	data := make([]byte, 64<<20+100_000)
	if err := os.WriteFile(half(r), data[:64<<20-100_000], 0o600); err != nil {
		t.Fatal(err)
	}
	if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data)); err != nil {
		t.Fatal(err)
	}
	wantFile(t, whole(r), data)
	if n := r.srv.Requests("fsync@openssh.com"); n != 2 {
		t.Errorf("%d syncs, want one at 64 MiB and one at the end", n)
	}
}

// The writer's own error is the caller's, and the link stays.
func TestUploadOfWhatCanNotBeRead(t *testing.T) {
	r, _ := up(t, quick)
	gone := errors.New("the source is gone")
	if err := r.b.Upload(t.Context(), digest, 10, false, func(io.Writer) error { return gone }); !errors.Is(err, gone) || errors.Is(err, vm.ErrDown) {
		t.Errorf("Upload: %v", err)
	}
	if err := r.b.Upload(t.Context(), digest, 10, false, writes([]byte("short"))); !errors.Is(err, vm.ErrShort) {
		t.Errorf("Upload: %v", err)
	}
	absent(t, whole(r))
	if err := r.b.Send(t.Context(), []byte("x")); err != nil {
		t.Error(err)
	}
}

func TestUploadWithoutALink(t *testing.T) {
	b := vm.New(vm.Config{}, newSink(pipe.Position{}), zap.NewNop())
	if err := b.Upload(t.Context(), digest, 0, false, writes(nil)); !errors.Is(err, vm.ErrDown) {
		t.Errorf("Upload: %v", err)
	}
}

// With one session allowed, the upload shares it with the events.
func TestUploadWithFewSessions(t *testing.T) {
	srv := vmtest.New(t)
	srv.Set(func(f *vmtest.Faults) { f.MaxSessions = 2 })
	vmtest.NewPipe(t, srv.Dir())
	r := start(t, srv, newSink(pipe.Position{}), quick)
	r.sink.untilUp(t, 1)
	data := content(300_000)
	if err := r.b.Upload(t.Context(), digest, int64(len(data)), false, writes(data)); err != nil {
		t.Fatal(err)
	}
	wantFile(t, whole(r), data)
}
