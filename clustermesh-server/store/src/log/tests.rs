use std::path::{Path, PathBuf};

use openraft::{
    EntryPayload,
    async_runtime::{AsyncRuntime, Oneshot},
    entry::RaftEntry,
    storage::{IOFlushed, RaftLogReader, RaftLogStorage},
};
use openraft_rt_tokio::TokioRuntime;
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::{
    codec,
    error::StoreError,
    pb,
    types::{Command, Entry, LogId, Membership, Node, TypeConfig, Vote},
};

type R = TokioRuntime;
type C = TypeConfig<R, ()>;
type Durable = SledLog<R, ()>;

fn run<T>(test: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(test)
}

fn id(term: u64, index: u64) -> LogId {
    LogId::new_term_index(term, index)
}

fn entry(term: u64, index: u64, bytes: usize) -> Entry {
    let fill = u8::try_from((term * 31 + index) % 251).unwrap();
    Entry::new(
        id(term, index),
        EntryPayload::Normal(Command::new(vec![fill; bytes])),
    )
}

async fn append(log: &mut impl RaftLogStorage<C>, entries: Vec<Entry>) {
    let (done, durable) = <R as AsyncRuntime>::Oneshot::channel();
    log.append(entries, IOFlushed::signal(done)).await.unwrap();
    durable.await.unwrap().unwrap();
}

async fn all(log: &mut impl RaftLogReader<C>) -> Vec<Entry> {
    log.try_get_log_entries(..).await.unwrap()
}

async fn state(log: &mut impl RaftLogStorage<C>) -> (Option<LogId>, Option<LogId>) {
    let state = log.get_log_state().await.unwrap();
    (state.last_purged_log_id, state.last_log_id)
}

/// What a process that is killed leaves, beside `path`: the files as they are.
fn left_by_a_crash(path: &Path, name: &str) -> PathBuf {
    let copy = path.with_file_name(name);
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(path).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            std::fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
        }
    }
    copy
}

/// Opens again as a new process would.
fn reopen(log: Durable, path: &Path) -> Durable {
    let closed = log.closed();
    drop(log);
    assert!(closed.is_closed());
    Durable::open(path).unwrap()
}

#[test]
fn entries_votes_and_marks_survive_a_reopen() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Durable::open(dir.path()).unwrap();
        let node = Node {
            name: "n".into(),
            peer_url: "p".into(),
            client_urls: vec!["c".into(), "d".into()],
            ..Node::default()
        };
        let membership = Membership::new(
            vec![[1].into(), [1, 2].into()],
            std::collections::BTreeMap::from([(1, node.clone()), (2, node)]),
        )
        .unwrap();
        let entries = vec![
            Entry::new(id(1, 0), EntryPayload::Membership(membership)),
            Entry::new(id(1, 1), EntryPayload::Blank),
            entry(2, 2, 100),
        ];
        append(&mut log, entries.clone()).await;
        let vote = Vote::new_committed(2, 9);
        RaftLogStorage::<C>::save_vote(&mut log, &vote)
            .await
            .unwrap();
        RaftLogStorage::<C>::save_committed(&mut log, Some(id(1, 1)))
            .await
            .unwrap();
        let mut log = reopen(log, dir.path());
        assert_eq!(all(&mut log).await, entries);
        assert_eq!(
            RaftLogReader::<C>::read_vote(&mut log).await.unwrap(),
            Some(vote)
        );
        assert_eq!(
            RaftLogStorage::<C>::read_committed(&mut log).await.unwrap(),
            Some(id(1, 1))
        );
        RaftLogStorage::<C>::purge(&mut log, id(1, 1))
            .await
            .unwrap();
        let mut log = reopen(log, dir.path());
        assert_eq!(state(&mut log).await, (Some(id(1, 1)), Some(id(2, 2))));
        assert_eq!(all(&mut log).await, entries[2..]);
    });
}

