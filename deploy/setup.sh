#!/usr/bin/env bash
# Installs what building and running the lab needs on Debian 12. Does nothing where all is there.
set -euo pipefail
bpf_linker_version=$1
cargo_deny_version=$2

say() { printf 'setup: %s\n' "$*" >&2; }

[ "$(id -u)" = 0 ] || { say "run as root (apt packages are missing or to be checked)"; exit 2; }
command -v cargo >/dev/null || { say "cargo not found: install rustup first (https://rustup.rs)"; exit 2; }

packages=(build-essential curl iproute2 iputils-ping ethtool tcpdump tshark iperf3 nftables iptables bpftool procps util-linux
    wireguard-tools
    protobuf-compiler libprotobuf-dev python3-venv)
# The kernel programs need a compiler with the sources of core. A rustup nightly with rust-src does as well.
nightly_src=$(rustup run nightly rustc --print sysroot 2>/dev/null || true)
if [ -z "$nightly_src" ] || [ ! -d "$nightly_src/lib/rustlib/src/rust/library" ]; then
    packages+=(rustc-web cargo-web rust-web-src)
fi

# Debian's Go is too old for the peers' modules and fetches the right one (integration/peers/build.sh).
if ! command -v go >/dev/null && [ ! -x /usr/local/go/bin/go ]; then
    packages+=(golang-go ca-certificates)
fi

missing() {
    local package
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || printf '%s ' "$package"
    done
}
read -r -a wanted <<<"$(missing "${packages[@]}")"
if [ ${#wanted[@]} -gt 0 ]; then
    say "apt: ${wanted[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
fi

if [ "$(bpf-linker --version 2>/dev/null | awk '{print $2}')" != "$bpf_linker_version" ]; then
    # bpf-linker must link against the LLVM of the compiler that builds the programs.
    compiler=/usr/bin/rustc
    [ -x "$compiler" ] || compiler="$(rustup which rustc --toolchain nightly)"
    llvm=$("$compiler" -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
    say "bpf-linker $bpf_linker_version for LLVM $llvm"
    read -r -a wanted <<<"$(missing "llvm-$llvm-dev")"
    if [ ${#wanted[@]} -gt 0 ]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${wanted[@]}" >/dev/null
    fi
    # A target folder of its own: `make clean` must not cost the tools.
    CARGO_TARGET_DIR= PATH=/usr/lib/llvm-$llvm/bin:$PATH LLVM_PREFIX=/usr/lib/llvm-$llvm \
        env -u CARGO_TARGET_DIR cargo install --quiet bpf-linker --version "$bpf_linker_version" \
        --no-default-features --features "llvm-$llvm" --locked
fi

if [ "$(cargo-deny --version 2>/dev/null | awk '{print $2}')" != "$cargo_deny_version" ]; then
    say "cargo-deny $cargo_deny_version"
    env -u CARGO_TARGET_DIR cargo install --quiet cargo-deny --version "$cargo_deny_version" --locked --no-default-features
fi
say "everything needed is installed"
