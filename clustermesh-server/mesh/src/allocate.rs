//! Numbers and addresses that exist once per cluster: identities, pod CIDRs of nodes, virtual addresses.
//!
//! A planner reads a view and writes guards and changes into a [`Draft`]; the leader's allocator proposes
//! the transaction and plans again on a newer view when a guard fails.

mod identity;
mod pod_cidr;
mod virtual_address;

use std::net::IpAddr;

use bytes::Bytes;
use clustermesh_api::identity_split::NumberingError;
use ipnetwork::IpNetwork;

use crate::address::Family;
use crate::draft::Draft;
use crate::txn::Txn;
use crate::view::View;

pub use identity::{IDENTITIES_PER_RELEASE, Released, identity, plan_identity, plan_release};
pub use pod_cidr::{NodePodCidrs, assign_pod_cidrs, plan_pod_cidrs, pod_cidrs, release_pod_cidrs};
pub use virtual_address::{
    VIRTUAL_ADDRESS_QUARANTINE_MS, VirtualAddressRequest, release_virtual_addresses,
    virtual_addresses,
};

/// A transaction and what it gives when it succeeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan<T> {
    /// To be proposed; empty when the result is stored already.
    pub txn: Txn,
    /// The outcome once `txn` has succeeded.
    pub result: T,
}

/// Why something was not allocated.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// No number is free.
    #[error(
        "all {capacity} identities of cluster {cluster} are in use or in quarantine for one hour: remove Workloads \
         or use fewer distinct label sets"
    )]
    IdentitiesExhausted {
        /// This cluster.
        cluster: String,
        /// Numbers in the cluster's range.
        capacity: u32,
    },
    /// The label set names another cluster, or none.
    #[error("label set {labels:?} is not of cluster {cluster}")]
    ForeignLabels {
        /// The label set.
        labels: String,
        /// This cluster.
        cluster: String,
    },
    /// The cluster id has no place in the division of identities.
    #[error(transparent)]
    Numbering(#[from] NumberingError),
    /// Two label sets have one hash. With 128 bits this means a forged label set.
    #[error("label set {labels:?} has the hash of another one: change a label")]
    HashCollision {
        /// The label set that came second.
        labels: String,
    },
    /// No block is free.
    #[error(
        "no free /{mask} block for node {node} in pod CIDRs {cidrs}: add a pod CIDR or remove nodes"
    )]
    PodCidrsExhausted {
        /// The node.
        node: String,
        /// Size asked for, bits.
        mask: u8,
        /// The cluster's ranges of that family.
        cidrs: String,
    },
    /// The cluster has no pod CIDR at all.
    #[error("cluster {0} has no pod CIDR: set one in the server's configuration")]
    NoPodCidr(String),
    /// No address is free.
    #[error(
        "no free {family} address for Service {service} in service CIDRs {cidrs}: add a service CIDR or remove Services"
    )]
    VirtualAddressesExhausted {
        /// Namespace and name.
        service: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
        /// The cluster's ranges of that family.
        cidrs: String,
    },
    /// The cluster has no range of the family asked for.
    #[error(
        "Service {service} asks for {family}, but the cluster has no service CIDR of that family"
    )]
    NoServiceCidr {
        /// Namespace and name.
        service: String,
        /// `IPv4` or `IPv6`.
        family: &'static str,
    },
    /// Bookkeeping that this version cannot read.
    #[error("allocator record {key} is damaged: {reason}")]
    Damaged {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
}

fn plan<T>(
    view: &dyn View,
    decide: impl FnOnce(&mut Draft<'_>) -> Result<T, AllocateError>,
) -> Result<Plan<T>, AllocateError> {
    let mut draft = Draft::new(view);
    let result = decide(&mut draft)?;
    Ok(Plan {
        txn: draft.into_txn(),
        result,
    })
}

fn read_json<T: serde::de::DeserializeOwned>(key: &[u8], value: &[u8]) -> Result<T, AllocateError> {
    serde_json::from_slice(value).map_err(|error| AllocateError::Damaged {
        key: String::from_utf8_lossy(key).into_owned(),
        reason: error.to_string(),
    })
}

fn write_json<T: serde::Serialize>(value: &T) -> Bytes {
    // Bookkeeping records are flat structs of text and numbers, which serde_json always takes.
    serde_json::to_vec(value).unwrap_or_default().into()
}

fn join(cidrs: impl Iterator<Item = IpNetwork>) -> String {
    cidrs
        .map(|cidr| cidr.to_string())
        .collect::<Vec<_>>()
        .join(", ")
}

/// Keys of the allocator's bookkeeping; agents and peers never see them.
mod keys {
    use super::{Bytes, Family, IpAddr, IpNetwork};

    /// Value: [`super::identity::NumberRecord`] of a freed number.
    pub(super) fn quarantined_identity(id: u32) -> Bytes {
        format!("clustermesh.io/alloc/identities/{id}").into()
    }

    /// Value: label set and number. The hash keeps keys short, the value settles collisions.
    pub(super) fn label_set(labels: &str) -> Bytes {
        format!(
            "clustermesh.io/alloc/labels/{:032x}",
            fnv1a_128(labels.as_bytes())
        )
        .into()
    }

    /// Value: number given out last, decimal.
    pub(super) const IDENTITY_CURSOR: &str = "clustermesh.io/alloc/cursor/identity";

    /// Value: address given out last.
    pub(super) fn virtual_address_cursor(family: Family) -> Bytes {
        format!("clustermesh.io/alloc/cursor/vip-{}", family.name()).into()
    }

    pub(super) const POD_CIDRS: &str = "clustermesh.io/alloc/podcidrs/";

    pub(super) fn pod_cidr(cidr: IpNetwork) -> Bytes {
        format!("{POD_CIDRS}{cidr}").into()
    }

    pub(super) fn virtual_address(address: IpAddr) -> Bytes {
        format!("clustermesh.io/alloc/vips/{address}").into()
    }

    /// FNV-1a, 128 bits (draft-eastlake-fnv).
    fn fnv1a_128(bytes: &[u8]) -> u128 {
        const OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
        const PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;
        bytes.iter().fold(OFFSET, |hash, byte| {
            (hash ^ u128::from(*byte)).wrapping_mul(PRIME)
        })
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn hash_matches_the_published_vectors() {
            assert_eq!(
                super::fnv1a_128(b""),
                0x6c62_272e_07bb_0142_62b8_2175_6295_c58d
            );
            assert_eq!(
                super::fnv1a_128(b"a"),
                0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964
            );
        }
    }
}

#[cfg(test)]
mod tests;
