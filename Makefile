# Everything that CI and people run. Builds share one target folder outside the checkout.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/clustermesh/target
export PATH := $(HOME)/.cargo/bin:$(PATH)
KEEP ?= 0
CARGO_DENY_VERSION := 0.20.2
BPF_LINKER_VERSION := 0.13.0

.PHONY: bench-encryption help setup peers build lint test differential fuzz sim faults power judges judged-1 judged-3 demo kernels bench bench-store soak clean

help: ## Show the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Install what a fresh Debian 12 machine with rustup lacks (idempotent)
	@deploy/setup.sh $(BPF_LINKER_VERSION) $(CARGO_DENY_VERSION)
	@integration/peers/build.sh >/dev/null
	@integration/peers/build.sh wireguard >/dev/null
	@integration/older/build.sh >/dev/null

peers: ## Build the programs of others that ours are compared with (etcd)
	@integration/peers/build.sh
	@integration/peers/build.sh wireguard

WORKSPACE := --locked --workspace --exclude clustermesh-ebpf-programs

# First the agent with another map layout, for what is checked of replacing one build by another; it shares
# everything but the crates that know the layout, and is put aside before the normal build takes its place.
build: ## Build all binaries
	@cargo build $(WORKSPACE) --features clustermesh-node/layout-next --bin clustermesh-node
	@mkdir -p $(CARGO_TARGET_DIR)/debug/layout-next
	@cp $(CARGO_TARGET_DIR)/debug/clustermesh-node $(CARGO_TARGET_DIR)/debug/layout-next/
	@cargo build $(WORKSPACE) --bins

lint: ## Format, clippy, docs, dependency rules
	@cargo fmt --all --check
	@cargo clippy $(WORKSPACE) --all-targets -- -D warnings
	@cargo clippy --locked -p clustermesh-ebpf-programs --profile ebpf -- -D warnings
	@RUSTDOCFLAGS="-D warnings" cargo doc $(WORKSPACE) --no-deps --quiet
	@cargo deny --log-level error check -D unnecessary-skip -D unmatched-skip bans licenses sources

# Scenarios wait for most of their time: they run side by side with what computes, the longest begin first. Each test
# target is one of make's too (`make test-nodes`); new ones are found by where they lie.
TEST_JOBS ?= 4
TEST_FILES := $(wildcard $(foreach folder,* */*,$(folder)/tests/*.rs $(folder)/tests/*/main.rs))
FOUND := $(addprefix test-,$(filter-out mutants,$(notdir $(basename $(patsubst %/main.rs,%.rs,$(TEST_FILES))))))
LONG := test-encrypted test-encryption test-faults judged-3 judged-1 test-packet_path test-loader test-continuity unit-tests \
	test-server test-demo test-devices test-seeds mutant-tests
TESTS = $(LONG) $(filter-out $(LONG),$(sort $(FOUND))) doc-tests
.PHONY: $(sort $(FOUND)) unit-tests doc-tests mutant-tests
test: setup build ## All tests: unit, property, conformance, and the scenarios in namespaces (TEST_JOBS=4)
	@cargo build --quiet --locked -p clustermesh-sim --features mutants --test mutants
	@cargo test --quiet $(WORKSPACE) --no-run
	@$(MAKE) --no-print-directory -k -j$(TEST_JOBS) -Otarget WHOSE=ours $(TESTS)

$(sort $(FOUND)): test-%:
	@cargo test $(WORKSPACE) --test $*

unit-tests:
	@cargo test $(WORKSPACE) --lib --bins

doc-tests:
	@cargo test --quiet $(WORKSPACE) --doc

mutant-tests:
	@cargo test --locked -p clustermesh-sim --features mutants --test mutants

differential: setup build ## Random operations on etcd and on ours, answers compared (SEEDS=n, or SEED=n again)
	@$(if $(SEED),SEED=$(SEED)) SEEDS=$(or $(SEEDS),50) cargo test --locked -p clustermesh-integration --test differential -- --nocapture

