//! What a simulated disk does wrong.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;

/// Why a simulated disk takes no more writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFault {
    /// Writes and syncs fail: EIO.
    Failed,
    /// There is no space: ENOSPC.
    Full,
}

impl DiskFault {
    fn error(self) -> io::Error {
        match self {
            Self::Failed => io::Error::other("Input/output error"),
            Self::Full => io::ErrorKind::StorageFull.into(),
        }
    }
}

/// The state of a simulated disk; clones share it.
#[derive(Debug, Clone, Default)]
pub struct DiskFaults {
    fault: Arc<Mutex<Option<DiskFault>>>,
    refused_total: Arc<AtomicU64>,
}

impl DiskFaults {
    /// From now on every write fails so, or none.
    pub fn set(&self, fault: Option<DiskFault>) {
        *self.fault.lock() = fault;
    }

    /// Whether writes fail.
    #[must_use]
    pub fn is_faulty(&self) -> bool {
        self.fault.lock().is_some()
    }

    /// Writes of the log that failed.
    #[must_use]
    pub fn refused_total(&self) -> u64 {
        self.refused_total.load(Ordering::Relaxed)
    }

    pub(crate) fn check(&self) -> io::Result<()> {
        let fault = *self.fault.lock();
        fault.map_or(Ok(()), |fault| Err(fault.error()))
    }

    /// Counts a refusal too: after one of the log, a replica is done.
    pub(crate) fn check_log(&self) -> io::Result<()> {
        self.check().inspect_err(|_| {
            self.refused_total.fetch_add(1, Ordering::Relaxed);
        })
    }
}