#[test]
fn what_is_committed_is_known_after_a_crash_once_it_was_written_with_entries() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Durable::open(&path).unwrap();
        append(&mut log, vec![entry(1, 0, 10), entry(1, 1, 10)]).await;
        for n in 2..8 {
            RaftLogStorage::<C>::save_committed(&mut log, Some(id(1, n - 1)))
                .await
                .unwrap();
            append(&mut log, vec![entry(1, n, 10)]).await;
        }
        let crashed = |name| Durable::open(&left_by_a_crash(&path, name)).unwrap();
        assert_eq!(crashed("a").recorded_committed(), Some(id(1, 6)));
        // The record that said so goes, what it said stays.
        RaftLogStorage::<C>::truncate_after(&mut log, Some(id(1, 6)))
            .await
            .unwrap();
        let again = crashed("b");
        assert_eq!(again.recorded_committed(), Some(id(1, 6)));
        assert_eq!(again.stats().last_index, 6);
    });
}

#[test]
fn what_a_crash_in_the_middle_of_an_append_leaves_tells_of_no_loss() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = Durable::open(&path).unwrap();
        append(&mut log, vec![entry(1, 0, 10)]).await;
        // As openraft says it: what was handed over counts, written or not.
        let handed_over = async |log: &mut Durable, last| {
            RaftLogStorage::<C>::save_committed(log, Some(id(1, last)))
                .await
                .unwrap();
        };
        handed_over(&mut log, 20).await;
        append(&mut log, (1..=20).map(|n| entry(1, n, 100 << 10)).collect()).await;
        let copy = left_by_a_crash(&path, "a");
        let database = sled::Config::new()
            .path(&copy)
            .segment_size(8 << 20)
            .open()
            .unwrap();
        let tree = database.open_tree("log").unwrap();
        for key in tree.range(9_u64.to_be_bytes()..).keys() {
            tree.remove(key.unwrap()).unwrap();
        }
        drop((tree, database));
        let mut crashed = Durable::open(&copy).unwrap();
        assert_eq!(state(&mut crashed).await.1, Some(id(1, 8)));
        assert_eq!(crashed.recorded_committed(), Some(id(1, 8)));
        // What is written down apart from the records, before entries that wait behind it.
        handed_over(&mut log, 40).await;
        RaftLogStorage::<C>::save_vote(&mut log, &Vote::new(1, 1))
            .await
            .unwrap();
        let crashed = |name| Durable::open(&left_by_a_crash(&path, name)).unwrap();
        assert_eq!(crashed("b").recorded_committed(), Some(id(1, 20)));
        append(&mut log, (21..=40).map(|n| entry(1, n, 10)).collect()).await;
        assert_eq!(crashed("c").recorded_committed(), Some(id(1, 40)));
        // After a truncation other entries follow, of a newer term.
        RaftLogStorage::<C>::truncate_after(&mut log, Some(id(1, 40)))
            .await
            .unwrap();
        append(&mut log, (41..=50).map(|n| entry(1, n, 10)).collect()).await;
        RaftLogStorage::<C>::truncate_after(&mut log, Some(id(1, 41)))
            .await
            .unwrap();
        RaftLogStorage::<C>::save_committed(&mut log, Some(id(2, 42)))
            .await
            .unwrap();
        RaftLogStorage::<C>::save_vote(&mut log, &Vote::new(2, 2))
            .await
            .unwrap();
        assert_eq!(crashed("d").recorded_committed(), Some(id(1, 41)));
    });
}

#[test]
fn a_loss_shows_again_after_a_start() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Durable::open(dir.path()).unwrap();
        append(&mut log, (0..9).map(|n| entry(1, n, 10)).collect()).await;
        RaftLogStorage::<C>::save_committed(&mut log, Some(id(1, 8)))
            .await
            .unwrap();
        RaftLogStorage::<C>::truncate_after(&mut log, Some(id(1, 3)))
            .await
            .unwrap();
        for _ in 0..2 {
            log = reopen(log, dir.path());
            assert_eq!(log.recorded_committed(), Some(id(1, 8)));
            // As openraft begins with what is there.
            RaftLogStorage::<C>::save_committed(&mut log, Some(id(1, 3)))
                .await
                .unwrap();
            RaftLogStorage::<C>::save_vote(&mut log, &Vote::new(2, 2))
                .await
                .unwrap();
        }
    });
}

