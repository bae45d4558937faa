#!/usr/bin/env bash
# Builds the programs of others that ours are judged by, once per version, into the cache folder, and prints where.
# Usage: build.sh [etcd | wireguard]
set -euo pipefail
cd "$(dirname "$0")"

cache=${CLUSTERMESH_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/clustermesh/peers}

say() { printf 'peers: %s\n' "$*" >&2; }

# Sets `go` to a Go that follows the `go` line of go.mod.
find_go() {
    local wanted platform root
    go=$(command -v go || true)
    [ -n "$go" ] || go=/usr/local/go/bin/go
    [ -x "$go" ] || { say "go not found: run 'make setup', or install Go (https://go.dev/dl)"; exit 2; }
    # Before 1.21 it does not fetch what that line wants; but Go itself is a module like others.
    if ! "$go" version | grep -Eq ' go1\.(2[1-9]|[3-9][0-9])'; then
        wanted=$(awk '$1 == "go" { print $2 }' go.mod)
        platform=$("$go" env GOOS)-$("$go" env GOARCH)
        say "fetching Go $wanted"
        (cd / && "$go" mod download "golang.org/toolchain@v0.0.1-go$wanted.$platform")
        root=$("$go" env GOMODCACHE)/golang.org/toolchain@v0.0.1-go$wanted.$platform
        chmod -R u+w "$root"
        chmod +x "$root"/bin/* "$root"/pkg/tool/*/*
        go=$root/bin/go
        export GOTOOLCHAIN=local
    fi
}

version_of() { awk -v module="$1" '$1 == module { print substr($2, 2); exit }' go.mod; }

# Usage: build FOLDER NAME=PACKAGE...; a folder that exists is complete.
build() {
    local folder=$cache/$1 package
    shift
    if [ ! -d "$folder" ]; then
        say "building $(basename "$folder")"
        find_go
        mkdir -p "$cache"
        made=$(mktemp -d "$cache/.build-XXXXXX")
        trap 'rm -rf "$made"' EXIT
        for package in "$@"; do
            "$go" build -trimpath -buildvcs=false -ldflags='-s -w' -o "$made/${package%%=*}" "${package#*=}"
        done
        chmod 755 "$made"
        # Another build may have been faster; both are equal.
        mv -T "$made" "$folder" 2>/dev/null || rm -rf "$made"
        trap - EXIT
    fi
    printf '%s\n' "$folder"
}

build_etcd() {
    local etcd
    etcd=$(version_of go.etcd.io/etcd/server/v3)
    build "etcd-$etcd" \
        etcd=go.etcd.io/etcd/server/v3 \
        etcdctl=go.etcd.io/etcd/etcdctl/v3 \
        etcdutl=go.etcd.io/etcd/etcdutl/v3
}

build_wireguard() {
    local version=0.7.1
    # A module of its own: it must not choose etcd's dependencies.
    cd wireguard
    build "wireguard-go-$(version_of golang.zx2c4.com/wireguard)" wireguard-go=golang.zx2c4.com/wireguard
    if [ ! -x "$cache/boringtun-$version/bin/boringtun-cli" ]; then
        say "building boringtun-$version"
        made=$(mktemp -d "$cache/.build-XXXXXX")
        trap 'rm -rf "$made"' EXIT
        CARGO_TARGET_DIR=$made/target cargo install --quiet boringtun-cli --version "$version" --locked --root "$made" >&2
        rm -rf "$made/target"
        chmod 755 "$made"
        mv -T "$made" "$cache/boringtun-$version" 2>/dev/null || rm -rf "$made"
        trap - EXIT
    fi
    printf '%s\n' "$cache/boringtun-$version"
}

"build_${1:-etcd}"
