//! A case for every command of etcdctl.
//!
//! Left out: `check perf` and `check datascale` (a minute of load, judged by speed), `version`, `options`, `help` and
//! `completion` (they call no server).

use super::{Case, Step};

fn run(arguments: &str) -> Step {
    run_with(arguments, "")
}

fn run_with(arguments: &str, input: &'static str) -> Step {
    Step::Run {
        arguments: arguments.to_owned(),
        input,
        form_only: false,
    }
}

fn form(arguments: &str) -> Step {
    Step::Run {
        arguments: arguments.to_owned(),
        input: "",
        form_only: true,
    }
}

fn lines(arguments: &str, input: &'static str, lines: usize) -> Step {
    Step::Lines {
        arguments: arguments.to_owned(),
        input,
        lines,
    }
}

fn poll(arguments: &str, lines: usize) -> Step {
    Step::Poll {
        arguments: arguments.to_owned(),
        lines,
    }
}

fn case(name: &'static str, steps: Vec<Step>) -> Case {
    Case { name, steps }
}

/// All cases, in the order in which they run.
#[must_use]
pub fn all() -> Vec<Case> {
    let mut all = keys();
    // Lease ids that servers choose are part of later hashes.
    all.push(hashes());
    all.extend(leases());
    all.extend(cluster());
    all.extend(access());
    all
}

fn keys() -> Vec<Case> {
    vec![
        case(
            "put",
            vec![
                run("put k v1"),
                run("put k v2 --prev-kv"),
                run("put k --ignore-value"),
                run("put k v3 -w json"),
                run("put k v3 -w fields"),
                run_with("put k", "from standard input"),
                run("put none --ignore-value"),
                run("put k v --lease=123456789abc"),
                run("put '' v"),
                run("del k"),
            ],
        ),
        case(
            "get",
            vec![
                run("put g/1 one"),
                run("put g/2 two"),
                run("put g/3 three"),
                run("put g/2 two-again"),
                run("get g/1"),
                run("get g/1 -w json"),
                run("get g/1 -w fields"),
                run("get g/1 --hex"),
                run("get g/ --prefix"),
                run("get g/ --prefix --keys-only"),
                run("get g/ --prefix --print-value-only"),
                run("get g/ --prefix --count-only -w fields"),
                run("get g/ --prefix --limit=2"),
                run("get g/1 g/3"),
                run("get g/2 --from-key"),
                run("get g/ --prefix --sort-by=modify --order=descend"),
                run("get g/ --prefix --sort-by=value --order=ascend"),
                run("get g/ --prefix --consistency=s"),
                run("get g/ --prefix --min-mod-rev=3"),
                run("get g/ --prefix --rev=100000"),
                run("get nothing"),
                run("del g/ --prefix"),
            ],
        ),
        case(
            "del",
            vec![
                run("put d/1 one"),
                run("put d/2 two"),
                run("put d/3 three"),
                run("del d/1 --prev-kv"),
                run("del d/2 d/3"),
                run("del d/ --prefix -w json"),
                run("put d/9 nine"),
                run("del d/ --from-key"),
                run("del ''"),
            ],
        ),
        case(
            "txn",
            vec![
                run_with(
                    "txn",
                    "version(\"t\") = \"0\"\n\nput t created\n\nput t changed\n\n",
                ),
                run_with(
                    "txn",
                    "value(\"t\") = \"created\"\n\nput t changed\nget t\n\nget t\n\n",
                ),
                run_with(
                    "txn -w json",
                    "mod(\"t\") > \"1\"\n\ndel t\n\nget t\n\n",
                ),
                run_with("txn", "\nput t a\nput t b\n\n\n"),
            ],
        ),
        case(
            "watch",
            vec![
                run("put w/1 one -w json"),
                run("put w/1 two"),
                run("del w/1"),
                lines("watch w/1 --rev=2", "", 1),
                lines("watch w/ --prefix --prev-kv --rev=1", "", 9),
                lines("watch -i", "watch w/ --prefix --rev=1\n", 8),
                lines("watch w/1 --rev=1 -w json", "", 1),
            ],
        ),
        case(
            "compaction",
            vec![
                run("put c 1"),
                run("put c 2"),
                run("put c 3"),
                run("compaction 4"),
                run("compaction 4"),
                run("compaction 100000"),
                run("get c --rev=2"),
                run("watch c --rev=2"),
                run("compaction 5 --physical"),
                run("del c"),
            ],
        ),
        case(
            "make-mirror",
            vec![
                run("put from/1 one"),
                run("put from/2 two"),
                Step::Background {
                    arguments: "make-mirror {endpoint} --prefix from/ --dest-prefix to/ --dest-cacert {ca} --dest-cert {cert} --dest-key {key}".to_owned(),
                },
                poll("get to/ --prefix", 4),
                run("put from/3 three"),
                poll("get to/ --prefix", 6),
            ],
        ),
    ]
}

