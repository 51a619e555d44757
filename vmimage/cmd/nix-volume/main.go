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
// One at a time: run waits for another one on the same volume, until its
// COMMAND has ended.
//
// It is static and needs nothing that lies in /nix.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

func main() {
	if err := run(context.Background(), os.Args[1:], os.Environ(), os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "nix-volume:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args, env []string, out io.Writer) error {
	nix := nixStore{env: append(env[:len(env):len(env)], "NIX_CONFIG=build-users-group ="), out: out}
	b := bundle{nix: "/nix", register: nix.register, dump: nix.dump}
	switch {
	case len(args) == 2 && args[0] == "pack":
		b.folder = args[1]
		return b.pack(ctx)
	case len(args) > 2 && args[0] == "run":
		b.folder = args[1]
		if _, err := lock(b.at("osbuilder/lock"), os.Stderr); err != nil {
			return err
		}
		filled, err := b.fill(ctx)
		if err != nil {
			return fmt.Errorf("bring the volume on /nix up to this image: %w\n"+
				"Make room, or let it be filled anew: docker compose down, docker volume rm osbuilder_vm-nix (or what it is called here), docker compose up -d", err)
		}
		if filled {
			fmt.Fprintln(out, "nix-volume: the volume on /nix was brought up to this image")
		}
		program, err := exec.LookPath(args[2])
		if err != nil {
			return err
		}
		return fmt.Errorf("run %s: %w", program, syscall.Exec(program, args[2:], env))
	}
	return errors.New("usage: nix-volume pack FOLDER | nix-volume run FOLDER COMMAND…")
}

// lock takes a file's lock, waiting for it. The program that this one becomes,
// and what that one starts, hold it on, so the file isn't closed across exec.
func lock(file string, out io.Writer) (int, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return 0, err
	}
	fd, err := syscall.Open(file, syscall.O_RDWR|syscall.O_CREAT, 0o600)
	if err != nil {
		return 0, &os.PathError{Op: "open", Path: file, Err: err}
	}
	err = syscall.Flock(fd, syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		fmt.Fprintln(out, "nix-volume: waiting for another one, which works in the volume on /nix")
		for err = syscall.EINTR; errors.Is(err, syscall.EINTR); {
			err = syscall.Flock(fd, syscall.LOCK_EX)
		}
	}
	if err != nil {
		return 0, errors.Join(&os.PathError{Op: "lock", Path: file, Err: err}, syscall.Close(fd))
	}
	return fd, nil
}

// nixStore runs nix-store, for root alone in a container: there are no build
// users.
type nixStore struct {
	env []string
	out io.Writer
}

// dump writes what Nix knows of its store to a file.
func (n nixStore) dump(ctx context.Context, file string) error {
	out, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(n.run(ctx, "--dump-db", nil, out), out.Close())
}

// register tells Nix of the store paths in a file that dump wrote.
func (n nixStore) register(ctx context.Context, file string) error {
	in, err := os.Open(file)
	if err != nil {
		return err
	}
	defer in.Close()
	return n.run(ctx, "--load-db", in, n.out)
}

func (n nixStore) run(ctx context.Context, operation string, in io.Reader, out io.Writer) error {
	cmd := exec.CommandContext(ctx, "nix-store", operation)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = n.env, in, out, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("nix-store %s: %w", operation, err)
	}
	return nil
}
