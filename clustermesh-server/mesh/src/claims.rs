//! Node sessions: what a machine may claim, and the records that the server writes for it.

mod endpoint;
mod node;
mod sync;

use std::net::IpAddr;

use clustermesh_api::address::{AddressError, parse_address};
use clustermesh_api::v1::refused::Reason;
use ipnetwork::IpNetwork;

use crate::allocate::AllocateError;

pub use endpoint::{plan_delete_endpoint, plan_readiness, plan_upsert};
pub(crate) use node::clear_endpoints;
pub use node::{
    KIND_NODE, MAX_UNDERLAY_ADDRESSES, NodeMemo, is_connected, plan_hello, plan_remove_node,
    plan_session, remove_node,
};
pub use sync::{SyncProgress, plan_sync};

/// First host number of a node's pod CIDR that a pod may have; below are network, router and health addresses.
pub const FIRST_POD_INDEX: u128 = 4;
/// Host number of a node's router address in its pod CIDR.
pub const ROUTER_INDEX: u128 = 1;
/// Host number of a node's health address in its pod CIDR.
pub const HEALTH_INDEX: u128 = 2;

/// Why a claim of a machine is refused. The text names the object; [`ClaimError::reason`] goes on the wire.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    /// The node's name breaks the rule of names.
    #[error("node name: {0}")]
    Name(String),
    /// Text that is no address.
    #[error("{object}: {source}")]
    Address {
        /// Whose address.
        object: String,
        /// What is wrong.
        source: AddressError,
    },
    /// Too few or too many of something.
    #[error("{object} has {count} {what}, 1 to {limit} are taken")]
    Count {
        /// Who.
        object: String,
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// Most that are taken.
        limit: usize,
    },
    /// A text that is longer than any real one.
    #[error("{object}: a label, version or id has {bytes} bytes, at most {limit} are taken")]
    TooLong {
        /// Who.
        object: String,
        /// How long.
        bytes: usize,
        /// Longest that is taken.
        limit: usize,
    },
    /// An underlay address that cannot be one.
    #[error("node {node}: {address} cannot be the address of a machine on the underlay")]
    UnusableUnderlay {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
    },
    /// An underlay address out of the mesh's own ranges.
    #[error(
        "node {node}: underlay address {address} lies in {range}, which this cluster gives out itself"
    )]
    UnderlayInRange {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// Pod or service CIDR of the cluster.
        range: IpNetwork,
    },
    /// Another node has the underlay address.
    #[error(
        "node {node}: underlay address {address} belongs to node {holder}; if {holder} is gone, remove it with \
         `clustermesh delete node {holder}`"
    )]
    UnderlayTaken {
        /// The node that asks.
        node: String,
        /// The address.
        address: IpAddr,
        /// The node that has it.
        holder: String,
    },
    /// What a node gives as its WireGuard key is none.
    #[error("{0}: a WireGuard key is 44 characters of base64, with a UDP port above 0")]
    WireguardKey(String),
    /// No pod CIDR for the node.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The node has not introduced itself.
    #[error("node {0} has no record: its session must begin with Hello")]
    UnknownNode(String),
    /// The address is not out of the node's pod CIDRs.
    #[error("node {node} may not claim {address}: its pod CIDRs are {cidrs}")]
    NotOwned {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// Its pod CIDRs.
        cidrs: String,
    },
    /// The address is in the node's pod CIDR, but not for pods.
    #[error(
        "node {node} may not claim {address}: it is reserved in pod CIDR {cidr} (network, router, health or broadcast)"
    )]
    ReservedAddress {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// The pod CIDR.
        cidr: IpNetwork,
    },
    /// The address record is of another node.
    #[error("node {node} may not change {address}: it is held by node {holder}")]
    HeldByOther {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
        /// The node that holds it.
        holder: String,
    },
    /// The node has no such endpoint.
    #[error("node {node} has no endpoint with address {address}")]
    NoEndpoint {
        /// The node.
        node: String,
        /// The address.
        address: IpAddr,
    },
    /// No Workload of that name was applied.
    #[error("Workload {namespace}/{name} does not exist: apply it with `clustermesh apply`")]
    UnknownWorkload {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
    },
    /// The name is in use on another node that is alive.
    #[error("Workload {namespace}/{name} runs on node {holder}, which is connected")]
    NameTaken {
        /// Namespace.
        namespace: String,
        /// Name.
        name: String,
        /// The node.
        holder: String,
    },
    /// A Workload or node that has open business.
    #[error("node {0} is connected: stop its agent first")]
    Connected(String),
    /// A stored record cannot be read.
    #[error("{object}: the stored record is damaged: {reason}")]
    Damaged {
        /// The record.
        object: String,
        /// What is wrong.
        reason: String,
    },
}

impl ClaimError {
    /// The reason as `Refused` says it.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Self::Name(_)
            | Self::Address { .. }
            | Self::UnusableUnderlay { .. }
            | Self::WireguardKey(_)
            | Self::Damaged { .. } => Reason::Invalid,
            Self::Count { .. } | Self::TooLong { .. } | Self::Allocate(_) => Reason::Limit,
            Self::UnderlayInRange { .. }
            | Self::UnderlayTaken { .. }
            | Self::NameTaken { .. }
            | Self::Connected(_) => Reason::Conflict,
            Self::UnknownWorkload { .. } => Reason::UnknownWorkload,
            Self::UnknownNode(_)
            | Self::NotOwned { .. }
            | Self::ReservedAddress { .. }
            | Self::HeldByOther { .. }
            | Self::NoEndpoint { .. } => Reason::NotOwned,
        }
    }
}

fn parse_all(
    object: &str,
    what: &'static str,
    addresses: &[String],
    limit: usize,
) -> Result<Vec<IpAddr>, ClaimError> {
    let count = addresses.len();
    if count == 0 || count > limit {
        return Err(ClaimError::Count {
            object: object.to_owned(),
            what,
            count,
            limit,
        });
    }
    let mut parsed = Vec::with_capacity(count);
    for text in addresses {
        let address = parse_address(text).map_err(|source| ClaimError::Address {
            object: object.to_owned(),
            source,
        })?;
        if !parsed.contains(&address) {
            parsed.push(address);
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests;
