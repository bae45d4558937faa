//! A replica's writes on the real store, in a process of its own that dies when power fails.

use std::{collections::VecDeque, io::Write, path::Path};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clustermesh_store::{
    Command, DataDir, Entry, Identity, LogId, SledLog, SnapshotMeta, SnapshotStore,
    StoredMembership, TypeConfig, Vote,
};
use openraft::{
    EntryPayload,
    async_runtime::{AsyncRuntime, Oneshot},
    entry::RaftEntry as _,
    storage::{IOFlushed, RaftLogReader, RaftLogStorage},
};
use openraft_rt_tokio::TokioRuntime;
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};

use crate::protocol::{Ballot, Found, Message, Op, Place, Run};

type R = TokioRuntime;
type C = TypeConfig<R, ()>;
type Log = SledLog<R, ()>;
type Durable = <<R as AsyncRuntime>::Oneshot as Oneshot>::Receiver<Result<(), std::io::Error>>;

const CLUSTER: &str = "power";
const REPLICA: u64 = 1;
/// Entries that stay in the log when it is purged, bytes at about this many.
const MAX_LOG_BYTES: u64 = 4 << 20;
const SNAPSHOT_CHUNKS: u64 = 3;

/// How the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// As a server does.
    Full,
    /// The control: sled's own flush and nothing else.
    FlushOnly,
}

fn log_id(place: Place) -> LogId {
    LogId::new_term_index(place.term, place.index)
}

fn place(id: LogId) -> Place {
    Place {
        term: id.leader_id.term,
        index: id.index,
    }
}

/// Spreads a number over 64 bits (SplitMix64's finaliser).
fn mix(number: u64) -> u64 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn size_bytes(place: Place) -> usize {
    let dice = mix(place.term << 32 ^ place.index);
    let spread = usize::try_from(dice >> 40).unwrap_or(0);
    match dice % 2_048 {
        // More than one record.
        0 => (1 << 20) + spread % (2 << 20),
        // More than one part of a record.
        1..24 => 40_000 + spread % 250_000,
        24..192 => 4_000 + spread % 30_000,
        _ => spread % 1_500,
    }
}

fn payload(place: Place) -> Bytes {
    let mut state = mix(place.index << 20 ^ place.term);
    let mut data = Vec::with_capacity(size_bytes(place) + 8);
    while data.len() < size_bytes(place) {
        state = mix(state);
        data.extend_from_slice(&state.to_le_bytes());
    }
    data.truncate(size_bytes(place));
    data.into()
}

fn entry(place: Place) -> Entry {
    Entry::new(
        log_id(place),
        EntryPayload::Normal(Command::new(payload(place))),
    )
}

fn chunk(place: Place, number: u64) -> Bytes {
    payload(Place {
        term: place.term + 1 + number,
        index: place.index,
    })
}

struct Replica<W> {
    log: Log,
    snapshots: SnapshotStore,
    rng: StdRng,
    out: W,
    vote: Option<Ballot>,
    purged: Option<Place>,
    committed: Option<Place>,
    snapshot: Option<Place>,
    entries: VecDeque<Place>,
    bytes: u64,
}

/// Opens the replica in folder `path`, checks every byte, and writes until power fails.
///
/// # Errors
/// The folder cannot be opened or holds wrong bytes; or the disk refused, which it does once power has failed.
pub async fn run(
    path: &Path,
    seed: u64,
    durability: Durability,
    out: impl Write,
) -> anyhow::Result<()> {
    let (mut replica, found) = open(path, seed, durability, out).await?;
    replica.tell(&Message::Found(Box::new(found)))?;
    if let Err(error) = replica.live().await {
        replica.tell(&Message::Failed(format!("{error:#}")))?;
    }
    Ok(())
}

