.PHONY: help demo down clean test test-long chaos bench test-unit soak fuzz lint vm-iso check-nixos boot-nixos prove-nixos

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: ## build everything, boot the VM, build one image and say where it lies
	@scripts/demo.sh

down: ## stop; everything is kept
	@scripts/down.sh

clean: ## remove containers, volumes and images of this project
	@scripts/clean.sh

test: ## the tests, with real containers and a real VM
	@scripts/test.sh

test-long: ## what takes too long for make test: an hour and more
	@scripts/test-long.sh

chaos: ## jobs while everything under them is broken at random; SEED=1 JOBS=200 CONTROL=naive
	@scripts/chaos.sh

test-unit: ## the Go tests alone, with the race detector
	@scripts/checks.sh unit

bench: ## jobs a minute, JOBS=100, in one process and through the VM, beside the naive loop
	@scripts/bench.sh

soak: ## small jobs at speed for MINUTES=60: memory, goroutines, descriptors and files must not grow
	@scripts/checks.sh soak

fuzz: ## each fuzz test for FUZZTIME=60s; ONLY="FuzzParse FuzzRecord" for some
	@scripts/checks.sh fuzz

lint: ## all linters; make test has those that are quick
	@scripts/checks.sh lint

vm-iso: ## make the NixOS VM's boot.iso into a folder, TO=vm-iso; needs a registry and a Nix cache
	@scripts/vm-iso.sh

check-nixos: ## evaluate the NixOS VM on the nixpkgs tree NIXPKGS=/path, for both processors
	@scripts/check-nixos.sh

boot-nixos: ## build and boot the NixOS VM from the nixpkgs tree NIXPKGS=/path, with Debian's binaries
	@scripts/boot-nixos.sh

prove-nixos: ## all of it with a Nix cache; writes docs/proof/prove-nixos.md
	@scripts/prove-nixos.sh
