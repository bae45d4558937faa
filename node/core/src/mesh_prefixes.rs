//! The mesh's prefixes as this node has learnt them: what strict mode guards where no record says who has an address.
//!
//! They are kept over restarts and boots, for as long as nobody who knows says that they are gone: a source that is
//! silent, or whose copy is not complete, takes nothing away.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use clustermesh_ebpf_abi::{
    MESH_LISTED, MESH_NODES, MESH_PODS, MESH_PREFIXES_MAX, MeshKey, MeshValue, V4_MAPPED_BITS,
};
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::settings::EncryptionSettings;
use crate::tables;

/// Prefixes that are learnt at most: the rest of the map is room for the operator's, and for those not removed yet.
pub const MESH_PREFIXES_LEARNT_MAX: usize = MESH_PREFIXES_MAX as usize / 8 * 7;
/// A prefix that complete records do not name stays so long, milliseconds.
pub const MESH_PREFIX_GRACE_MS: u64 = 600_000;

/// What lives at a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PrefixKind {
    /// Pods.
    Pods,
    /// A node itself.
    Node,
}

/// A prefix of the mesh, and the cluster that has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MeshPrefix {
    /// The cluster.
    pub cluster: Box<str>,
    /// What lives there.
    pub kind: PrefixKind,
    /// The prefix.
    pub prefix: IpNetwork,
}

/// What needs not be learnt.
#[derive(Clone, Copy, Debug)]
pub struct FixedPrefixes<'a> {
    /// Own cluster.
    pub cluster: &'a str,
    /// Its pod CIDRs.
    pub ranges: &'a [IpNetwork],
    /// What the operator lists.
    pub listed: &'a [IpNetwork],
    /// This node's addresses: what goes to the host itself does not leave.
    pub addresses: &'a [IpAddr],
}

/// What has been learnt, and since when the records do not name it any more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MeshPrefixes {
    learnt: BTreeMap<MeshPrefix, Option<u64>>,
    left_out: usize,
}

impl MeshPrefixes {
    /// What an earlier run has learnt; past [`MESH_PREFIXES_LEARNT_MAX`] nothing is taken.
    #[must_use]
    pub fn restored(stored: impl IntoIterator<Item = MeshPrefix>) -> Self {
        Self {
            learnt: stored
                .into_iter()
                .take(MESH_PREFIXES_LEARNT_MAX)
                .map(|prefix| (prefix, None))
                .collect(),
            left_out: 0,
        }
    }

    /// Takes what the records name now. `is_complete` says of a cluster whether what they do not name of it is gone; such
    /// prefixes go [`MESH_PREFIX_GRACE_MS`] later, because a store that was made anew lacks what comes back soon. True if
    /// prefixes came or went.
    pub fn learn(
        &mut self,
        named: BTreeSet<MeshPrefix>,
        is_complete: impl Fn(&str) -> bool,
        now_ms: u64,
    ) -> bool {
        let before = self.learnt.len();
        self.learnt.retain(|held, absent_since_ms| {
            if named.contains(held) || !is_complete(&held.cluster) {
                *absent_since_ms = None;
                return true;
            }
            let since_ms = *absent_since_ms.get_or_insert(now_ms);
            now_ms.saturating_sub(since_ms) < MESH_PREFIX_GRACE_MS
        });
        let mut has_changed = self.learnt.len() != before;
        self.left_out = 0;
        for prefix in named {
            if self.learnt.contains_key(&prefix) {
                continue;
            }
            if self.learnt.len() < MESH_PREFIXES_LEARNT_MAX {
                self.learnt.insert(prefix, None);
                has_changed = true;
            } else {
                self.left_out += 1;
            }
        }
        has_changed
    }

    /// What is absent has been so from now on only: the records were out of reach, which says nothing.
    pub fn restart_grace(&mut self, now_ms: u64) {
        for since_ms in self.learnt.values_mut().flatten() {
            *since_ms = now_ms;
        }
    }

    /// True if a prefix waits for its end: time alone changes something.
    #[must_use]
    pub fn has_absent(&self) -> bool {
        self.learnt.values().any(Option::is_some)
    }

    /// What has been learnt, sorted.
    pub fn iter(&self) -> impl Iterator<Item = &MeshPrefix> {
        self.learnt.keys()
    }

    /// Prefixes that found no place.
    #[must_use]
    pub fn left_out(&self) -> usize {
        self.left_out
    }

    /// The kernel's entries. Prefixes of clusters that are not to be encrypted are exceptions from shorter ones.
    #[must_use]
    pub fn entries(
        &self,
        settings: &EncryptionSettings,
        fixed: &FixedPrefixes<'_>,
    ) -> HashMap<MeshKey, MeshValue> {
        let mut entries: HashMap<MeshKey, MeshValue> = HashMap::new();
        let mut add = |prefix: IpNetwork, flags: u32| {
            let entry = entries.entry(mesh_key(prefix));
            entry.or_insert(MeshValue { flags: 0 }).flags |= flags;
        };
        for MeshPrefix {
            cluster,
            kind,
            prefix,
        } in self.iter()
        {
            let flags = match kind {
                _ if !settings.covers(cluster, **cluster == *fixed.cluster) => 0,
                PrefixKind::Pods => MESH_PODS,
                PrefixKind::Node => MESH_NODES,
            };
            add(*prefix, flags);
        }
        if settings.covers(fixed.cluster, true) {
            for prefix in fixed.ranges {
                add(*prefix, MESH_PODS);
            }
        }
        for prefix in fixed.listed {
            add(*prefix, MESH_LISTED);
        }
        for ip in fixed.addresses {
            entries.insert(mesh_key((*ip).into()), MeshValue { flags: 0 });
        }
        entries
    }
}

/// The map's key of a prefix.
#[must_use]
pub fn mesh_key(prefix: IpNetwork) -> MeshKey {
    MeshKey {
        prefix_len_bits: match prefix {
            IpNetwork::V4(v4) => V4_MAPPED_BITS + u32::from(v4.prefix()),
            IpNetwork::V6(v6) => v6.prefix().into(),
        },
        address: tables::address(prefix.network()),
    }
}

#[cfg(test)]
mod tests;
