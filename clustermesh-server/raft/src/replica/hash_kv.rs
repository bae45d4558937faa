//! What a replica says of the hash of its keys.

use clustermesh_core::{KvError, KvHash};
use openraft::async_runtime::AsyncRuntime;

use super::Replica;
use crate::{error::ReadError, hash_kv};

impl<R: AsyncRuntime> Replica<R> {
    /// etcd's hash of all changes up to `revision` (0: the newest), as applied here, with the newest revision. Writers are not kept waiting.
    ///
    /// # Errors
    /// [`ReadError::Stopped`] when the state was replaced time and again; inside, [`KvError::Compacted`] and [`KvError::FutureRevision`].
    pub async fn hash_kv(
        &self,
        revision: i64,
    ) -> Result<Result<(KvHash, i64), KvError>, ReadError> {
        hash_kv::hash_kv(self.shared(), revision).await
    }

    /// Hashes that the newest compactions left: comparable between replicas that compacted at the same revisions.
    #[must_use]
    pub fn compaction_hashes(&self) -> Vec<KvHash> {
        self.shared().hashes.kept()
    }
}

#[cfg(test)]
mod tests {
    use clustermesh_core::pb::proposal::Command;

    use crate::{
        Replica,
        test_support::{memory, put},
    };

    #[tokio::test]
    async fn the_hash_of_a_compaction_is_that_of_before() {
        let replica: Replica<openraft_rt_tokio::TokioRuntime> =
            Replica::start(memory()).await.unwrap();
        for value in ["1", "2", "3"] {
            replica.propose(put("a", value, 0)).await.unwrap();
        }
        let (before, newest) = replica.hash_kv(3).await.unwrap().unwrap();
        assert_eq!((before.compact_revision, newest), (-1, 4));
        let compact = clustermesh_api::etcd::rpc::CompactionRequest {
            revision: 3,
            physical: false,
        };
        replica
            .propose(Command::Compact(compact).into())
            .await
            .unwrap();
        assert_eq!(replica.hash_kv(3).await.unwrap().unwrap().0, before);
        let now = replica.hash_kv(0).await.unwrap().unwrap().0;
        assert_eq!((now.compact_revision, now.revision), (3, 4));
        assert!(replica.hash_kv(2).await.unwrap().is_err());
        replica.shutdown().await;
    }
}
