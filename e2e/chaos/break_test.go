//go:build e2e

package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"osbuilder/e2e/internal/harness"
)

// inject makes a fault happen, and ends it.
func (m *machine) inject(ctx context.Context, f Fault) (Injected, error) {
	done := Injected{Break: f.Break, From: time.Now()}
	err := m.breakIt(ctx, f, &done)
	if done.To.IsZero() {
		done.To = time.Now()
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", f.Break, err)
	}
	return done, err
}

func (m *machine) breakIt(ctx context.Context, f Fault, done *Injected) error {
	// A VM that boots is waited for; the fault begins when it is there.
	bash := func(text string) error {
		if _, err := m.agent(ctx, "true"); err != nil {
			return err
		}
		done.From = time.Now()
		_, err := m.agent(ctx, text)
		return err
	}
	switch f.Break {
	case KillSidecar:
		return kill(ctx, m.sidecar)
	case PowerOffVM:
		return kill(ctx, m.vm)
	case ResetVM:
		_, err := m.monitor(ctx, "system_reset")
		return err
	case KillRunner:
		return bash("if [ -e /data/chaos/naive ]; then systemctl kill --signal=KILL chaos-naive; else systemctl kill --kill-whom=main --signal=KILL pipe-runner; fi || true")
	case KillSSHD:
		return bash("pkill -KILL '^sshd' || true")
	case Repeat:
		// As whoever has the key could do it.
		return bash(`cd /nexus_bootstrap && [ ! -f pipe_in ] || setpriv --reuid=builder --regid=builder --clear-groups bash -c 'cp pipe_in .repeat && sync .repeat && mv .repeat pipe_in'`)
	case CutNetwork:
		if _, err := command(ctx, "docker", "network", "disconnect", "--force", m.network, m.sidecar); err != nil {
			return err
		}
		pause(ctx, f.For)
		_, err := command(ctx, "docker", "network", "connect", m.network, m.sidecar)
		return err
	case FillOutput:
		return m.fillOutput(ctx, f.For)
	case FillHost:
		return m.fillHost(ctx, f.For, done)
	case FillData:
		if err := bash(fillData(f)); err != nil {
			return err
		}
		pause(ctx, f.For)
		_, err := m.agent(ctx, "rm -rf /data/chaos/ballast")
		return err
	default:
		return errors.New("unknown fault")
	}
}

// kill ends a container the hard way and starts it again.
func kill(ctx context.Context, container string) error {
	if _, err := command(ctx, "docker", "kill", "--signal", "KILL", container); err != nil {
		return err
	}
	_, err := command(ctx, "docker", "start", container)
	return err
}

// fillData takes all blocks of the VM's data disk: as a job can do it, or,
// every other time, as root, whose own blocks are taken then too.
func fillData(f Fault) string {
	who := ""
	if f.For.Milliseconds()%2 == 1 {
		who = "setpriv --reuid=job-1 --regid=jobs --clear-groups"
	}
	return `install -d -o job-1 /data/chaos/ballast
cd /data/chaos/ballast
size=$(($(stat -f -c '%f * %S' .)))
n=0
while ((size >= 4096)); do
  n=$((n + 1))
  ` + who + ` fallocate -l $size $n 2>/dev/null || size=$((size / 2))
done
true`
}

// fillOutput takes all room of the disk that output/ is on.
func (m *machine) fillOutput(ctx context.Context, d time.Duration) error {
	if os.Getuid() != 0 {
		return nil // it has no disk of its own
	}
	free, err := harness.Fill(ctx, m.p.Output())
	if err != nil {
		return err
	}
	pause(ctx, d)
	return free()
}

// fillHost takes all room of the disk beneath the VM's for d: when there is
// room again the VM must go on by itself.
func (m *machine) fillHost(ctx context.Context, d time.Duration, done *Injected) error {
	if m.storage == "" {
		return nil
	}
	// One that boots is waited for.
	if _, err := m.agent(ctx, "true"); err != nil {
		return err
	}
	done.From = time.Now()
	free, err := m.standStill(ctx)
	if err != nil {
		return err
	}
	pause(ctx, d)
	done.To = time.Now()
	if err := free(); err != nil {
		return err
	}
	return m.status(ctx, "running")
}

// standStill fills the disk beneath the VM's until QEMU stops the VM. There is
// room again when free is called; it returns when the VM did what made it stop.
func (m *machine) standStill(ctx context.Context) (free func() error, err error) {
	// What the VM once used and uses no more, the host still holds: there it could write without asking for room.
	if _, err := m.agent(ctx, "fstrim /data"); err != nil {
		return nil, err
	}
	empty, err := harness.Fill(ctx, m.storage)
	if err != nil {
		return nil, err
	}
	// Jobs may do with what the disk has; this doesn't. Its answer comes when the VM goes on, or not at all.
	stirred := make(chan struct{})
	go func() {
		defer close(stirred)
		_, _ = m.askAgent(ctx, "dd if=/dev/urandom of=/data/chaos/stir bs=1M count=64 conv=fsync status=none; rm -f /data/chaos/stir", 240)
	}()
	free = func() error {
		err := empty()
		<-stirred
		return err
	}
	if err := m.status(ctx, "paused (io-error)"); err != nil {
		return nil, errors.Join(err, free())
	}
	return free, nil
}

// status waits until QEMU says so of the VM.
func (m *machine) status(ctx context.Context, want string) error {
	ctx, cancel := context.WithTimeout(ctx, harness.StepTimeout)
	defer cancel()
	for {
		out, err := m.monitor(ctx, "info status")
		if err == nil && strings.Contains(out, want) {
			return nil
		}
		if pause(ctx, time.Second); ctx.Err() != nil {
			return fmt.Errorf("the VM is not %q within %s: %w: %s", want, harness.StepTimeout, errors.Join(ctx.Err(), err), out)
		}
	}
}

// pause waits for d, or for ctx.
func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
