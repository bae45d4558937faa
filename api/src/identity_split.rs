//! How the 24 bits of a security identity are divided between clusters and their own numbers.

use std::ops::RangeInclusive;

use serde::{Deserialize, Serialize};

/// Largest identity number that is reserved and belongs to no cluster.
pub const RESERVED_IDENTITY_MAX: u32 = 255;
/// Reserved identity: the node itself. Read as [`IDENTITY_REMOTE_NODE`] when a peer says it.
pub const IDENTITY_HOST: u32 = 1;
/// Reserved identity: outside the mesh.
pub const IDENTITY_WORLD: u32 = 2;
/// Reserved identity: the health address of a node.
pub const IDENTITY_HEALTH: u32 = 4;
/// Reserved identity: another node.
pub const IDENTITY_REMOTE_NODE: u32 = 6;
/// Reserved identity: the ingress address of a node.
pub const IDENTITY_INGRESS: u32 = 8;

/// Which of the two divisions the whole mesh uses (`max-connected-clusters`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum IdentitySplit {
    /// 255 clusters of 65,535 identities.
    #[default]
    Clusters255,
    /// 511 clusters of 32,767 identities.
    Clusters511,
}

/// A number that the division has no place for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NumberingError {
    /// Neither 255 nor 511.
    #[error("max-connected-clusters {0} is not 255 or 511")]
    MaxConnectedClusters(u32),
    /// 0, or more than the division has.
    #[error("cluster id {id} is not within 1..={max}")]
    ClusterId {
        /// The id asked for.
        id: u32,
        /// Largest id.
        max: u32,
    },
    /// 0, or more than the division has.
    #[error("local identity {local} is not within 1..={max}")]
    Local {
        /// The local number asked for.
        local: u32,
        /// Largest local number.
        max: u32,
    },
}

impl TryFrom<u32> for IdentitySplit {
    type Error = NumberingError;

    fn try_from(max_connected_clusters: u32) -> Result<Self, NumberingError> {
        match max_connected_clusters {
            255 => Ok(Self::Clusters255),
            511 => Ok(Self::Clusters511),
            other => Err(NumberingError::MaxConnectedClusters(other)),
        }
    }
}

impl From<IdentitySplit> for u32 {
    fn from(split: IdentitySplit) -> Self {
        split.max_cluster_id()
    }
}

impl IdentitySplit {
    /// Bits of an identity that are local to its cluster.
    #[must_use]
    pub const fn local_bits(self) -> u8 {
        match self {
            Self::Clusters255 => 16,
            Self::Clusters511 => 15,
        }
    }

    /// Largest cluster id, also the value of `max-connected-clusters`.
    #[must_use]
    pub const fn max_cluster_id(self) -> u32 {
        match self {
            Self::Clusters255 => 255,
            Self::Clusters511 => 511,
        }
    }

    /// Largest local number.
    #[must_use]
    pub const fn max_local(self) -> u32 {
        (1 << self.local_bits()) - 1
    }

    /// The cluster that an identity belongs to; 0 for reserved ones.
    #[must_use]
    pub const fn cluster_of(self, identity: u32) -> u32 {
        identity >> self.local_bits()
    }

    /// Checks a cluster id.
    ///
    /// # Errors
    /// 0, or more than the division has.
    pub const fn check_cluster_id(self, id: u32) -> Result<(), NumberingError> {
        let max = self.max_cluster_id();
        if id == 0 || id > max {
            return Err(NumberingError::ClusterId { id, max });
        }
        Ok(())
    }

    /// The identity of a local number of a cluster.
    ///
    /// # Errors
    /// One of the two is out of range.
    pub const fn identity(self, cluster_id: u32, local: u32) -> Result<u32, NumberingError> {
        if let Err(error) = self.check_cluster_id(cluster_id) {
            return Err(error);
        }
        let max = self.max_local();
        if local == 0 || local > max {
            return Err(NumberingError::Local { local, max });
        }
        Ok((cluster_id << self.local_bits()) | local)
    }

    /// All identities that a cluster may number its label sets with.
    ///
    /// # Errors
    /// The cluster id is out of range.
    pub const fn identities_of(
        self,
        cluster_id: u32,
    ) -> Result<RangeInclusive<u32>, NumberingError> {
        if let Err(error) = self.check_cluster_id(cluster_id) {
            return Err(error);
        }
        let base = cluster_id << self.local_bits();
        Ok(base..=base | self.max_local())
    }
}

/// True for an identity that belongs to no cluster.
#[must_use]
pub const fn is_reserved(identity: u32) -> bool {
    identity <= RESERVED_IDENTITY_MAX
}
