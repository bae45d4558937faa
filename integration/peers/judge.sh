#!/usr/bin/env bash
# Runs the test suites of etcd's clients, unmodified, against a group in a network namespace of its own (the suites want
# localhost:2379, in clear), and prints one line for each test: outcome, suite, test. Root.
#
# Usage: judge.sh etcd|ours REPLICAS [TABLE]; with a table: fails when the outcome is another one, UPDATE=1 writes it.
set -euo pipefail
table=${3:+$(realpath -m "$3")}
cd "$(dirname "$0")"
whose=${1:?etcd or ours}
replicas=${2:?REPLICAS is 1 or 3}

cache=${CLUSTERMESH_PEERS:-${XDG_CACHE_HOME:-$HOME/.cache}/clustermesh/peers}
programs=${CARGO_TARGET_DIR:-$HOME/.cache/clustermesh/target}/debug
if [ "$whose" = ours ] && [ ! -x "$programs/clustermesh-server" ]; then
    echo "$programs/clustermesh-server is missing: run 'make build'" >&2
    exit 2
fi
etcd=$(./build.sh)
mapfile -t suites < <(./suites.sh)
folder=$(mktemp -d)
netns=cm-judge-$$
pids=()

clean() {
    stop
    ip netns del "$netns" 2>/dev/null || true
    rm -rf "$folder"
}
trap clean EXIT

ip netns add "$netns"
ip -n "$netns" link set lo up
inside() { ip netns exec "$netns" "$@"; }

stop() {
    local pid
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; wait "$pid" 2>/dev/null || true; done
    pids=()
}

ctl() { inside "$etcd/etcdctl" --command-timeout=2s "$@" >/dev/null 2>&1; }

start_etcd() {
    local number=$1 address=127.0.0.$(($1 + 1)) other cluster=
    for ((other = 0; other < replicas; other++)); do
        cluster+=${cluster:+,}pifpaf$other=http://127.0.0.$((other + 1)):2380
    done
    ip netns exec "$netns" "$etcd/etcd" --name "pifpaf$number" --log-level error --unsafe-no-fsync \
        --data-dir "$folder/member-$number" --auth-token-ttl 2 \
        --listen-client-urls "http://$address:2379" --advertise-client-urls "http://$address:2379" \
        --listen-peer-urls "http://$address:2380" --initial-advertise-peer-urls "http://$address:2380" \
        --initial-cluster "$cluster" >"$folder/log-$number" 2>&1 &
}

start_ours() {
    local number=$1 address=127.0.0.$(($1 + 1)) other cluster=
    for ((other = 0; other < replicas; other++)); do
        cluster+=${cluster:+, }\"pifpaf$other=https://127.0.0.$((other + 1)):2380\"
    done
    cat >"$folder/server-$number.toml" <<CONFIG
data_dir = "$folder/member-$number"
listen_client = "$address:12379"
listen_client_clear = "$address:2379"
listen_admin = "$address:9962"
auth_token_ttl_seconds = 2
[tls]
ca = "$folder/pki/ca.crt"
cert = "$folder/pki/judged/server.crt"
key = "$folder/pki/judged/server.key"
[replica]
name = "pifpaf$number"
listen_peer = "$address:2380"
client_urls = ["http://$address:2379"]
initial_cluster = [$cluster]
CONFIG
    # The Python suite looks for etcd's option in the list of processes.
    ip netns exec "$netns" bash -c 'exec -a "clustermesh-server --name $2" "$0" --config "$1"' \
        "$programs/clustermesh-server" "$folder/server-$number.toml" "pifpaf$number" >"$folder/log-$number" 2>&1 &
}

certificates() {
    local number sans=()
    for ((number = 0; number < replicas; number++)); do sans+=(--san "127.0.0.$((number + 1))"); done
    "$programs/clustermesh" dev-ca init --dir "$folder/pki" >/dev/null
    "$programs/clustermesh" dev-ca issue server server --cluster judged --dir "$folder/pki" \
        --out "$folder/pki/judged" "${sans[@]}" >/dev/null
}

# A group without any key, whose first member leads. The names are those that the Python suite looks for; a token must
# not live longer than the Rust suite waits.
start() {
    local number attempt
    rm -rf "$folder"/member-*
    for ((number = 0; number < replicas; number++)); do
        "start_$whose" "$number"
        pids+=($!)
    done
    for ((attempt = 0; ; attempt++)); do
        ctl endpoint health --cluster && break
        [ "$attempt" -lt 30 ] || { cat "$folder"/log-* >&2; exit 1; }
        sleep 0.2
    done
    # Columns: endpoint, id, …, whether it leads.
    first=$(inside "$etcd/etcdctl" endpoint status | awk -F', ' '$9 == "false" { print $2 }')
    [ -z "$first" ] || ctl move-leader "$first" --endpoints="$(seq -s, -f 127.0.0.%g:2379 "$replicas")"
}

# The tests change users: each program by itself, one test at a time.
rust_suite() {
    local program=$1
    shift
    inside "$program" --test-threads=1 "$@" 2>&1 |
        sed -nE "s/^test ([a-z_0-9:]+) \.\.\. (ok|FAILED|ignored).*/\2 etcd-client \1/p"
}

[ "$whose" = etcd ] || certificates
results=$folder/results
{
    start
    ctl user add root --new-user-password=rootpwd
    ctl user grant-role root root
    for program in "${suites[0]}"/bin/{client,namespace}; do rust_suite "$program" || true; done
    # Ignored because they want etcd 3.7: that is what they get.
    rust_suite "${suites[0]}/bin/client" --ignored test_get_stream || true
    stop
    if [ "$replicas" = 3 ]; then
        start
        # test_snapshot wants the output of an etcdctl of old.
        (cd "${suites[1]}" && inside env PATH="$etcd:$PATH" PYTHONPATH="${suites[1]}/etcd3" \
            TEST_ETCD_VERSION=v3.7.3 "${suites[1]}.venv/bin/python" -m pytest -v --tb=no -p no:cacheprovider \
            -p no:warnings --deselect tests/test_etcd3.py::TestEtcd3::test_snapshot tests/test_etcd3.py 2>&1) |
            sed -nE 's/^tests\/test_etcd3\.py::([A-Za-z0-9_:]+) (PASSED|FAILED|ERROR).*/\2 etcd3 \1/p' || true
    fi
} >"$results.raw"
sed -e 's/^PASSED/ok/' -e 's/^ERROR/FAILED/' "$results.raw" >"$results"
# A test that was ignored first and run then counts as run.
awk '{ key = $2 " " $3 } { if (!(key in best) || best[key] == "ignored" || $1 == "FAILED") best[key] = $1 } END { for (key in best) print best[key], key }' \
    "$results" | LC_ALL=C sort -k2,2 -k3,3 >"$results.table"
if [ -z "$table" ]; then
    cat "$results.table"
elif [ -n "${UPDATE:-}" ]; then
    cp "$results.table" "$table"
else
    diff -u "$table" "$results.table" || { echo "the results are not those of $table; where they are right, UPDATE=1 writes them" >&2; exit 1; }
fi
