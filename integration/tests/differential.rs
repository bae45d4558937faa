//! Ours answers like etcd: the same random operations on both, everything compared.

use std::time::Duration;

use clustermesh_integration::judges::differential::{Report, run};
use clustermesh_integration::judges::programs::Programs;
use clustermesh_integration::lab::binaries_folder;

/// Time for new seeds unless `SEEDS` or `SEED` says how many.
const SECONDS: u64 = 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number"))
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_equals_etcds() {
    let programs = Programs::find(&binaries_folder().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let hour = Duration::from_secs(3_600);
    let (first, count, time) = match (number("SEED"), number("SEEDS")) {
        (Some(seed), _) => (seed, 1, hour),
        (None, Some(seeds)) => (1, seeds, 24 * hour),
        (None, None) => (1, u64::MAX, Duration::from_secs(SECONDS)),
    };
    let report = run(first, count, time, &programs, folder.path())
        .await
        .unwrap();
    println!("{report}");
    assert!(
        report.differences().is_empty(),
        "{} differences, see above",
        report.differences().len()
    );
    if count > 1 {
        assert_operations_meant_something(&report);
    }
}

/// Equal answers prove little when all of them are the same error.
fn assert_operations_meant_something(report: &Report) {
    for (op, outcome) in [
        ("range", "ok"),
        ("put", "ok"),
        ("delete-range", "ok"),
        ("txn", "ok"),
        ("compact", "ok"),
        ("lease-grant", "ok"),
        ("lease-revoke", "ok"),
        ("lease-keep-alive", "ok"),
        ("lease-time-to-live", "ok"),
        ("lease-leases", "ok"),
        ("hash-kv", "ok"),
        ("watch-create", "ok"),
        ("watch-cancel", "ok"),
        ("watch-events", "ok"),
        ("range-stream", "ok"),
        ("lock", "ok"),
        ("unlock", "ok"),
        ("campaign", "ok"),
        ("leader", "ok"),
        ("observe", "ok"),
        ("watch-try", "ok"),
        ("user-add", "ok"),
        ("user-grant-role", "ok"),
        ("role-grant-permission", "ok"),
        ("authenticate", "ok"),
        ("range", "etcdserver: permission denied"),
        ("put", "etcdserver: permission denied"),
        (
            "auth-enable",
            "etcdserver: root user does not have root role",
        ),
        (
            "range",
            "etcdserver: mvcc: required revision has been compacted",
        ),
        (
            "range",
            "etcdserver: mvcc: required revision is a future revision",
        ),
        ("put", "etcdserver: requested lease not found"),
        ("txn", "etcdserver: duplicate key given in txn request"),
        ("lease-grant", "etcdserver: lease already exists"),
    ] {
        let count = report.count(op, outcome);
        assert!(count > 0, "no {op} was answered with {outcome:?}");
    }
}
