//! Growth, for as long as a test may take: with compaction disk and memory stay flat, without it both are seen to grow.

use std::time::Duration;

use clustermesh_integration::bench::soak::{History, Options, Soak};
use clustermesh_integration::judges::programs::Programs;
use clustermesh_integration::lab::binaries_folder;

/// Puts with compaction, then twice as many without.
const PUTS: u64 = 120_000;
/// Looks while history is compacted.
const LOOKS: u64 = 40;
/// And while it is kept: as many as the judge compares with those before.
const KEPT_LOOKS: u64 = 17;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_and_memory_stay_flat_while_history_is_compacted_and_only_then() {
    let programs = Programs::find(&binaries_folder().unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        replicas: 1,
        keys: 1_000,
        kept_revisions: 20,
        snapshot_log_bytes: Some(1 << 20),
        time: Duration::from_secs(240),
        folder: folder.path().to_owned(),
    };
    let mut soak = Soak::start(options, &programs).await.unwrap();
    soak.put(PUTS, LOOKS, History::Compacted).await.unwrap();
    let compacted = soak.seen();
    println!("{compacted}");
    compacted.check_flat().unwrap();
    // The control: a judge that does not see this sees nothing.
    soak.put(2 * PUTS, KEPT_LOOKS, History::Kept).await.unwrap();
    let all = soak.end().await.unwrap();
    println!("{all}");
    assert_eq!(all.grown().len(), 2, "{:?}", all.grown());
    assert!(all.check_flat().is_err());
}
