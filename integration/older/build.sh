#!/usr/bin/env bash
# Builds the server as it was at a pinned commit, once, into the cache folder, and prints the path of the program.
# Rolling upgrades are tested from it; the commit is raised when a release no longer supports upgrades from it.
set -euo pipefail
cd "$(dirname "$0")"

commit=d58e4b42685f8ddd445251fdb05878ad2972904d

cache=${CLUSTERMESH_OLDER:-${XDG_CACHE_HOME:-$HOME/.cache}/clustermesh/older}
program=$cache/${commit:0:12}/clustermesh-server

say() { printf 'older: %s\n' "$*" >&2; }

if [ ! -x "$program" ]; then
    if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
        say "commit $commit is not in this clone: it is shallow, or not of this repository."
        say "git fetch --unshallow, or: git fetch origin $commit"
        exit 2
    fi
    say "building the server of ${commit:0:12}"
    mkdir -p "$cache"
    # Two builds at once would do the same work twice.
    exec 9>"$cache/.lock"
    flock 9
    if [ ! -x "$program" ]; then
        made=$(mktemp -d "$cache/.build-XXXXXX")
        trap 'rm -rf "$made"' EXIT
        git -C "$(git rev-parse --show-toplevel)" archive "$commit" | tar -x -C "$made"
        # A folder of its own: the workspace's build must not find the older one's program in its place.
        (cd "$made" && CARGO_TARGET_DIR=$made/target CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=0 \
            cargo build --locked --quiet -p clustermesh-server --bin clustermesh-server >&2)
        mkdir -p "$(dirname "$program")"
        mv "$made/target/debug/clustermesh-server" "$program.new"
        mv "$program.new" "$program"
    fi
fi
printf '%s\n' "$program"