#[test]
fn large_entries_are_split_and_never_spill_into_blobs() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Durable::open(dir.path()).unwrap();
        let entries: Vec<_> = (0..40)
            .map(|n| entry(1, n, if n % 5 == 0 { 3 << 20 } else { 90 << 10 }))
            .collect();
        for chunk in entries.chunks(4) {
            append(&mut log, chunk.to_vec()).await;
        }
        assert!(
            std::fs::read_dir(dir.path().join("blobs"))
                .unwrap()
                .next()
                .is_none()
        );
        // More than is kept in memory, so the older part comes from disk.
        assert!(log.read_back_is_on_disk());
        assert_eq!(all(&mut log).await, entries);
        let limited = RaftLogReader::<C>::limited_get_log_entries(&mut log, 0, 40)
            .await
            .unwrap();
        assert!(!limited.is_empty() && limited.len() < 40);
        assert_eq!(limited, entries[..limited.len()]);
        let mut log = reopen(log, dir.path());
        assert_eq!(all(&mut log).await, entries);
        let refused = log
            .append(vec![entry(1, 40, MAX_ENTRY_BYTES)], IOFlushed::<C>::noop())
            .await;
        assert!(refused.unwrap_err().to_string().contains("limit"));
    });
}

#[test]
fn a_spilled_record_is_refused_at_start() {
    let dir = tempfile::tempdir().unwrap();
    drop(Durable::open(dir.path()).unwrap());
    std::fs::write(dir.path().join("blobs").join("1"), b"x").unwrap();
    assert!(matches!(
        Durable::open(dir.path()),
        Err(StoreError::Spilled { .. })
    ));
}

#[test]
fn a_damaged_record_is_refused_and_a_torn_last_one_dropped() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Durable::open(dir.path()).unwrap();
        append(&mut log, vec![entry(1, 0, 10)]).await;
        append(&mut log, vec![entry(1, 1, 300 << 10)]).await;
        drop(log);
        let key =
            |index: u64, part: u16| [&index.to_be_bytes()[..], &part.to_be_bytes()[..]].concat();
        let database = sled::Config::new()
            .path(dir.path())
            .segment_size(8 << 20)
            .open()
            .unwrap();
        let tree = database.open_tree("log").unwrap();
        assert!(tree.remove(key(1, 2)).unwrap().is_some());
        drop((tree, database));
        let mut log = Durable::open(dir.path()).unwrap();
        assert_eq!(state(&mut log).await.1, Some(id(1, 0)));
        append(&mut log, vec![entry(2, 1, 10), entry(2, 2, 10)]).await;
        let mut log = reopen(log, dir.path());
        assert_eq!(all(&mut log).await.len(), 3);
        drop(log);
        let database = sled::Config::new()
            .path(dir.path())
            .segment_size(8 << 20)
            .open()
            .unwrap();
        let tree = database.open_tree("log").unwrap();
        let mut bytes = tree.get(key(0, 0)).unwrap().unwrap().to_vec();
        *bytes.last_mut().unwrap() ^= 1;
        tree.insert(key(0, 0), bytes).unwrap();
        drop((tree, database));
        assert!(matches!(
            Durable::open(dir.path()),
            Err(StoreError::Damaged { .. })
        ));
    });
}

#[test]
fn a_log_of_a_newer_release_is_refused_by_name() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Durable::open(dir.path()).unwrap();
        append(&mut log, vec![entry(1, 0, 10)]).await;
        drop(log);
        let newer = pb::LogRecord {
            format: codec::FORMAT + 1,
            ..pb::LogRecord::default()
        }
        .encode_to_vec();
        let part = pb::LogPart {
            parts: 1,
            crc32c: crc32c::crc32c(&newer),
            data: newer.into(),
        };
        let database = sled::Config::new()
            .path(dir.path())
            .segment_size(8 << 20)
            .open()
            .unwrap();
        let log = database.open_tree("log").unwrap();
        let key = [&1_u64.to_be_bytes()[..], &0_u16.to_be_bytes()].concat();
        log.insert(key, part.encode_to_vec()).unwrap();
        drop((log, database));
        let refused = Durable::open(dir.path()).err().unwrap();
        assert!(
            matches!(
                refused,
                StoreError::NewerFormat { found, known, .. }
                    if (found, known) == (codec::FORMAT + 1, codec::FORMAT)
            ),
            "{refused}"
        );
    });
}

