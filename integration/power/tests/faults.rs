//! A log on a disk that fails: it stops with a reason, and acknowledges nothing that is not durable.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails there")]

use std::{
    os::fd::AsRawFd as _,
    path::Path,
    time::{Duration, Instant},
};

use clustermesh_power::mount::{Faults, PowerDisk};
use clustermesh_store::{Command, Entry, LogId, SledLog, SnapshotMeta, SnapshotStore, TypeConfig};
use openraft::{
    EntryPayload,
    async_runtime::{AsyncRuntime, Oneshot},
    entry::RaftEntry as _,
    storage::{IOFlushed, RaftLogStorage},
};
use openraft_rt_tokio::TokioRuntime;

type R = TokioRuntime;
type C = TypeConfig<R, ()>;
type Log = SledLog<R, ()>;

fn disk() -> (tempfile::TempDir, PowerDisk) {
    let folder = tempfile::tempdir().unwrap();
    let disk = PowerDisk::mount(folder.path()).unwrap();
    (folder, disk)
}

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(test)
}

async fn append(log: &mut Log, index: u64, bytes: usize) -> Result<(), std::io::Error> {
    let command = Command::new(vec![7; bytes]);
    let entry = Entry::new(
        LogId::new_term_index(1, index),
        EntryPayload::Normal(command),
    );
    let (done, durable) = <R as AsyncRuntime>::Oneshot::channel();
    log.append([entry], IOFlushed::<C>::signal(done)).await?;
    durable.await.unwrap()
}

async fn last_index(path: &Path) -> Option<u64> {
    let mut log = Log::open(path).unwrap();
    let state = RaftLogStorage::<C>::get_log_state(&mut log).await.unwrap();
    state.last_log_id.map(|last| last.index)
}

#[test]
fn sync_file_range_never_arrives_and_fdatasync_does() {
    let (folder, disk) = disk();
    let file = std::fs::File::create(folder.path().join("f")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 5000], 0).unwrap();
    let before = disk.counts();
    let flags = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    nix_sync_file_range(file.as_raw_fd(), flags);
    assert_eq!(disk.counts(), before, "the kernel kept it to itself");
    assert_eq!(disk.most_volatile_bytes(), 5000);
    file.sync_data().unwrap();
    assert_eq!(disk.counts().syncs, before.syncs + 1);
}

#[expect(
    unsafe_code,
    reason = "the system call that sled makes has no safe wrapper"
)]
fn nix_sync_file_range(descriptor: i32, flags: u32) {
    // SAFETY: the descriptor is open, and the call takes no memory.
    let result = unsafe { libc::sync_file_range(descriptor, 0, 5000, flags) };
    assert_eq!(result, 0);
}

#[test]
fn a_failing_sync_stops_the_log_for_good_and_says_so() {
    run(async {
        let (folder, disk) = disk();
        let path = folder.path().join("log");
        let mut log = Log::open(&path).unwrap();
        append(&mut log, 0, 100).await.unwrap();
        disk.set_faults(Faults {
            sync_fails: true,
            ..Faults::default()
        });
        let refused = append(&mut log, 1, 100).await.unwrap_err().to_string();
        assert!(
            refused.contains("sync") && refused.contains("log/db"),
            "{refused}"
        );
        // The next sync would succeed without what the failed one dropped: nothing may be acknowledged after it.
        disk.set_faults(Faults::default());
        assert!(append(&mut log, 2, 100).await.is_err());
        drop(log);
        disk.power_cycle(1);
        assert_eq!(last_index(&path).await, Some(0));
    });
}

#[test]
fn a_full_disk_stops_the_log_with_everything_acknowledged_there() {
    run(async {
        let (folder, disk) = disk();
        let path = folder.path().join("log");
        let mut log = Log::open(&path).unwrap();
        append(&mut log, 0, 100).await.unwrap();
        disk.set_capacity_bytes(disk.used_bytes() + (12 << 20));
        let mut acknowledged = 0;
        let refused = loop {
            match append(&mut log, acknowledged + 1, 400_000).await {
                Ok(()) => acknowledged += 1,
                Err(refused) => break refused.to_string(),
            }
        };
        assert!(
            refused.to_lowercase().contains("no space") || refused.contains("28"),
            "{refused}"
        );
        assert!(acknowledged > 0, "there was some room");
        drop(log);
        disk.set_capacity_bytes(u64::MAX);
        disk.power_cycle(2);
        assert!(last_index(&path).await >= Some(acknowledged));
    });
}

#[test]
fn a_slow_disk_is_waited_for() {
    run(async {
        let (folder, disk) = disk();
        let mut log = Log::open(&folder.path().join("log")).unwrap();
        let sync_delay = Duration::from_millis(300);
        disk.set_faults(Faults {
            sync_delay,
            ..Faults::default()
        });
        let started = Instant::now();
        append(&mut log, 0, 100).await.unwrap();
        assert!(
            started.elapsed() >= sync_delay,
            "acknowledged before the disk had it"
        );
        disk.set_faults(Faults::default());
    });
}

#[test]
fn a_snapshot_that_the_disk_refuses_does_not_exist() {
    let (folder, disk) = disk();
    let snapshots = SnapshotStore::folder(&folder.path().join("snapshots")).unwrap();
    let meta = |index| SnapshotMeta {
        last_log_id: Some(LogId::new_term_index(1, index)),
        ..SnapshotMeta::default()
    };
    let write = |index| {
        let mut writer = snapshots.create(meta(index))?;
        writer.chunk(vec![1; 100_000].into())?;
        writer.finish()
    };
    write(1).unwrap();
    for faults in [
        Faults {
            sync_fails: true,
            ..Faults::default()
        },
        Faults {
            write_fails: true,
            ..Faults::default()
        },
    ] {
        disk.set_faults(faults);
        let refused = write(2).unwrap_err().to_string();
        assert!(refused.contains("snapshot"), "{refused}");
        disk.set_faults(Faults::default());
        let newest = snapshots.newest().unwrap().unwrap();
        assert_eq!(newest.meta().last_log_id, meta(1).last_log_id);
    }
    disk.set_capacity_bytes(disk.used_bytes() + 50_000);
    assert!(write(3).unwrap_err().to_string().contains("No space"));
    disk.set_capacity_bytes(u64::MAX);
    write(4).unwrap();
}