sim: ## Simulated groups of replicas, seed after seed (SEEDS=1000 SEED=1 STEPS=60 JOBS=all processors)
	@cargo build --locked --release -p clustermesh-sim
	@$(CARGO_TARGET_DIR)/release/clustermesh-sim --seed $(or $(SEED),1) --seeds $(or $(SEEDS),1000) --steps $(or $(STEPS),60) $(if $(JOBS),--jobs $(JOBS))

faults: setup build ## Faults under load with real processes (ONLY=leader_alone: one scenario)
	@cargo test --locked -p clustermesh-integration --test faults -- --nocapture $(ONLY)

power: ## Power cuts under the Raft log on a FUSE disk (CUTS=1000 SEED=1)
	@cargo build --locked -p clustermesh-power
	@$(CARGO_TARGET_DIR)/debug/clustermesh-power cuts --cuts $(or $(CUTS),1000) --seed $(or $(SEED),1)

WHOSE ?= ours
judges: setup build ## The test suites of etcd's clients, against ours (WHOSE=etcd: what etcd itself comes to)
	@$(MAKE) --no-print-directory -j2 judged-1 judged-3

judged-1 judged-3: judged-%:
	@integration/peers/judge.sh $(WHOSE) $* integration/peers/judged-$(WHOSE)-$*.table

fuzz: ## Random inputs for everything that reads bytes of others (TARGET=name, otherwise all; SECONDS=60 for each)
	@for target in $(or $(TARGET),$(notdir $(wildcard fuzz/corpus/*))); do fuzz/run.sh $$target $(or $(SECONDS),60); done

demo: setup build ## The main job on one machine, as a table (KEEP=1 leaves the lab running)
	@$(CARGO_TARGET_DIR)/debug/clustermesh-demo $(if $(filter 1,$(KEEP)),--keep)

KERNELS ?= 5.10 6.1 6.12
kernels: ## Kernel programs and WireGuard devices on other kernels, in VMs (KERNELS="6.1 6.12" ONLY=conformance); not part of test
	@$(if $(ONLY),ONLY=$(ONLY)) integration/kernels/check $(KERNELS)

bench: setup ## Figures against peers, as ratios
	@cargo build $(WORKSPACE) --release --bins
	@$(CARGO_TARGET_DIR)/release/clustermesh-bench

REPLICAS ?= 3
ROUNDS ?= 3
STORE_BINS := cargo build --locked --release -p clustermesh-server -p clustermesh-cli -p clustermesh-integration --bins
bench-store: setup ## The store against etcd, as ratios (REPLICAS=1 or 3, ROUNDS=3, ONLY=put-64,get-lin)
	@integration/peers/debian.sh
	@$(STORE_BINS)
	@$(CARGO_TARGET_DIR)/release/clustermesh-bench-store --replicas $(REPLICAS) --rounds $(ROUNDS) $(if $(ONLY),--only $(ONLY))

soak: setup ## Disk and memory of the store over many puts on the same keys (PUTS=10000000)
	@$(STORE_BINS)
	@$(CARGO_TARGET_DIR)/release/clustermesh-soak --puts $(or $(PUTS),10000000)

bench-encryption: setup ## Our WireGuard device against wireguard-go and boringtun, as ratios (ROUNDS=5, ONLY=wg-go,wg-rotate)
	@cargo build $(WORKSPACE) --release --bins
	@$(CARGO_TARGET_DIR)/release/clustermesh-bench-encryption $(if $(filter-out file,$(origin ROUNDS)),--rounds $(ROUNDS)) $(if $(ONLY),--only $(ONLY))

clean: ## Remove build output and whatever a killed lab left behind
	@if [ -x $(CARGO_TARGET_DIR)/debug/clustermesh-lab ]; then $(CARGO_TARGET_DIR)/debug/clustermesh-lab clean; fi
	@cargo clean
	@rm -rf bench-results
