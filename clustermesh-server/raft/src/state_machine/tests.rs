use std::sync::Mutex as StdMutex;

use clustermesh_store::{MemoryLog, SledLog};
use openraft::{
    StorageError,
    async_runtime::MpscReceiver,
    testing::log::{StoreBuilder, Suite},
};
use openraft_rt_tokio::TokioRuntime;
use tempfile::TempDir;

use super::*;

type R = TokioRuntime;

/// A state machine whose publications nobody wants.
fn machine(snapshots: SnapshotStore) -> StateMachine<R> {
    let (hub, mut publications) = <R as AsyncRuntime>::Mpsc::channel(16);
    drop(tokio::spawn(async move {
        while publications.recv().await.is_some() {}
    }));
    let (reports, _) = Reports::new(u64::MAX);
    StateMachine::open(snapshots, Arc::default(), hub, reports, 1, 1).unwrap()
}

struct InMemory;

impl StoreBuilder<Types<R>, MemoryLog, StateMachine<R>> for InMemory {
    async fn build(&self) -> Result<((), MemoryLog, StateMachine<R>), StorageError<Types<R>>> {
        Ok(((), MemoryLog::default(), machine(SnapshotStore::memory())))
    }
}

/// The suite builds one store for each of its tests; a folder lives as long as its store.
struct OnDisk;

struct Folder(#[expect(dead_code, reason = "removed when dropped")] StdMutex<TempDir>);

impl StoreBuilder<Types<R>, SledLog<R, Answer>, StateMachine<R>, Folder> for OnDisk {
    async fn build(
        &self,
    ) -> Result<(Folder, SledLog<R, Answer>, StateMachine<R>), StorageError<Types<R>>> {
        let dir = tempfile::tempdir().unwrap();
        let log = SledLog::open(&dir.path().join("log")).unwrap();
        let machine = machine(SnapshotStore::folder(&dir.path().join("snapshots")).unwrap());
        Ok((Folder(StdMutex::new(dir)), log, machine))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_passes_openrafts_storage_suite() {
    Suite::test_all(InMemory).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn disk_passes_openrafts_storage_suite() {
    Suite::test_all(OnDisk).await.unwrap();
}

#[tokio::test]
async fn an_entry_that_cannot_be_decoded_is_an_error_and_changes_nothing() {
    let machine = machine(SnapshotStore::memory());
    let entry = |bytes: &'static [u8]| {
        let command = clustermesh_store::Command::new(bytes);
        clustermesh_store::Entry::new(LogId::new_term_index(1, 1), EntryPayload::Normal(command))
    };
    assert!(matches!(
        machine.apply_entry(&entry(b"\xff")),
        Err(EntryError::Decode { .. })
    ));
    // A batch of a later format.
    assert!(matches!(
        machine.apply_entry(&entry(b"\x08\x7f")),
        Err(EntryError::Apply { .. })
    ));
    assert_eq!(machine.last_applied(), None);
}
