//! Copies of peers: which keys they may write, and the cursors that say how far they are.

use bytes::Bytes;

use crate::{error::KvError, pb};

/// How far the copy of one peer has come. Raft state outside the keyspace: it never moves the revision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCursor {
    /// Name of the peer.
    pub cluster: String,
    /// The peer's store that `revision` belongs to.
    pub store_id: u64,
    /// Revision of that store up to which everything is copied.
    pub revision: i64,
    /// Whether a complete copy of that store has been taken.
    pub synced: bool,
}

/// A cursor with what only apply needs of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CopyPlace {
    pub(crate) cursor: PeerCursor,
    /// Of the last applied step of the copy; 0 where none was numbered yet.
    pub(crate) sequence: u64,
}

/// What a peer's copy holds below `cilium/cache/`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PeerUsage {
    /// Live records.
    pub records: u64,
    /// Their keys and values, bytes.
    pub bytes: u64,
}

impl PeerUsage {
    pub(crate) const fn add(&mut self, key: &[u8], value: &[u8]) {
        self.records += 1;
        self.bytes += key.len() as u64 + value.len() as u64;
    }

    pub(crate) const fn remove(&mut self, key: &[u8], value: &[u8]) {
        self.records = self.records.saturating_sub(1);
        self.bytes = self
            .bytes
            .saturating_sub(key.len() as u64 + value.len() as u64);
    }
}

/// The peer that a copied record is counted for: `cilium/cache/<kind>/<version>/<peer>/…`.
pub(crate) fn cached_cluster(key: &[u8]) -> Option<&[u8]> {
    let mut parts = key
        .strip_prefix(b"cilium/cache/")?
        .splitn(4, |byte| *byte == b'/')
        .skip(2);
    let cluster = parts.next()?;
    // Something must follow.
    parts.next().map(|_| cluster)
}

/// Checks a peer copy: all its keys lie in ranges that copies may write.
///
/// # Errors
/// [`KvError::PeerClusterMissing`], [`KvError::EmptyKey`], [`KvError::PeerKeyNotAllowed`].
pub fn check_peer_copy(request: &pb::PeerCopy) -> Result<(), KvError> {
    if request.cluster.is_empty() {
        return Err(KvError::PeerClusterMissing);
    }
    for change in &request.changes {
        if change.key.is_empty() {
            return Err(KvError::EmptyKey);
        }
        if !is_copy_key(&request.cluster, &change.key) {
            return Err(KvError::PeerKeyNotAllowed {
                cluster: request.cluster.clone(),
                key: escaped(&change.key),
            });
        }
    }
    Ok(())
}

fn is_copy_key(cluster: &str, key: &Bytes) -> bool {
    if key.starts_with(b"cilium/cache/") {
        return true;
    }
    if let Some(rest) = key.strip_prefix(b"cilium/synced/") {
        return rest
            .strip_prefix(cluster.as_bytes())
            .is_some_and(|rest| rest.first() == Some(&b'/'));
    }
    key.strip_prefix(b"cilium/cluster-config/")
        .is_some_and(|rest| rest == cluster.as_bytes())
}

fn escaped(key: &[u8]) -> String {
    key.escape_ascii().to_string()
}
