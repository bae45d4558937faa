//! What the process on the failing disk tells the rig, a line of JSON each: before an operation, and after it.

use serde::{Deserialize, Serialize};

/// Term and index of a log entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// Index first in meaning, but a log orders by term, then index.
    pub term: u64,
    /// Index of the entry.
    pub index: u64,
}

/// A granted vote.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ballot {
    /// Its term.
    pub term: u64,
    /// The candidate that got it.
    pub candidate: u64,
}

/// Consecutive entries of one term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// First index.
    pub first: u64,
    /// Last index, inclusive.
    pub last: u64,
    /// Their term.
    pub term: u64,
}

/// What a process finds when it opens the folder.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// No replica was there, so one was made.
    pub created: bool,
    /// The vote.
    pub vote: Option<Ballot>,
    /// Everything up to here is gone.
    pub purged: Option<Place>,
    /// The log's end.
    pub last: Option<Place>,
    /// The entries, each with the content that it must have.
    pub entries: Vec<Run>,
    /// The committed mark.
    pub committed: Option<Place>,
    /// The newest snapshot, whole.
    pub snapshot: Option<Place>,
}

/// A change that must be durable once it is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Op {
    /// Entries are added.
    Append(Run),
    /// Entries after this one are removed.
    Truncate(Option<Place>),
    /// Entries up to this one are removed.
    Purge(Place),
    /// A vote is granted.
    Vote(Ballot),
    /// A snapshot is written.
    Snapshot(Place),
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Message {
    /// The folder is open.
    Found(Box<Found>),
    /// This begins.
    Begin(Op),
    /// The oldest that began is acknowledged.
    Done,
    /// The committed mark is set; durable with the next change of the log that begins after it.
    Committed(Place),
    /// The disk refused.
    Failed(String),
}
