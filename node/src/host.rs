//! The host's side of the pods' network: the pair `cm_host` and `cm_net`, its addresses and routes, settings.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, bail, ensure};
use clustermesh_ebpf::Features;
use clustermesh_ebpf::abi::{
    CONFIG_DIRECT, CONFIG_ENCRYPT_NODES, CONFIG_FLOWS, CONFIG_STRICT, NodeConfig, TUNNEL_PORT,
    V4_MAPPED_BITS,
};
use clustermesh_node_core::UnderlayPath;
use clustermesh_node_core::tables::address;
use ipnetwork::IpNetwork;
use rtnetlink::Handle;

use crate::config::encryption::Encryption as Settings;
use crate::config::{Config, Routing};
use crate::encryption::{self, Encryption};
use crate::netlink::{self, Link, Route, VethPair};
use crate::shared::RemoteCidrs;
use crate::state_files::NodeFacts;

/// Host's end: has the router and health addresses, and the routes to pods.
pub const HOST_DEVICE: &str = "cm_host";
/// Device that owns the tunnel's UDP port, for the kernel's receive offload only.
const OFFLOAD_DEVICE: &str = "cm_gro";
/// The other end, where the kernel programs take what the host sends to pods.
pub const NET_DEVICE: &str = "cm_net";
/// Bytes that the tunnel adds to a packet, IPv4 outside.
const TUNNEL_V4_BYTES: u32 = 50;
/// Bytes that the tunnel adds to a packet, IPv6 outside.
const TUNNEL_V6_BYTES: u32 = 70;
/// Bytes that WireGuard adds to a packet, IPv4 outside: IP, UDP, its own header and tag.
const WIREGUARD_V4_BYTES: u32 = 60;
/// The same, IPv6 outside.
const WIREGUARD_V6_BYTES: u32 = 80;
/// WireGuard fills packets up to a multiple of this before it seals them.
const WIREGUARD_PADDING_BYTES: u32 = 16;
/// Least packet that every link of IPv6 takes, bytes (RFC 8200, 5).
const IPV6_LINK_BYTES: u32 = 1_280;
/// Largest MTU of the pair itself: routes carry the real ones.
const PAIR_MTU_BYTES: u32 = 65_535;

/// The underlay as this node has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    /// Device indices.
    pub devices: Vec<u32>,
    /// Addresses, the tunnel's end of each family first.
    pub addresses: Vec<IpAddr>,
    /// Path to other nodes over IPv4.
    pub path_v4: Option<UnderlayPath>,
    /// Path to other nodes over IPv6.
    pub path_v6: Option<UnderlayPath>,
    /// Largest packet of pods, bytes.
    pub pod_mtu: u32,
    /// Largest IPv6 packet of pods to other nodes, bytes: with direct routing over IPv4 it takes the tunnel.
    pub pod_mtu_v6: u32,
    /// Largest packet that WireGuard takes, bytes: sealed, it fits the underlay.
    pub wireguard_mtu: u32,
}

/// Largest packet that, filled up and sealed, is no longer than `mtu`.
const fn inside_wireguard(mtu: u32, v4: bool) -> u32 {
    let overhead = if v4 {
        WIREGUARD_V4_BYTES
    } else {
        WIREGUARD_V6_BYTES
    };
    let room = mtu.saturating_sub(overhead);
    room - room % WIREGUARD_PADDING_BYTES
}

