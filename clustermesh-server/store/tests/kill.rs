//! kill -9: what the log has acknowledged is there when it is opened again.
//!
//! The test runs itself as a child that appends and writes each acknowledged index to its standard output, kills it at a random moment, and reads
//! the log.

use std::{
    env,
    io::{Read, Write},
    path::Path,
    process::{Command as Process, Stdio},
    time::{Duration, Instant},
};

use clustermesh_store::{Command, Entry, LogId, SledLog, TypeConfig, Vote};
use openraft::{
    EntryPayload,
    async_runtime::{AsyncRuntime, Oneshot},
    entry::RaftEntry,
    storage::{IOFlushed, RaftLogReader, RaftLogStorage},
};
use openraft_rt_tokio::TokioRuntime;

type R = TokioRuntime;
type C = TypeConfig<R, ()>;
type Log = SledLog<R, ()>;

const FOLDER: &str = "CLUSTERMESH_KILL_TEST_FOLDER";
const ROUNDS: u32 = 8;
/// A child lives at least until it has written this much, two dozen acknowledgements, however busy the machine is.
const WRITTEN_BYTES_MIN: usize = 256;
/// Acknowledged log entries that stay in the log, so that purge runs too.
const WINDOW: u64 = 400;

fn payload(index: u64) -> Vec<u8> {
    // Now and then an entry of several parts.
    let bytes = if index.is_multiple_of(97) {
        250_000
    } else {
        300 + usize::try_from(index % 500).unwrap_or(0)
    };
    index
        .to_le_bytes()
        .iter()
        .copied()
        .cycle()
        .take(bytes)
        .collect()
}

fn entry(index: u64) -> Entry {
    Entry::new(
        LogId::new_term_index(1, index),
        EntryPayload::Normal(Command::new(payload(index))),
    )
}

/// The child: appends until it is killed.
#[test]
fn child() {
    let Ok(folder) = env::var(FOLDER) else { return };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut log = Log::open(Path::new(&folder)).unwrap();
        let state = RaftLogStorage::<C>::get_log_state(&mut log).await.unwrap();
        let mut next = state.last_log_id.map_or(0, |last| last.index + 1);
        let mut out = std::io::stdout();
        loop {
            // Two appends on their way at once, of several entries each.
            let mut durable = Vec::new();
            for _ in 0..2 {
                let count = 1 + next % 7;
                let (done, acknowledged) = <R as AsyncRuntime>::Oneshot::channel();
                let entries: Vec<Entry> = (next..next + count).map(entry).collect();
                log.append(entries, IOFlushed::<C>::signal(done))
                    .await
                    .unwrap();
                next += count;
                durable.push((next - 1, acknowledged));
            }
            for (index, acknowledged) in durable {
                acknowledged.await.unwrap().unwrap();
                out.write_all(b"i").unwrap();
                out.write_all(&index.to_le_bytes()).unwrap();
            }
            if next.is_multiple_of(5) {
                RaftLogStorage::<C>::save_vote(&mut log, &Vote::new(next, 1))
                    .await
                    .unwrap();
                out.write_all(b"v").unwrap();
                out.write_all(&next.to_le_bytes()).unwrap();
            }
            if next.is_multiple_of(11) && next > WINDOW {
                RaftLogStorage::<C>::purge(&mut log, LogId::new_term_index(1, next - WINDOW))
                    .await
                    .unwrap();
            }
            out.flush().unwrap();
        }
    });
}

/// Last acknowledged index and vote in what a child wrote.
fn acknowledged(written: &[u8], index: &mut Option<u64>, term: &mut Option<u64>) -> usize {
    let (records, _cut) = written.as_chunks::<9>();
    for [kind, number @ ..] in records {
        let slot = if *kind == b'i' {
            &mut *index
        } else {
            &mut *term
        };
        *slot = (*slot).max(Some(u64::from_le_bytes(*number)));
    }
    records.len()
}

#[test]
fn nothing_acknowledged_is_lost_by_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("log");
    let (mut index, mut term) = (None, None);
    let mut acknowledgements = 0;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for round in 0..ROUNDS {
        let mut child = Process::new(env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(FOLDER, &folder)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let life = Duration::from_millis(120 + u64::from(rand_like(round) % 250));
        let mut written = Vec::new();
        let mut buffer = [0; 4096];
        let mut started = None;
        loop {
            let count = stdout.read(&mut buffer).unwrap();
            assert_ne!(count, 0, "the child ended by itself");
            written.extend_from_slice(&buffer[..count]);
            let has_lived = started.get_or_insert_with(Instant::now).elapsed() > life;
            if has_lived && written.len() >= WRITTEN_BYTES_MIN {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What is left in the pipe was acknowledged too.
        stdout.read_to_end(&mut written).unwrap();
        // The test harness writes a line of its own first.
        let marker = b"running 1 test\n";
        let begin = written
            .windows(marker.len())
            .position(|window| window == marker)
            .unwrap()
            + marker.len();
        let mut records = &written[begin..];
        if let Some(rest) = records.strip_prefix(b"test child ... ") {
            records = rest;
        }
        acknowledgements += acknowledged(records, &mut index, &mut term);

        runtime.block_on(async {
            let mut log = Log::open(&folder).unwrap();
            let state = RaftLogStorage::<C>::get_log_state(&mut log).await.unwrap();
            assert!(
                state.last_log_id.map(|last| last.index) >= index,
                "round {round}: {:?} < {index:?}",
                state.last_log_id
            );
            let vote = RaftLogReader::<C>::read_vote(&mut log).await.unwrap();
            assert!(
                vote.map(|vote| vote.leader_id.term) >= term,
                "round {round}: {vote:?} < {term:?}"
            );
            let entries = RaftLogReader::<C>::try_get_log_entries(&mut log, ..)
                .await
                .unwrap();
            let first = state
                .last_purged_log_id
                .map_or(0, |purged| purged.index + 1);
            assert_eq!(entries.first().map(|entry| entry.log_id.index), Some(first));
            assert_eq!(entries.last().map(|entry| entry.log_id), state.last_log_id);
            assert!(
                entries
                    .iter()
                    .zip(first..)
                    .all(|(found, index)| *found == entry(index))
            );
        });
    }
    assert!(
        acknowledgements > 100,
        "only {acknowledgements} appends were acknowledged"
    );
}

/// Spreads the moments of the kills without a source of randomness.
fn rand_like(round: u32) -> u32 {
    (round + std::process::id()).wrapping_mul(2_654_435_761) >> 8
}
