.PHONY: help demo down clean test test-unit lint

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: ## build everything, boot the VM, build one image and say where it lies
	@scripts/demo.sh

down: ## stop; everything is kept
	@scripts/down.sh

clean: ## remove containers, volumes and images of this project
	@scripts/clean.sh

test: ## everything that is tested, with real containers and a real VM
	@scripts/test.sh

test-unit: ## the Go tests alone, with the race detector
	@scripts/checks.sh unit

lint: ## the linters alone
	@scripts/checks.sh lint