impl Underlay {
    /// Finds devices and addresses.
    ///
    /// # Errors
    /// A configured device is missing, or there is no address.
    pub async fn find(handle: &Handle, config: &Config) -> anyhow::Result<Self> {
        let mut links: Vec<(String, Link)> = Vec::new();
        for name in &config.underlay_devices {
            let Some(link) = netlink::link_by_name(handle, name).await? else {
                bail!("underlay_devices: there is no interface {name}");
            };
            links.push((name.clone(), link));
        }
        let mut devices: Vec<u32> = links.iter().map(|(_, link)| link.index).collect();
        if devices.is_empty() {
            let device = netlink::default_device(handle).await?;
            devices.push(device.context(
                "there is no default route: name the devices that lead to other nodes in underlay_devices",
            )?);
        }
        let facts = device_facts(handle).await?;
        let of = |device: u32| facts.iter().find(|facts| facts.index == device);
        if let Some(bare) = devices
            .iter()
            .filter_map(|device| of(*device))
            .find(|facts| !facts.has_ethernet_header)
        {
            bail!(
                "the underlay device {} has no Ethernet header, which the kernel programs need: name another one in underlay_devices",
                bare.name
            );
        }
        let mut addresses = Vec::new();
        let mut egress = [None, None];
        for device in &devices {
            for ip in netlink::addresses(handle, *device).await? {
                let wanted =
                    config.underlay_addresses.is_empty() || config.underlay_addresses.contains(&ip);
                let place = usize::from(ip.is_ipv6());
                if let Some(slot) = egress.get_mut(place)
                    && slot.is_none()
                    && wanted
                {
                    *slot = Some(*device);
                    addresses.push(ip);
                }
            }
        }
        if let Some(missing) = config
            .underlay_addresses
            .iter()
            .find(|ip| !addresses.contains(ip))
        {
            bail!(
                "underlay_addresses: no underlay device has {missing}, or another of its family is named before"
            );
        }
        if addresses.is_empty() {
            bail!("the underlay devices have no global address");
        }
        addresses.sort_by_key(IpAddr::is_ipv6);
        let mtu_of = |device: u32| of(device).map_or(1500, |facts| facts.mtu);
        let path = |device: Option<u32>, v4: bool| {
            device.map(|device| {
                let overhead = match (config.routing, v4) {
                    (Routing::Tunnel, true) => TUNNEL_V4_BYTES,
                    (Routing::Tunnel, false) => TUNNEL_V6_BYTES,
                    (Routing::Direct, _) => 0,
                };
                let inner = |mtu: u32| {
                    let measured = u16::try_from(mtu.saturating_sub(overhead)).unwrap_or(u16::MAX);
                    match config.mtu {
                        0 => measured,
                        most => measured.min(most),
                    }
                };
                UnderlayPath {
                    egress_ifindex: device,
                    mtu_bytes: inner(mtu_of(device)),
                    encrypted_mtu_bytes: inner(inside_wireguard(mtu_of(device), v4)),
                }
            })
        };
        let [v4, v6] = egress;
        let path_v4 = path(v4, true);
        let path_v6 = path(v6, false);
        // Nodes of both families are reached over IPv4.
        let pod_mtu = path_v4.or(path_v6).map_or(1430, |path| {
            u32::from(if config.encryption.is_on() {
                path.encrypted_mtu_bytes
            } else {
                path.mtu_bytes
            })
        });
        // For packets that are to nodes of the other family it is too much, but those are cut to their path before.
        let inside = |device: Option<u32>, v4| device.map(|d| inside_wireguard(mtu_of(d), v4));
        let wireguard_mtu = inside(v4, true).max(inside(v6, false)).unwrap_or(1_280);
        let pod_mtu_v6 = match config.routing {
            Routing::Direct if path_v4.is_some() => pod_mtu.saturating_sub(TUNNEL_V4_BYTES),
            Routing::Direct | Routing::Tunnel => pod_mtu,
        };
        Ok(Self {
            devices,
            addresses,
            path_v4,
            path_v6,
            pod_mtu,
            pod_mtu_v6,
            wireguard_mtu,
        })
    }

    /// The addresses, textual.
    #[must_use]
    pub fn address_texts(&self) -> Vec<String> {
        self.addresses.iter().map(ToString::to_string).collect()
    }

    fn of_family(&self, v4: bool) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|ip| ip.is_ipv4() == v4)
    }
}

/// What the underlay asks of a device.
struct DeviceFacts {
    index: u32,
    name: String,
    /// Largest packet, bytes.
    mtu: u32,
    has_ethernet_header: bool,
}

async fn device_facts(handle: &Handle) -> anyhow::Result<Vec<DeviceFacts>> {
    use futures_util::TryStreamExt as _;
    use rtnetlink::packet_route::link::{LinkAttribute, LinkLayerType};

    let messages: Vec<_> = handle
        .link()
        .get()
        .execute()
        .try_collect()
        .await
        .context("list interfaces")?;
    Ok(messages
        .into_iter()
        .map(|message| {
            let mut facts = DeviceFacts {
                index: message.header.index,
                name: String::new(),
                mtu: 1500,
                has_ethernet_header: matches!(
                    message.header.link_layer_type,
                    LinkLayerType::Ether | LinkLayerType::Loopback
                ),
            };
            for attribute in message.attributes {
                match attribute {
                    LinkAttribute::IfName(name) => facts.name = name,
                    LinkAttribute::Mtu(mtu) => facts.mtu = mtu,
                    _ => {}
                }
            }
            facts
        })
        .collect())
}

