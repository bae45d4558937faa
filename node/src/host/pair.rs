//! The pair `cm_host` and `cm_net` between host and pods, and the device for receive offload: made and removed.

use anyhow::{Context, bail, ensure};
use clustermesh_ebpf::Features;
use clustermesh_ebpf::abi::TUNNEL_PORT;
use rtnetlink::Handle;

use crate::netlink::{self, VethPair};

/// Host's end: has the router and health addresses, and the routes to pods.
pub const HOST_DEVICE: &str = "cm_host";
/// Device that owns the tunnel's UDP port, for the kernel's receive offload only.
const OFFLOAD_DEVICE: &str = "cm_gro";
/// The other end, where the kernel programs take what the host sends to pods.
pub const NET_DEVICE: &str = "cm_net";
/// Largest MTU of the pair itself: routes carry the real ones.
const PAIR_MTU_BYTES: u32 = 65_535;

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
