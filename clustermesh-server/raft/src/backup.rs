//! A copy of the state for backups: the newest snapshot, once it covers everything that was applied.

use std::time::Duration;

use clustermesh_store::SnapshotFile;
use openraft::async_runtime::{AsyncRuntime, WatchReceiver};

use crate::{error::ReadError, replica::Replica};

/// How long a snapshot for a backup may take.
const BACKUP_TIMEOUT_MS: u64 = 600_000;

impl<R: AsyncRuntime> Replica<R> {
    /// A snapshot of at least what is applied here now. Writers are not kept waiting.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] when the replica has stopped or the snapshot cannot be written, [`ReadError::Diverged`] where
    /// the data is not the group's.
    pub async fn backup(&self) -> Result<SnapshotFile, ReadError> {
        self.check_not_diverged()?;
        let wanted = self.status().applied_index;
        let mut metrics = self.raft().metrics();
        let mut asked = false;
        let done = async {
            loop {
                let (covered, running) = {
                    let now = metrics.borrow_and_update();
                    let index = now.snapshot.as_ref().map(|snapshot| snapshot.index);
                    (
                        index.is_some_and(|index| index >= wanted),
                        now.running_state.is_ok(),
                    )
                };
                if covered {
                    return Ok(());
                }
                if !running {
                    return Err(ReadError::Stopped);
                }
                if !asked {
                    self.snapshot().await?;
                    asked = true;
                }
                metrics.changed().await.map_err(|_| ReadError::Stopped)?;
            }
        };
        R::timeout(Duration::from_millis(BACKUP_TIMEOUT_MS), done)
            .await
            .map_err(|_| ReadError::Stopped)??;
        let snapshot = self
            .raft()
            .get_snapshot()
            .await
            .map_err(|_| ReadError::Stopped)?
            .ok_or(ReadError::Stopped)?;
        Ok(snapshot.snapshot)
    }
}