/// The pair between host and pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPair {
    /// Host's end.
    pub host_ifindex: u32,
    /// Its MAC.
    pub host_mac: [u8; 6],
    /// The other end.
    pub net_ifindex: u32,
}

/// Makes the pair where it is missing, and sets forwarding on. What is there already stays as it is.
///
/// # Errors
/// The kernel refused something.
pub async fn ensure_pair(handle: &Handle) -> anyhow::Result<HostPair> {
    for (setting, value) in [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
    ] {
        netlink::write_sysctl(setting, value)?;
    }
    let ends = (
        netlink::link_by_name(handle, HOST_DEVICE).await?,
        netlink::link_by_name(handle, NET_DEVICE).await?,
    );
    if !matches!(ends, (Some(_), Some(_))) {
        netlink::delete_link(handle, HOST_DEVICE).await?;
        netlink::delete_link(handle, NET_DEVICE).await?;
        let pair = VethPair {
            name: HOST_DEVICE,
            peer: NET_DEVICE,
            peer_namespace: None,
            mtu: PAIR_MTU_BYTES,
            peer_segments_max: None,
        };
        netlink::create_veth(handle, pair).await?;
    }
    let mut found = Vec::with_capacity(2);
    // What the host sends to pods goes to one place whatever its MAC: nobody is asked for it.
    for (name, arp) in [(NET_DEVICE, true), (HOST_DEVICE, false)] {
        let link = netlink::link_by_name(handle, name)
            .await?
            .with_context(|| format!("interface {name} vanished"))?;
        if !link.up || link.noarp == arp || link.mtu != PAIR_MTU_BYTES {
            netlink::set_link(handle, link.index, PAIR_MTU_BYTES, arp).await?;
        }
        found.push(link);
    }
    netlink::write_sysctl(&format!("net/ipv4/conf/{HOST_DEVICE}/rp_filter"), "0")?;
    match found.as_slice() {
        [net, host] => Ok(HostPair {
            host_ifindex: host.index,
            host_mac: host.mac,
            net_ifindex: net.index,
        }),
        _ => bail!("interfaces {HOST_DEVICE} and {NET_DEVICE} vanished"),
    }
}

/// Gives the pair its addresses and routes: the cluster's pod CIDRs and those of other nodes. `written` are the routes
/// with their MTUs that need not be written again; others that are there may be of an earlier run.
///
/// # Errors
/// The kernel refused something.
pub async fn ensure_addresses_and_routes(
    handle: &Handle,
    pair: HostPair,
    facts: &NodeFacts,
    underlay: &Underlay,
    remote: &RemoteCidrs,
    written: &mut BTreeMap<IpNetwork, u32>,
) -> anyhow::Result<()> {
    let mut ipam = clustermesh_node_core::ipam::Ipam::default();
    ipam.set_ranges(facts.pod_cidr_v4, facts.pod_cidr_v6);
    let routers = ipam.routers();
    let present = netlink::addresses(handle, pair.host_ifindex).await?;
    for ip in routers.iter().chain(&ipam.health()) {
        if !present.contains(ip) {
            netlink::add_address(handle, pair.host_ifindex, *ip).await?;
        }
    }
    let own = [facts.pod_cidr_v4, facts.pod_cidr_v6];
    let pod_mtu = |destination: &IpNetwork, path_bytes: u16| {
        let of_family = if destination.is_ipv4() {
            underlay.pod_mtu
        } else {
            underlay.pod_mtu_v6
        };
        match u32::from(path_bytes) {
            0 => of_family,
            // What the other family has less, it has less on a narrow path too. IPv6 knows no links below its least size.
            bytes => {
                let narrower = underlay.pod_mtu.saturating_sub(bytes);
                let least = if destination.is_ipv4() {
                    0
                } else {
                    IPV6_LINK_BYTES
                };
                of_family.saturating_sub(narrower).max(least.min(of_family))
            }
        }
    };
    let mut wanted: BTreeMap<IpNetwork, u32> = BTreeMap::new();
    let ranges = facts.cluster_pod_cidrs.iter().map(|cidr| (*cidr, 0));
    let own = own.into_iter().flatten().map(|cidr| (cidr, 0));
    for (cidr, path_bytes) in ranges.chain(remote.cidrs.iter().copied()).chain(own) {
        let mtu = pod_mtu(&cidr, path_bytes);
        let held = wanted.entry(cidr).or_insert(mtu);
        *held = mtu.min(*held);
    }
    let held = netlink::routes_of(handle, pair.host_ifindex).await?;
    for (destination, mtu) in &wanted {
        let Some(source) = routers
            .iter()
            .find(|ip| ip.is_ipv4() == destination.is_ipv4())
        else {
            continue;
        };
        if held.contains(destination) && written.get(destination) == Some(mtu) {
            continue;
        }
        let route = Route {
            destination: *destination,
            gateway: None,
            source: Some(*source),
            mtu: *mtu,
        };
        netlink::put_route(handle, pair.host_ifindex, &route).await?;
        written.insert(*destination, *mtu);
    }
    // A restarted agent does not know the peers' ranges before the first listing: losing control removes no route.
    let gone = held
        .iter()
        .filter(|held| remote.complete && !wanted.contains_key(held));
    for gone in gone {
        netlink::delete_route(handle, pair.host_ifindex, *gone).await?;
        written.remove(gone);
    }
    Ok(())
}

