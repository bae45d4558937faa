#!/usr/bin/env bash
# Fetches and builds the test suites of etcd's clients, unmodified, once per version, into the cache folder:
#   etcd-client-VERSION/bin/   test programs of the Rust crate etcd-client
#   etcd3-VERSION/             source of the Python package etcd3, with a Python of its own in venv/
set -euo pipefail

cache=${CLUSTERMESH_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/clustermesh/peers}
etcd_client=0.21.1
etcd3=0.12.0
# The newest that etcd3's tests work with.
python_packages=(protobuf==3.20.3 hypothesis==5.39.0 tenacity==6.3.1 pytest==7.4.4 mock==5.2.0 six==1.17.0 grpcio==1.85.1)

say() { printf 'suites: %s\n' "$*" >&2; }

made=
trap 'rm -rf "$made"' EXIT
begin() { mkdir -p "$cache"; made=$(mktemp -d "$cache/.suite-XXXXXX"); chmod 755 "$made"; }
finish() { mv -T "$made" "$1"; made=; }

folder=$cache/etcd-client-$etcd_client
if [ ! -d "$folder" ]; then
    say "building the tests of etcd-client $etcd_client"
    begin
    mkdir "$made/fetch" "$made/bin"
    printf '[package]\nname = "fetch"\nversion = "0.0.0"\nedition = "2024"\n[lib]\npath = "lib.rs"\n[dependencies]\netcd-client = "=%s"\n[workspace]\n' \
        "$etcd_client" >"$made/fetch/Cargo.toml"
    touch "$made/fetch/lib.rs"
    (cd "$made/fetch" && cargo vendor --quiet --versioned-dirs vendor >/dev/null)
    mv "$made/fetch/vendor/etcd-client-$etcd_client" "$made/source"
    (cd "$made/source" && CARGO_TARGET_DIR="$made/target" cargo test --quiet --locked --no-run --tests --message-format=json) |
        sed -n 's/.*"target":{[^}]*"kind":\["test"\][^}]*"name":"\([a-z_]*\)".*"executable":"\([^"]*\)".*/\1 \2/p' |
        while read -r name program; do cp "$program" "$made/bin/$name"; done
    [ -x "$made/bin/client" ] || { say "no test program was built"; exit 1; }
    rm -rf "$made/fetch" "$made/target"
    finish "$folder"
fi
printf '%s\n' "$folder"

folder=$cache/etcd3-$etcd3
if [ ! -d "$folder" ]; then
    say "fetching etcd3 $etcd3"
    begin
    # A virtual environment knows its own path: it is made where it stays.
    python3 -m venv "$folder.venv"
    "$folder.venv/bin/pip" install --quiet --disable-pip-version-check "${python_packages[@]}"
    "$folder.venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
        --no-binary :all: --dest "$made" "etcd3==$etcd3"
    tar -xzf "$made/etcd3-$etcd3.tar.gz" -C "$made" --strip-components 1
    finish "$folder"
fi
printf '%s\n' "$folder"
