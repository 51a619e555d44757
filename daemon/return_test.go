package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"osbuilder/daemon/internal/vmtest"
)

// away stops the sidecar, does something, and starts it again.
func (s *sidecar) away(stop *func(), do func()) {
	(*stop)()
	do()
	*stop = s.start()
}

// What the sidecar owned when it was stopped it takes up again: what runs in
// the VM, what waits for a slot, and what was just dropped.
func TestTakenUpAgain(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	stop := s.start()
	defer func() { stop() }()
	var runs []*staged
	for i := range 2 { // all slots there are
		j := s.staged(fmt.Sprint("runs-", i), 2)
		j.let(0)
		runs = append(runs, j)
	}
	s.until("two running jobs", func() bool { return s.said("job started") == 2 })
	waits := s.staged("waits", 1)
	waits.let(0)
	s.until("a job that waits", func() bool { return s.said("job waits") > 0 })
	var dropped *staged
	s.away(&stop, func() {
		dropped = s.staged("dropped", 1)
		dropped.let(0)
		runs[0].let(1) // ends meanwhile
	})
	runs[0].done(2)
	runs[1].let(1)
	runs[1].done(2)
	waits.done(1)
	dropped.done(1)
}

// A download goes on where it stopped.
func TestDownloadTakenUpAgain(t *testing.T) {
	inMemory(t)
	s := newSidecar(t)
	s.hurry()
	const size = 8 << 20
	s.vm.Set(func(f *vmtest.Faults) { f.CutAfter = 2 << 20 })
	stop := s.start()
	defer func() { stop() }()
	s.drop("large.sh", fmt.Sprintf("yes 'not a small image' | head -c %d >\"$OUT/large.iso\" || true\n", size))
	partial := func() (n int64) {
		files, err := filepath.Glob(filepath.Join(s.cfg.Paths.Output, ".partial", "*", "large.iso"))
		if err != nil || len(files) != 1 {
			return 0
		}
		info, err := os.Stat(files[0])
		if err != nil {
			return 0
		}
		return info.Size()
	}
	s.until("a part of the image", func() bool { return partial() > 1<<20 })
	s.away(&stop, func() {
		s.vm.Set(func(f *vmtest.Faults) { f.CutAfter = 0 })
		// What was fetched is not there any more: it is not read again.
		files, err := filepath.Glob(filepath.Join(s.run.Data(), "artifacts", "*", "large.iso"))
		if err != nil || len(files) != 1 {
			t.Fatal(files, err)
		}
		f, err := os.OpenFile(files[0], os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.WriteAt(make([]byte, partial()), 0); err != nil || partial() == size {
			t.Fatal(err, partial())
		}
	})
	status, _, folder := s.outcome("large")
	image, err := os.ReadFile(filepath.Join(folder, "large.iso"))
	want := bytes.Repeat([]byte("not a small image\n"), size/18+1)[:size]
	if status != "succeeded" || err != nil || !bytes.Equal(image, want) {
		t.Errorf("status %s, %d bytes, %v", status, len(image), err)
	}
}

// The VM is reset while the sidecar is away, once or more often: what ran runs
// again, what had ended did so once, and what waited still does.
func TestVMResetWhileAway(t *testing.T) {
	inMemory(t)
	for _, times := range []int{1, 3} {
		t.Run(fmt.Sprint(times), func(t *testing.T) {
			s := newSidecar(t)
			s.hurry()
			stop := s.start()
			defer func() { stop() }()
			ends := s.staged("ends", 2)
			ends.let(0)
			once := filepath.Join(t.TempDir(), "once")
			s.drop("runs.sh", "echo \"try $JOB_ATTEMPT\"\nif mkdir '"+once+"' 2>/dev/null; then sleep 600; fi\n")
			s.until("two running jobs", func() bool {
				_, err := os.Stat(once)
				return err == nil && s.said("job started") == 2
			})
			waits := s.staged("waits", 1)
			waits.let(0)
			s.until("a job that waits", func() bool { return s.said("job waits") > 0 })
			ends.read(1)
			s.away(&stop, func() {
				ends.let(1)
				s.until("an outcome in the VM", func() bool {
					out, err := os.ReadFile(s.out())
					return err == nil && bytes.Contains(out, []byte(`"type":"finished"`))
				})
				for range times {
					s.run.Reboot()
				}
			})
			ends.done(2)
			waits.done(1)
			status, log, folder := s.outcome("runs")
			if want := "try 1\n[osbuilder: attempt 2 begins, attempt 1 did not end]\ntry 2\n"; status != "succeeded" || log != want || result(t, folder).Attempts != 2 {
				t.Errorf("status %s after %d attempts, build.log %q", status, result(t, folder).Attempts, log)
			}
			if n := s.said(asks); n > 0 {
				t.Errorf("asked to repeat %d times", n)
			}
		})
	}
}

// The VM's data disk is replaced while the sidecar is away: the new one
// doesn't know the job, which runs again there, as the next attempt.
func TestDiskReplacedWhileAway(t *testing.T) {
	inMemory(t)
	for name, boots := range map[string]int{"fresh": 0, "booted more often than the old one": 4} {
		t.Run(name, func(t *testing.T) {
			s := newSidecar(t)
			s.hurry()
			stop := s.start()
			defer func() { stop() }()
			once := filepath.Join(t.TempDir(), "once")
			s.drop("runs.sh", "echo \"try $JOB_ATTEMPT\"\nif mkdir '"+once+"' 2>/dev/null; then sleep 600; fi\n")
			s.until("first try", func() bool {
				_, err := os.Stat(once)
				return err == nil && s.said("job started") == 1
			})
			s.away(&stop, func() {
				s.run.Stop()
				s.run.Remove()
				if err := os.Mkdir(s.vm.Dir(), 0o755); err != nil {
					t.Fatal(err)
				}
				s.run.Start()
				for range boots {
					s.run.Reboot()
				}
			})
			status, log, folder := s.outcome("runs")
			r := result(t, folder)
			if status != "succeeded" || r.Attempts != 2 || log == "" {
				t.Errorf("status %s after %d attempts, build.log %q", status, r.Attempts, log)
			}
		})
	}
}
