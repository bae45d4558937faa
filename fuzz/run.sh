#!/usr/bin/env bash
# Runs one fuzz target for some seconds: run.sh TARGET SECONDS. New inputs are kept beside the build; one that fails is printed with its path.
set -euo pipefail
target=${1:?"usage: run.sh TARGET SECONDS"}
seconds=${2:-60}
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
out=${CARGO_TARGET_DIR:-$HOME/.cache/clustermesh/target}/fuzz-inputs/$target
mkdir -p "$out/inputs" "$out/failed"
# Coverage as libFuzzer reads it; with --target it is not asked of build scripts and macros.
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares"
RUSTFLAGS="$flags" cargo build --locked --quiet --profile fuzz --target "$host" -p clustermesh-fuzz --features libfuzzer --bin clustermesh-fuzz
committed=fuzz/corpus/$target
[ -d "$committed" ] || committed=
FUZZ_TARGET=$target FUZZ_SEEDS=$out/inputs \
    "${CARGO_TARGET_DIR:-$HOME/.cache/clustermesh/target}/$host/fuzz/clustermesh-fuzz" \
    "$out/inputs" $committed -artifact_prefix="$out/failed/" \
    -max_total_time="$seconds" -max_len=4096 -timeout=10 -rss_limit_mb=2048 -print_final_stats=1
