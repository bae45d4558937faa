//! The kernel programs' settings, from what the agent knows of its node.

use clustermesh_ebpf::abi::{
    CONFIG_DIRECT, CONFIG_ENCRYPT_NODES, CONFIG_STRICT, NodeConfig, TUNNEL_PORT, V4_MAPPED_BITS,
};
use clustermesh_node_core::tables::address;
use ipnetwork::IpNetwork;

use crate::config::encryption::Encryption as Settings;
use crate::encryption::{Encryption, MARK};
use crate::host::{HostPair, Underlay};
use crate::state_files::NodeFacts;

/// What is on or off in the kernel programs.
#[derive(Clone, Copy, Debug)]
pub struct ConfigFlags<'a> {
    /// Pods are reached by direct routing.
    pub direct: bool,
    /// Settings of encryption, and devices, where something is encrypted.
    pub encryption: Option<(&'a Settings, &'a Encryption)>,
}

/// The kernel programs' settings.
#[must_use]
pub fn node_config(
    facts: &NodeFacts,
    underlay: &Underlay,
    pair: HostPair,
    local_bits: u8,
    flags: ConfigFlags<'_>,
) -> NodeConfig {
    let end = |v4| underlay.of_family(v4).map_or([0; 16], address);
    let network = |cidr: Option<IpNetwork>| cidr.map_or([0; 16], |cidr| address(cidr.network()));
    let bits = |cidr: Option<IpNetwork>| match cidr {
        Some(IpNetwork::V4(v4)) => u8::try_from(V4_MAPPED_BITS)
            .unwrap_or(u8::MAX)
            .saturating_add(v4.prefix()),
        Some(IpNetwork::V6(v6)) => v6.prefix(),
        None => 0,
    };
    let mut config = NodeConfig {
        underlay_v4: end(true),
        underlay_v6: end(false),
        pod_cidr_v4: network(facts.pod_cidr_v4),
        pod_cidr_v6: network(facts.pod_cidr_v6),
        pod_cidr_v4_bits: bits(facts.pod_cidr_v4),
        pod_cidr_v6_bits: bits(facts.pod_cidr_v6),
        identity_local_bits: local_bits,
        cluster_id: facts.cluster_id,
        tunnel_port_be: TUNNEL_PORT.to_be_bytes(),
        host_ifindex: pair.host_ifindex,
        flags: if flags.direct { CONFIG_DIRECT } else { 0 },
        host_mac: pair.host_mac,
        ..NodeConfig::EMPTY
    };
    if let Some((settings, encryption)) = flags.encryption {
        config.flags |= (if settings.strict { CONFIG_STRICT } else { 0 })
            | (if settings.nodes {
                CONFIG_ENCRYPT_NODES
            } else {
                0
            });
        config.wireguard_mark = MARK;
        fill(&mut config.wireguard_ifindexes, encryption.ifindexes());
        let big_endian = |port: &u16| port.to_be_bytes();
        fill(
            &mut config.wireguard_ports_be,
            encryption.ports().iter().map(big_endian),
        );
        fill(
            &mut config.control_ports_be,
            settings.control_ports.iter().map(big_endian),
        );
    }
    config
}

fn fill<T>(places: &mut [T], values: impl IntoIterator<Item = T>) {
    for (place, value) in places.iter_mut().zip(values) {
        *place = value;
    }
}
