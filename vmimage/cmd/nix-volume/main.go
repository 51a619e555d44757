// Command nix-volume lets a container keep its Nix store in a volume over /nix
// while its image moves on.
//
// Docker fills an empty volume from the image, once. After an upgrade of the
// image the volume still has the store of the old one, and the new image's
// programs, which are links into the store, lead nowhere: the container could
// not even start a shell. So the image carries its part of the store a second
// time, packed:
//
//	nix-volume pack FOLDER            when the image is built
//	nix-volume run FOLDER COMMAND…    as its entry point: brings the volume up
//	                                  to the image if need be, then becomes COMMAND
//
// It is static and needs nothing that lies in /nix.
package main

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "nix-volume:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	b := bundle{nix: "/nix", register: register, dump: dump}
	switch {
	case len(args) == 2 && args[0] == "pack":
		b.folder = args[1]
		return b.pack()
	case len(args) > 2 && args[0] == "run":
		b.folder = args[1]
		filled, err := b.fill()
		if err != nil {
			return fmt.Errorf("bring the volume on /nix up to this image: %w\n"+
				"Make room, or let it be filled anew: docker compose down, docker volume rm osbuilder_vm-nix (or what it is called here), docker compose up -d", err)
		}
		if filled {
			fmt.Println("nix-volume: the volume on /nix was brought up to this image")
		}
		program, err := exec.LookPath(args[2])
		if err != nil {
			return err
		}
		return fmt.Errorf("run %s: %w", program, syscall.Exec(program, args[2:], os.Environ()))
	}
	return fmt.Errorf("usage: nix-volume pack FOLDER | nix-volume run FOLDER COMMAND…")
}

// dump writes what Nix knows of its store to a file.
func dump(file string) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	defer out.Close()
	cmd := nixStore("--dump-db")
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nix-store --dump-db: %w", err)
	}
	return out.Close()
}

// register tells Nix of the store paths in a file that dump wrote.
func register(file string) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	cmd := nixStore("--load-db")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nix-store --load-db: %w", err)
	}
	return nil
}

// nixStore is for root alone in a container: there are no build users.
func nixStore(args ...string) *exec.Cmd {
	cmd := exec.Command("nix-store", args...)
	cmd.Env = append(os.Environ(), "NIX_CONFIG=build-users-group =")
	return cmd
}
