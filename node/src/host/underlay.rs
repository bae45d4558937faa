//! The underlay: devices, addresses and paths that lead to other nodes, and what of a packet they leave for pods.

use std::net::IpAddr;

use anyhow::{Context, bail};
use clustermesh_node_core::UnderlayPath;
use rtnetlink::Handle;

use crate::config::{Config, Routing};
use crate::netlink::{self, Link};

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

    /// The tunnel's end of a family.
    #[must_use]
    pub fn of_family(&self, v4: bool) -> Option<IpAddr> {
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
