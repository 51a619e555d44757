package console

import (
	"cmp"
	"errors"
	"fmt"
	"strings"

	"osbuilder/daemon/internal/hint"
)

// What can be seen from outside to keep a VM from answering. Each is wrapped
// with the words of who saw it.
var (
	ErrNoImage   = errors.New("the VM has no image to boot")
	ErrUnusable  = errors.New("the VM's image does not boot")
	ErrPaused    = errors.New("QEMU stopped the VM because its disk can't grow")
	ErrEnded     = errors.New("QEMU does not run")
	ErrNoAddress = errors.New("the VM has no network address")
)

// hints are what to do; $VM is the builder, which is the name of its service.
var hints = map[error]string{
	ErrNoImage: "docker compose logs vmimage says how far its making is, or why it failed; " +
		"to make it (again) and start the VM from it: docker compose up -d",
	ErrUnusable: "the VM's console tells more: docker compose logs $VM. To have the image made anew, remove boot.iso from the volume vm-storage, " +
		"then: docker compose up -d --force-recreate vmimage $VM",
	ErrPaused: "make room on the disk of Docker's volumes (docker system df shows what takes it): the VM goes on by itself then, and so do its jobs",
	ErrEnded:  "all that its container says: docker compose logs $VM",
	ErrNoAddress: "restart the VM: docker compose restart $VM. If that does not help, its network in QEMU is at fault: " +
		"IP in compose.yaml must lie outside of the container's own network",
}

// Trouble returns what keeps the VM from answering, as far as that can be seen
// from outside; nil if nothing is known. It carries a hint. gone says that no
// container of the VM runs: of what one left behind, only why it ended counts
// then, and that less than that the image is being made which the next one
// waits for, but more than that the last try to make it failed: one that ends
// again and again has an image to begin with.
func (c Console) Trouble(gone bool) error {
	word, text := note(c.state)
	if gone {
		making, failed := c.imageTrouble()
		if making != nil {
			return making
		}
		if failed != nil && word != "unusable" && word != "ended" {
			return failed
		}
	}
	switch word {
	case "image":
		return c.trouble(ErrNoImage, text)
	case "unusable":
		return c.trouble(ErrUnusable, text)
	case "ended":
		return c.trouble(ErrEnded, text)
	}
	switch {
	case gone:
		return nil
	case word == "paused":
		return c.trouble(ErrPaused, text)
	case word == "running":
		return c.said()
	}
	making, failed := c.imageTrouble()
	return cmp.Or(making, failed)
}

// imageTrouble is what vmimage says: that it is at work, or that it failed.
func (c Console) imageTrouble() (making, failed error) {
	switch word, text := note(c.image); word {
	case "making":
		return c.trouble(ErrNoImage, "it is being made, "+text), nil
	case "failed":
		return nil, c.trouble(ErrNoImage, text)
	}
	return nil, nil
}

func (c Console) trouble(what error, text string) error {
	todo := strings.ReplaceAll(hints[what], "$VM", c.builder)
	if text != "" {
		return hint.With(fmt.Errorf("%w: %s", what, text), todo)
	}
	return hint.With(what, todo)
}

// signs are what firmware, kernel and the VM's own scripts say on the console
// at turning points; nil: nothing is wrong up to here. The last one counts.
var signs = []struct {
	text string
	what error
}{
	{"No bootable device", ErrUnusable},                // SeaBIOS
	{"No bootable option or device", ErrUnusable},      // OVMF
	{"Boot failed", ErrUnusable},                       // SeaBIOS, and the boot loaders' words
	{"Shell> ", ErrUnusable},                           // OVMF found nothing else
	{"Kernel panic - not syncing", ErrUnusable},        // Linux
	{"Unable to mount root fs", ErrUnusable},           // Linux
	{"Unable to find a medium", ErrUnusable},           // Debian's live-boot
	{"osbuilder: stage 1 of the boot", ErrUnusable},    // NixOS
	{"osbuilder: the VM has no network", ErrNoAddress}, // address, or card
	{"osbuilder: address ", nil},
	{"Linux version ", nil}, // it boots anew
}

// said goes by what the console said last.
func (c Console) said() error {
	lines := c.lines()
	for i := len(lines) - 1; i >= 0; i-- {
		for _, s := range signs {
			if !strings.Contains(lines[i], s.text) {
				continue
			}
			if s.what == nil {
				return nil
			}
			return c.trouble(s.what, lines[i])
		}
	}
	return nil
}