async fn open<W: Write>(
    path: &Path,
    seed: u64,
    durability: Durability,
    out: W,
) -> anyhow::Result<(Replica<W>, Found)> {
    let created = !DataDir::is_used(path)?;
    let dir = if created {
        let identity = Identity {
            replica_id: REPLICA,
            cluster_name: CLUSTER.into(),
            cluster_id: 0,
        };
        DataDir::create(path, identity)?
    } else {
        DataDir::open(path, CLUSTER)?
    };
    ensure!(
        dir.identity().replica_id == REPLICA,
        "another replica's folder"
    );
    let snapshots = SnapshotStore::folder(&dir.snapshots_path())?;
    let mut log = match durability {
        Durability::Full => Log::open(&dir.log_path())?,
        Durability::FlushOnly => Log::open_flush_only(&dir.log_path())?,
    };
    let state = RaftLogStorage::<C>::get_log_state(&mut log).await?;
    let vote = RaftLogReader::<C>::read_vote(&mut log).await?;
    let committed = RaftLogStorage::<C>::read_committed(&mut log).await?;
    let stored = RaftLogReader::<C>::try_get_log_entries(&mut log, ..).await?;
    let mut runs: Vec<Run> = Vec::new();
    let mut entries = VecDeque::new();
    let mut bytes = 0;
    for found in &stored {
        let at = place(found.log_id);
        ensure!(
            *found == entry(at),
            "entry {at:?} has other content than it was given"
        );
        match runs.last_mut() {
            Some(run) if run.term == at.term && run.last + 1 == at.index => run.last = at.index,
            _ => runs.push(Run {
                first: at.index,
                last: at.index,
                term: at.term,
            }),
        }
        bytes += size_bytes(at) as u64;
        entries.push_back(at);
    }
    let found = Found {
        created,
        vote: vote.map(|vote| Ballot {
            term: vote.leader_id.term,
            candidate: vote.leader_id.voted_for,
        }),
        purged: state.last_purged_log_id.map(place),
        last: state.last_log_id.map(place),
        entries: runs,
        committed: committed.map(place),
        snapshot: newest_snapshot(&snapshots)?,
    };
    let replica = Replica {
        log,
        snapshots,
        rng: StdRng::seed_from_u64(seed),
        out,
        vote: found.vote,
        purged: found.purged,
        committed: found.committed,
        snapshot: found.snapshot,
        entries,
        bytes,
    };
    Ok((replica, found))
}

/// The newest snapshot, every byte of it checked. One that is damaged fails: no cut may leave it under its name.
fn newest_snapshot(snapshots: &SnapshotStore) -> anyhow::Result<Option<Place>> {
    let Some(newest) = snapshots.newest()? else {
        return Ok(None);
    };
    let at = newest.meta().last_log_id.context("a snapshot of nothing")?;
    let at = place(at);
    let chunks: Vec<Bytes> = newest.read()?.collect::<Result<_, _>>()?;
    let wanted: Vec<Bytes> = (0..SNAPSHOT_CHUNKS)
        .map(|number| chunk(at, number))
        .collect();
    ensure!(
        chunks == wanted,
        "snapshot {at:?} has other content than it was given"
    );
    Ok(Some(at))
}