/// Makes the device that lets the kernel coalesce tunnel packets on receive, where it is missing.
///
/// The kernel's receive offload knows VXLAN only while a VXLAN socket owns the port; without one every segment
/// passes the programs alone. The device itself accepts no identifier: packets are ours before it sees them.
///
/// # Errors
/// The kernel is too old or refused something; traffic flows without it, only slower.
pub async fn ensure_receive_offload(handle: &Handle) -> anyhow::Result<()> {
    // Such a kernel would ignore the wish and make a device that accepts every identifier.
    ensure!(
        Features::probe().closed_vxlan,
        "VXLAN devices that accept no identifier need kernel 5.18 or newer"
    );
    if netlink::link_by_name(handle, OFFLOAD_DEVICE)
        .await?
        .is_none()
    {
        netlink::create_closed_vxlan(handle, OFFLOAD_DEVICE, TUNNEL_PORT).await?;
    }
    let link = netlink::link_by_name(handle, OFFLOAD_DEVICE)
        .await?
        .with_context(|| format!("interface {OFFLOAD_DEVICE} vanished"))?;
    if !link.up {
        netlink::set_link(handle, link.index, link.mtu, false).await?;
    }
    Ok(())
}

/// Removes the pair, and with it addresses and routes.
///
/// # Errors
/// The kernel refused it.
pub async fn remove(handle: &Handle) -> anyhow::Result<()> {
    netlink::delete_link(handle, OFFLOAD_DEVICE).await?;
    netlink::delete_link(handle, HOST_DEVICE).await?;
    netlink::delete_link(handle, NET_DEVICE).await?;
    Ok(())
}

/// What is on or off in the kernel programs.
#[derive(Clone, Copy, Debug)]
pub struct ConfigFlags<'a> {
    /// A flow record for every packet.
    pub flows: bool,
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
        flags: (if flags.flows { CONFIG_FLOWS } else { 0 })
            | (if flags.direct { CONFIG_DIRECT } else { 0 }),
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
        config.wireguard_mark = encryption::MARK;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_that_fills_its_path_fits_the_underlay_sealed() {
        for (underlay, v4, inside) in [
            (1_500, true, 1_440),
            (1_500, false, 1_408),
            (9_000, true, 8_928),
            (1_280, true, 1_216),
            (40, true, 0),
        ] {
            assert_eq!(inside_wireguard(underlay, v4), inside);
            let overhead = if v4 {
                WIREGUARD_V4_BYTES
            } else {
                WIREGUARD_V6_BYTES
            };
            let sealed = inside.next_multiple_of(WIREGUARD_PADDING_BYTES) + overhead;
            assert!(inside == 0 || sealed <= underlay);
        }
    }
}
