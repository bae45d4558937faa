# Everything that CI and people run. Builds share one target folder outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/clustermesh/target
export PATH := $(HOME)/.cargo/bin:$(PATH)
KEEP ?= 0
CARGO_DENY_VERSION := 0.20.2
BPF_LINKER_VERSION := 0.13.0

.PHONY: help setup build build-next lint test demo bench clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what a fresh Debian 12 machine with rustup lacks (idempotent)
	@deploy/setup.sh $(BPF_LINKER_VERSION) $(CARGO_DENY_VERSION)

build: ## Build all binaries
	@cargo build --locked --workspace --exclude clustermesh-ebpf-programs --bins

# The agent with another map layout, for the rows that replace one build by another.
build-next: build
	@CARGO_TARGET_DIR=$(CARGO_TARGET_DIR)/layout-next cargo build --locked -p clustermesh-node --features layout-next --bin clustermesh-node

lint: ## Format, clippy, docs, dependency rules
	@cargo fmt --all --check
	@cargo clippy --locked --workspace --exclude clustermesh-ebpf-programs --all-targets -- -D warnings
	@RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --exclude clustermesh-ebpf-programs --no-deps --quiet
	@cargo deny --log-level error check bans licenses sources

test: build build-next ## All tests: unit, property, conformance, and the scenarios in namespaces
	@cargo test --locked --workspace --exclude clustermesh-ebpf-programs

demo: build build-next ## The main job on one machine, as a table (KEEP=1 leaves the lab running)
	@$(CARGO_TARGET_DIR)/debug/clustermesh-demo $(if $(filter 1,$(KEEP)),--keep)

bench: ## Figures against peers, as ratios
	@cargo build --locked --release --workspace --exclude clustermesh-ebpf-programs --bins
	@$(CARGO_TARGET_DIR)/release/clustermesh-bench

clean: ## Remove build output and whatever a killed lab left behind
	@if [ -x $(CARGO_TARGET_DIR)/debug/clustermesh-lab ]; then $(CARGO_TARGET_DIR)/debug/clustermesh-lab clean; fi
	@cargo clean
	@rm -rf bench-results