impl<W: Write> Replica<W> {
    fn tell(&mut self, message: &Message) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        self.out.write_all(&line)?;
        Ok(self.out.flush()?)
    }

    fn last(&self) -> Option<Place> {
        self.entries.back().copied().or(self.purged)
    }

    async fn live(&mut self) -> anyhow::Result<()> {
        // Some lives are all about one thing.
        let large = self.rng.random_ratio(1, 4);
        loop {
            match self.rng.random_range(0..100) {
                0..60 => self.append(large).await?,
                60..75 => self.vote().await?,
                75..85 => self.commit()?,
                85..90 => self.truncate().await?,
                90..95 => self.take_snapshot()?,
                _ => self.purge().await?,
            }
            if self.bytes > MAX_LOG_BYTES {
                self.commit()?;
                self.take_snapshot()?;
                self.purge().await?;
            }
        }
    }

    async fn append(&mut self, large: bool) -> anyhow::Result<()> {
        let mut under_way: Vec<Durable> = Vec::new();
        for _ in 0..self.rng.random_range(1..4) {
            let term = self.vote.map_or(1, |vote| vote.term.max(1));
            let term = self.last().map_or(term, |last| last.term.max(term));
            let first = self.last().map_or(0, |last| last.index + 1);
            let count = self.rng.random_range(1..if large { 120 } else { 12 });
            let run = Run {
                first,
                last: first + count - 1,
                term,
            };
            let places = (run.first..=run.last).map(|index| Place { term, index });
            self.tell(&Message::Begin(Op::Append(run)))?;
            let (done, durable) = <R as AsyncRuntime>::Oneshot::channel();
            let entries: Vec<Entry> = places.clone().map(entry).collect();
            self.log
                .append(entries, IOFlushed::<C>::signal(done))
                .await?;
            for at in places {
                self.bytes += size_bytes(at) as u64;
                self.entries.push_back(at);
            }
            under_way.push(durable);
        }
        for durable in under_way {
            durable.await.context("the log has stopped")??;
            self.tell(&Message::Done)?;
        }
        Ok(())
    }

    /// A candidate asks for a vote, often in a term that this replica has voted in.
    async fn vote(&mut self) -> anyhow::Result<()> {
        let known = self.vote.map_or(1, |vote| vote.term);
        let asked = Ballot {
            term: known + u64::from(self.rng.random_ratio(1, 3)),
            candidate: self.rng.random_range(1..4),
        };
        let refused = self
            .vote
            .is_some_and(|vote| vote.term == asked.term && vote.candidate != asked.candidate);
        if refused {
            return Ok(());
        }
        self.tell(&Message::Begin(Op::Vote(asked)))?;
        let vote = Vote::new(asked.term, asked.candidate);
        RaftLogStorage::<C>::save_vote(&mut self.log, &vote).await?;
        self.vote = Some(asked);
        self.tell(&Message::Done)
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        let Some(at) = self.pick(self.committed) else {
            return Ok(());
        };
        self.tell(&Message::Committed(at))?;
        self.committed = Some(at);
        // Returns at once: it only leaves the mark for the next write.
        let mut log = self.log.clone();
        let saved = RaftLogStorage::<C>::save_committed(&mut log, Some(log_id(at)));
        let mut saved = std::pin::pin!(saved);
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match saved.as_mut().poll(&mut context) {
            std::task::Poll::Ready(result) => Ok(result?),
            std::task::Poll::Pending => bail!("save_committed waits for something"),
        }
    }

    /// An entry after `after`, the later the more likely.
    fn pick(&mut self, after: Option<Place>) -> Option<Place> {
        let from = self
            .entries
            .partition_point(|at| Some(at.index) <= after.map(|after| after.index));
        if from >= self.entries.len() {
            return None;
        }
        let one = self.rng.random_range(from..self.entries.len());
        let other = self.rng.random_range(from..self.entries.len());
        self.entries.get(one.max(other)).copied()
    }

    async fn truncate(&mut self) -> anyhow::Result<()> {
        let Some(keep) = self.pick(self.committed) else {
            return Ok(());
        };
        self.tell(&Message::Begin(Op::Truncate(Some(keep))))?;
        self.log.truncate_after(Some(log_id(keep))).await?;
        while let Some(at) = self.entries.pop_back_if(|at| at.index > keep.index) {
            self.bytes -= size_bytes(at) as u64;
        }
        // What was removed is written anew by a leader of a later term.
        let vote = Ballot {
            term: self.vote.map_or(1, |vote| vote.term).max(keep.term) + 1,
            candidate: 1,
        };
        self.tell(&Message::Done)?;
        self.tell(&Message::Begin(Op::Vote(vote)))?;
        let saved = Vote::new(vote.term, vote.candidate);
        RaftLogStorage::<C>::save_vote(&mut self.log, &saved).await?;
        self.vote = Some(vote);
        self.tell(&Message::Done)
    }

    fn take_snapshot(&mut self) -> anyhow::Result<()> {
        let Some(at) = self.committed.filter(|at| Some(*at) > self.snapshot) else {
            return Ok(());
        };
        self.tell(&Message::Begin(Op::Snapshot(at)))?;
        let meta = SnapshotMeta {
            last_log_id: Some(log_id(at)),
            last_membership: StoredMembership::default(),
        };
        let mut writer = self.snapshots.create(meta)?;
        for number in 0..SNAPSHOT_CHUNKS {
            writer.chunk(chunk(at, number))?;
        }
        writer.finish()?;
        self.snapshot = Some(at);
        self.tell(&Message::Done)
    }

    async fn purge(&mut self) -> anyhow::Result<()> {
        let upto = self.snapshot.filter(|at| {
            Some(at.index) > self.purged.map(|purged| purged.index)
                && self
                    .entries
                    .back()
                    .is_some_and(|last| last.index > at.index)
        });
        let Some(upto) = upto else { return Ok(()) };
        self.tell(&Message::Begin(Op::Purge(upto)))?;
        self.log.purge(log_id(upto)).await?;
        self.purged = Some(upto);
        while let Some(at) = self.entries.pop_front_if(|at| at.index <= upto.index) {
            self.bytes -= size_bytes(at) as u64;
        }
        self.tell(&Message::Done)
    }
}
