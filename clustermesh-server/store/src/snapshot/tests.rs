use super::*;
use crate::types::{LogId, Membership, Node, StoredMembership};

fn meta(index: u64) -> SnapshotMeta {
    let node = Node {
        name: "a".into(),
        peer_url: "https://a:2380".into(),
        client_urls: vec!["https://a:2379".into()],
        ..Node::default()
    };
    let membership = Membership::new(
        vec![[1].into()],
        std::collections::BTreeMap::from([(1, node)]),
    )
    .unwrap();
    SnapshotMeta {
        last_log_id: Some(LogId::new_term_index(3, index)),
        last_membership: StoredMembership::new(Some(LogId::new_term_index(1, 1)), membership),
    }
}

fn write(store: &SnapshotStore, index: u64) -> SnapshotFile {
    let mut writer = store.create(meta(index)).unwrap();
    for chunk in 0..10_u8 {
        writer
            .chunk(vec![chunk; 1000 + usize::from(chunk)].into())
            .unwrap();
    }
    writer.finish().unwrap()
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 0x40;
    fs::write(path, bytes).unwrap();
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|found| found.unwrap().path())
        .collect();
    files.sort();
    files
}

#[test]
fn chunks_come_back_as_written_from_file_and_memory() {
    let dir = tempfile::tempdir().unwrap();
    for store in [
        SnapshotStore::folder(dir.path()).unwrap(),
        SnapshotStore::memory(),
    ] {
        assert!(store.newest().unwrap().is_none());
        write(&store, 10);
        let newest = store.newest().unwrap().unwrap();
        assert_eq!(newest.meta(), &meta(10));
        let chunks: Vec<Bytes> = newest.read().unwrap().map(Result::unwrap).collect();
        assert_eq!(chunks.len(), 10);
        assert!(chunks.iter().enumerate().all(
            |(n, chunk)| chunk.len() == 1000 + n && chunk.iter().all(|b| usize::from(*b) == n)
        ));
    }
}

#[test]
fn one_that_is_finished_after_a_newer_one_is_not_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    for store in [
        SnapshotStore::folder(dir.path()).unwrap(),
        SnapshotStore::memory(),
    ] {
        for index in [10, 30, 20] {
            write(&store, index);
        }
        let newest = store.newest().unwrap().unwrap();
        assert_eq!(newest.meta(), &meta(30));
        let previous = store.previous().unwrap().unwrap();
        assert_eq!(previous.meta(), &meta(20));
    }
}

#[test]
fn the_newest_two_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    for store in [
        SnapshotStore::folder(dir.path()).unwrap(),
        SnapshotStore::memory(),
    ] {
        (1..=4).for_each(|index| drop(write(&store, index * 100)));
        assert_eq!(store.newest().unwrap().unwrap().meta(), &meta(400));
        assert_eq!(store.previous().unwrap().unwrap().meta(), &meta(300));
        assert_eq!(store.all().unwrap().len(), 2);
    }
}

#[test]
fn an_unfinished_snapshot_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::folder(dir.path()).unwrap();
    let mut writer = store.create(meta(5)).unwrap();
    writer.chunk(Bytes::from_static(b"x")).unwrap();
    drop(writer);
    assert!(files(dir.path()).is_empty());
    fs::write(dir.path().join("left-by-a-crash.tmp"), b"x").unwrap();
    let store = SnapshotStore::folder(dir.path()).unwrap();
    assert!(files(dir.path()).is_empty());
    assert!(store.newest().unwrap().is_none());
}

#[test]
fn every_flipped_byte_and_every_cut_is_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::folder(dir.path()).unwrap();
    write(&store, 1);
    let path = files(dir.path()).remove(0);
    let whole = fs::read(&path).unwrap();
    for at in (0..whole.len()).step_by(37) {
        flip(&path, at);
        assert!(
            matches!(store.newest(), Err(StoreError::Damaged { .. })),
            "byte {at}"
        );
        fs::write(&path, &whole[..at]).unwrap();
        assert!(
            matches!(store.newest(), Err(StoreError::Damaged { .. })),
            "cut at {at}"
        );
        fs::write(&path, &whole).unwrap();
    }
    assert!(store.newest().unwrap().is_some());
}

#[test]
fn a_damaged_newest_falls_back_to_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let store = SnapshotStore::folder(dir.path()).unwrap();
    write(&store, 1);
    write(&store, 2);
    flip(files(dir.path()).last().unwrap(), 2000);
    assert_eq!(store.newest().unwrap().unwrap().meta(), &meta(1));
    // It is set aside, and goes once there are two valid ones again.
    assert_eq!(store.all().unwrap().len(), 1);
    assert_eq!(files(dir.path()).len(), 2);
    write(&store, 3);
    assert_eq!(store.previous().unwrap().unwrap().meta(), &meta(1));
    assert_eq!(files(dir.path()).len(), 2);
}

#[test]
fn too_large_a_chunk_is_refused() {
    let store = SnapshotStore::memory();
    let mut writer = store.create(meta(1)).unwrap();
    assert!(matches!(
        writer.chunk(vec![0; MAX_CHUNK_BYTES + 1].into()),
        Err(StoreError::TooLarge { .. })
    ));
}
