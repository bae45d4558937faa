//! The Raft log and vote: durable on sled, or in memory; what both share.

mod durable;
mod memory;
mod tail;
mod writer;

pub use durable::{Closed, SledLog};
pub use memory::MemoryLog;

/// Entries handed to openraft in one read, bytes: bounds an append message too.
pub const MAX_READ_BYTES: usize = 4 << 20;
/// One entry, encoded, bytes.
pub const MAX_ENTRY_BYTES: usize = 8 << 20;

/// Size of a log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LogStats {
    /// First index still present, 0 when nothing was written.
    pub first_index: u64,
    /// Last index written, 0 when nothing was written.
    pub last_index: u64,
    /// Files of the log, bytes; for the in-memory log the bytes of its entries.
    pub bytes: u64,
}

#[cfg(test)]
mod tests;