#[derive(Debug, Clone)]
enum Step {
    Append {
        term_step: u64,
        count: u64,
        bytes: usize,
    },
    Truncate {
        back: u64,
    },
    Purge {
        ahead: u64,
    },
    Vote {
        term: u64,
    },
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..2_u64, 1..20_u64, prop_oneof![0..200_usize, 60_000..200_000_usize])
            .prop_map(|(term_step, count, bytes)| Step::Append { term_step, count, bytes }),
        1 => (0..30_u64).prop_map(|back| Step::Truncate { back }),
        1 => (0..30_u64).prop_map(|ahead| Step::Purge { ahead }),
        1 => (0..100_u64).prop_map(|term| Step::Vote { term }),
        1 => Just(Step::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn the_durable_log_answers_as_its_twin_in_memory(steps in prop::collection::vec(step(), 1..25)) {
        run(async {
            let dir = tempfile::tempdir().unwrap();
            let mut durable = Durable::open(dir.path()).unwrap();
            let mut twin = MemoryLog::default();
            let (mut term, mut next) = (1, 0_u64);
            let mut purged: Option<LogId> = None;
            for step in steps {
                match step {
                    Step::Append { term_step, count, bytes } => {
                        term += term_step;
                        let entries: Vec<_> = (next..next + count).map(|index| entry(term, index, bytes)).collect();
                        next += count;
                        append(&mut durable, entries.clone()).await;
                        append(&mut twin, entries).await;
                    }
                    Step::Truncate { back } => {
                        let first = purged.map_or(0, |purged| purged.index + 1);
                        let from = next.saturating_sub(back).max(first);
                        let keep = match from.checked_sub(1) {
                            None => None,
                            Some(keep) if Some(keep) == purged.map(|purged| purged.index) => purged,
                            Some(keep) => Some(RaftLogReader::<C>::try_get_log_entries(&mut twin, keep..=keep).await.unwrap()[0].log_id),
                        };
                        next = from;
                        RaftLogStorage::<C>::truncate_after(&mut durable, keep).await.unwrap();
                        RaftLogStorage::<C>::truncate_after(&mut twin, keep).await.unwrap();
                    }
                    Step::Purge { ahead } => {
                        let upto = purged.map_or(0, |purged| purged.index) + ahead;
                        if purged.is_some_and(|purged| purged.index >= upto) {
                            continue;
                        }
                        // Past the end is what a snapshot from the leader does; elsewhere the id is that of the entry.
                        let found = RaftLogReader::<C>::try_get_log_entries(&mut twin, upto..=upto).await.unwrap();
                        let upto = found.first().map_or(id(term, upto), |entry| entry.log_id);
                        purged = Some(upto);
                        next = next.max(upto.index + 1);
                        RaftLogStorage::<C>::purge(&mut durable, upto).await.unwrap();
                        RaftLogStorage::<C>::purge(&mut twin, upto).await.unwrap();
                    }
                    Step::Vote { term } => {
                        let vote = Vote::new(term, 1);
                        RaftLogStorage::<C>::save_vote(&mut durable, &vote).await.unwrap();
                        RaftLogStorage::<C>::save_vote(&mut twin, &vote).await.unwrap();
                    }
                    Step::Reopen => durable = reopen(durable, dir.path()),
                }
                assert_eq!(state(&mut durable).await, state(&mut twin).await);
                assert_eq!(all(&mut durable).await, all(&mut twin).await);
                let (durable_vote, twin_vote) = (
                    RaftLogReader::<C>::read_vote(&mut durable).await.unwrap(),
                    RaftLogReader::<C>::read_vote(&mut twin).await.unwrap(),
                );
                assert_eq!(durable_vote, twin_vote);
            }
            let mut durable = reopen(durable, dir.path());
            assert_eq!(state(&mut durable).await, state(&mut twin).await);
            assert_eq!(all(&mut durable).await, all(&mut twin).await);
        });
    }
}