fn hashes() -> Case {
    case(
        "endpoint hashkv",
        vec![
            run("put h/1 one"),
            run("put h/2 two"),
            run("endpoint hashkv -w json"),
            run("del h/1"),
            run("endpoint hashkv -w fields"),
            run("compaction 8"),
            run("endpoint hashkv -w json"),
            run("endpoint hashkv --rev=9 -w json"),
            run("endpoint hashkv --rev=3 -w json"),
        ],
    )
}

fn leases() -> Vec<Case> {
    vec![
        case(
            "lease grant, timetolive, list, keep-alive, revoke",
            vec![
                run("lease grant 1000"),
                run("put l v --lease={id}"),
                run("lease list"),
                form("lease timetolive {id}"),
                form("lease timetolive {id} --keys"),
                run("lease keep-alive {id} --once"),
                run("lease revoke {id}"),
                run("get l"),
                run("lease timetolive 123456789abc"),
                run("lease revoke 123456789abc"),
                run("lease keep-alive 123456789abc --once"),
                run("lease grant 0"),
                run("lease revoke {id}"),
            ],
        ),
        case(
            "lock",
            vec![run("lock name echo inside"), run("get name --prefix")],
        ),
        case(
            "elect",
            vec![
                lines("elect office alice", "", 2),
                Step::Background {
                    arguments: "elect other bob".to_owned(),
                },
                lines("elect other --listen", "", 2),
            ],
        ),
    ]
}

fn cluster() -> Vec<Case> {
    vec![
        case(
            "endpoint health",
            vec![run("endpoint health"), run("endpoint health --cluster")],
        ),
        case(
            "endpoint status",
            vec![
                // Other formats have units, and the stores have other sizes.
                form("endpoint status -w json"),
                form("endpoint status -w fields"),
            ],
        ),
        case(
            "member list",
            vec![
                run("member list"),
                run("member list -w table"),
                run("member list -w json"),
                run("member list -w fields"),
            ],
        ),
        case(
            "member update",
            vec![
                run("member list"),
                run("member update {id} --peer-urls=https://localhost:2380"),
                run("member list"),
                run("member update 123456789abc --peer-urls=https://localhost:2380"),
            ],
        ),
        case(
            "member add, promote, remove",
            vec![
                run("member add learner --learner --peer-urls=https://127.0.0.9:23800"),
                run("member promote {id}"),
                run("member remove {id}"),
                run("member list"),
                run("member promote 123456789abc"),
                run("member remove 123456789abc"),
            ],
        ),
        case(
            "alarm list, disarm",
            vec![run("alarm list"), run("alarm disarm")],
        ),
        case("defrag", vec![run("defrag"), run("defrag --cluster")]),
        case(
            "snapshot save",
            vec![
                run("put s/1 one"),
                run("snapshot save {file}"),
                run("del s/1"),
            ],
        ),
        // `etcdutl` reads files of etcd only; ours are read by `clustermesh snapshot status`.
        case(
            "snapshot save, etcdutl snapshot status",
            vec![
                run("snapshot save {file}"),
                Step::Util {
                    arguments: "snapshot status {file} -w json".to_owned(),
                },
            ],
        ),
        case(
            "move-leader",
            vec![
                run("move-leader 123456789abc"),
                run("member list"),
                run("move-leader {id}"),
            ],
        ),
        case(
            "downgrade validate, cancel",
            vec![
                run("downgrade validate 3.6"),
                run("downgrade validate 3.5"),
                run("downgrade validate 3.7"),
                run("downgrade validate nonsense"),
                run("downgrade enable 3.5"),
                run("downgrade enable 3.7"),
                run("downgrade enable nonsense"),
                run("downgrade cancel"),
            ],
        ),
        // Ours has no older format to go back to, and says so.
        case("downgrade enable", vec![run("downgrade enable 3.6")]),
    ]
}

