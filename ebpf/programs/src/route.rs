//! Where a packet from a pod or from the host goes.

use aya_ebpf::maps::lpm_trie::Key;
use clustermesh_ebpf_abi::{
    DropReason, ENDPOINT_HOST, EndpointValue, IPCACHE_PREFIX_BASE_BITS, IpcacheValue,
    NODE_INDEX_LOCAL, NodeConfig, TrafficPath,
};

use crate::deliver::{ToNode, to_endpoint, to_node};
use crate::frame::Frame;
use crate::maps::{ENDPOINTS, IPCACHE, IpcacheData};
use crate::parse::{Family, Packet, Words, in_network};
use crate::verdict::Action;

/// Where a packet goes that is not finished here.
pub enum Next {
    /// Finished.
    Done(Action),
    /// An address of the host.
    Host,
    /// In this node's pod CIDR, but no pod has it.
    UnknownPod,
    /// Not an address that the mesh knows.
    Elsewhere,
    /// For another node, but larger than the path takes.
    TooBig,
}

/// An `IpcacheKey` for one address, aligned so that it is written by words.
#[repr(C, align(8))]
struct AddressKey {
    prefix_len_bits: u32,
    cluster_id_and_zero: u32,
    address: [u32; 4],
}

/// Who has an address.
#[inline(always)]
pub fn ipcache(address: &Words) -> Option<&'static IpcacheValue> {
    let key = AddressKey {
        prefix_len_bits: IPCACHE_PREFIX_BASE_BITS + 128,
        cluster_id_and_zero: 0,
        address: address.0,
    };
    // SAFETY: same size and layout, weaker alignment.
    let key: &Key<IpcacheData> = unsafe { &*core::ptr::from_ref(&key).cast() };
    IPCACHE.get(key)
}

/// The endpoint of this node that has an address.
#[inline(always)]
pub fn endpoint(address: &Words) -> Option<&'static EndpointValue> {
    // SAFETY: the entry may be replaced while it is read; a packet then goes by a mixture, once.
    ENDPOINTS
        .get_ptr(address.as_key())
        .map(|value| unsafe { &*value })
}

/// True if the address is in this node's pod CIDR.
#[inline(always)]
pub fn in_pod_cidr(config: &NodeConfig, family: Family, address: &Words) -> bool {
    match family {
        Family::V4 => in_network(
            address,
            &Words::from_value(&config.pod_cidr_v4),
            config.pod_cidr_v4_bits,
        ),
        Family::V6 => in_network(
            address,
            &Words::from_value(&config.pod_cidr_v6),
            config.pod_cidr_v6_bits,
        ),
    }
}

/// Sends the packet to the pod or node that has its destination.
///
/// Addresses outside the own pod CIDR are looked up in the ipcache first: that is the
/// long way, and one look-up less counts there.
///
/// # Errors
/// Those of [`to_node`] and [`to_endpoint`].
#[inline(always)]
pub fn forward(
    frame: Frame,
    config: &NodeConfig,
    packet: &Packet,
    identity: u32,
) -> Result<Next, DropReason> {
    let own_cidr = in_pod_cidr(config, packet.family, &packet.destination);
    if !own_cidr
        && let Some(value) = ipcache(&packet.destination)
        && value.node_index != NODE_INDEX_LOCAL
    {
        return Ok(
            match to_node(frame, config, packet, value.node_index, identity)? {
                ToNode::Sent(action) => Next::Done(action),
                ToNode::TooBig => Next::TooBig,
            },
        );
    }
    match endpoint(&packet.destination) {
        Some(endpoint) if endpoint.flags & ENDPOINT_HOST != 0 => Ok(Next::Host),
        Some(endpoint) => {
            to_endpoint(frame, endpoint, packet.family, TrafficPath::Local).map(Next::Done)
        }
        None if own_cidr => Ok(Next::UnknownPod),
        None => Ok(Next::Elsewhere),
    }
}
