//! One file of the volatile disk: what its readers see, what would survive, and the changes between the two.

use rand::{Rng, RngExt as _};

use super::Mode;

/// What a disk writes whole or not at all, bytes.
pub const SECTOR_BYTES: usize = 512;

/// A change that no sync has covered yet.
#[derive(Debug)]
enum Change {
    Write { offset: usize, data: Vec<u8> },
    Resize { bytes: usize },
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, data } => {
                let end = offset + data.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*offset..end].copy_from_slice(data);
            }
            Self::Resize { bytes } => content.resize(*bytes, 0),
        }
    }
}

/// A file: its content, its durable content, and the changes in between with their place among all of the disk.
#[derive(Debug, Default)]
pub(super) struct File {
    current: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(u64, Change)>,
    /// Bytes written since the last sync.
    pub(super) volatile_bytes: u64,
}

impl File {
    pub(super) fn len(&self) -> usize {
        self.current.len()
    }

    pub(super) fn read(&self, offset: usize, bytes: usize) -> &[u8] {
        let start = offset.min(self.current.len());
        let end = offset.saturating_add(bytes).min(self.current.len());
        &self.current[start..end]
    }

    pub(super) fn write(&mut self, at: u64, offset: usize, data: &[u8]) {
        let change = Change::Write {
            offset,
            data: data.to_vec(),
        };
        change.apply(&mut self.current);
        self.volatile_bytes += data.len() as u64;
        self.pending.push((at, change));
    }

    pub(super) fn resize(&mut self, at: u64, bytes: usize) {
        let change = Change::Resize { bytes };
        change.apply(&mut self.current);
        self.pending.push((at, change));
    }

    pub(super) fn sync(&mut self) {
        for (_, change) in self.pending.drain(..) {
            change.apply(&mut self.durable);
        }
        self.volatile_bytes = 0;
    }

    /// A sync that failed: readers still see what was written, but no later sync will write it. This is what Linux
    /// does when it marks pages clean that it could not write.
    pub(super) fn fail_sync(&mut self) {
        self.pending.clear();
        self.volatile_bytes = 0;
    }

    /// The file that is found when power is back.
    pub(super) fn cut(&self, mode: Mode, rng: &mut impl Rng) -> Self {
        let mut seen = self.durable.clone();
        let mut kept = self.durable.clone();
        for (at, change) in &self.pending {
            change.apply(&mut seen);
            let (offset, data) = match change {
                Change::Resize { bytes } => {
                    if mode.keeps(*at, rng) {
                        kept.resize(*bytes, 0);
                    }
                    continue;
                }
                Change::Write { offset, data } => (*offset, data),
            };
            let sectors = offset / SECTOR_BYTES..(offset + data.len()).div_ceil(SECTOR_BYTES);
            // A torn write keeps its first sectors only.
            let torn_at = match mode {
                Mode::Each if rng.random_ratio(1, 3) => rng.random_range(sectors.clone()),
                _ => sectors.end,
            };
            let keeps_all = mode.keeps(*at, rng);
            for sector in sectors {
                let keep = match mode {
                    Mode::EachSector => rng.random(),
                    _ => keeps_all && sector < torn_at,
                };
                let start = sector * SECTOR_BYTES;
                // The length may have been written although the data was not.
                let end = (start + SECTOR_BYTES).min(offset + data.len());
                let grows = keep || (mode.is_unordered() && rng.random_ratio(1, 64));
                if grows && kept.len() < end {
                    kept.resize(end, 0);
                }
                if keep {
                    let end = (start + SECTOR_BYTES).min(seen.len()).min(kept.len());
                    kept[start..end].copy_from_slice(&seen[start..end]);
                }
            }
        }
        Self {
            current: kept.clone(),
            durable: kept,
            pending: Vec::new(),
            volatile_bytes: 0,
        }
    }
}