fn access() -> Vec<Case> {
    vec![
        case(
            "role add, get, list, grant-permission, revoke-permission, delete",
            vec![
                run("role add reader"),
                run("role add reader"),
                run("role grant-permission reader read a b"),
                run("role grant-permission reader readwrite p/ --prefix"),
                run("role grant-permission reader write from --from-key"),
                run("role grant-permission nobody read a"),
                run("role get reader"),
                run("role get reader -w json"),
                run("role get nobody"),
                run("role list"),
                run("role revoke-permission reader a b"),
                run("role revoke-permission reader unknown"),
                run("role get reader"),
                run("role delete reader"),
                run("role delete reader"),
            ],
        ),
        case(
            "user add, get, list, passwd, grant-role, revoke-role, delete",
            vec![
                run("user add alice:secret"),
                run("user add alice:secret"),
                run("user add certificate --no-password"),
                run("user add :x"),
                run("role add writer"),
                run("user grant-role alice writer"),
                run("user grant-role alice writer"),
                run("user grant-role alice nothing"),
                run("user grant-role nobody writer"),
                run("user get alice"),
                run("user get alice --detail"),
                run("user get nobody"),
                run("user list"),
                run_with("user passwd alice --interactive=false", "other\n"),
                run("user revoke-role alice writer"),
                run("user revoke-role alice writer"),
                run("user delete alice"),
                run("user delete alice"),
                run("user delete certificate"),
                run("role delete writer"),
            ],
        ),
        case(
            "auth status, enable, disable",
            vec![
                run("auth status"),
                run("auth enable"),
                run("user add root:rootpw"),
                run("user grant-role root root"),
                run("role add some"),
                run("role grant-permission some readwrite some/ --prefix"),
                run("user add user:userpw"),
                run("user grant-role user some"),
                run("auth enable"),
                run("--user=root:rootpw auth status"),
                run("--user=user:userpw put some/key v"),
                run("--user=user:userpw put other/key v"),
                run("--user=user:userpw get some/ --prefix"),
                run("--user=user:userpw get s --prefix"),
                run("--user=user:userpw user list"),
                run("--user=user:wrong get some/key"),
                run("--user=nobody:x get some/key"),
                run("--user=root:rootpw user list"),
                run("--user=user:userpw member list"),
                run("--user=user:userpw member remove 123456789abc"),
                run("--user=root:rootpw member remove 123456789abc"),
                run("--user=user:userpw endpoint health"),
                form("--user=user:userpw endpoint status -w json"),
                run("--user=user:userpw alarm list"),
                run("--user=root:rootpw alarm list"),
                run("--user=user:userpw defrag"),
                run("--user=user:userpw move-leader 123456789abc"),
                run("--user=user:userpw snapshot save {file}"),
                run("--user=user:userpw lock some/lock echo inside"),
                run("--user=user:userpw lock other/lock echo inside"),
                run("--user=root:rootpw auth disable"),
                run("auth status"),
            ],
        ),
    ]
}
