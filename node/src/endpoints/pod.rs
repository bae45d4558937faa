//! One pod's link: the veth pair, and what is set inside the container's namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, OwnedFd};

use clustermesh_node_core::ipam::Attachment;
use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use rtnetlink::Handle;

use crate::netlink::{self, NetlinkError, Route, VethPair};

/// What a pod's link must be.
#[derive(Clone, Debug)]
pub struct PodPlan {
    /// Host end.
    pub host_interface: String,
    /// Name inside the container.
    pub ifname: String,
    /// Addresses of the pod.
    pub addresses: Vec<IpAddr>,
    /// Router addresses of the node.
    pub routers: Vec<IpAddr>,
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Most segments in one packet; `None` = as many as the kernel likes.
    pub segments_max: Option<u32>,
}

/// A pod's link as it was made.
#[derive(Clone, Copy, Debug)]
pub struct PodLink {
    /// Index of the host end.
    pub ifindex: u32,
    /// MAC of the host end.
    pub host_mac: [u8; 6],
    /// MAC of the container's end.
    pub pod_mac: [u8; 6],
}

/// Name of an attachment's host end: `cm` and 12 hexadecimal digits.
#[must_use]
pub fn interface_name(attachment: &Attachment) -> String {
    // FNV-1a, 64 bits: stable over builds, and a collision is an error at ADD.
    let bytes = attachment
        .container_id
        .bytes()
        .chain([0])
        .chain(attachment.ifname.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("cm{:012x}", hash & 0xffff_ffff_ffff)
}

/// Makes the pair and sets the container's end up; nothing passes before the host's end is [set up](set_up) too. On an
/// error nothing of it is left.
///
/// # Errors
/// The namespace is none, a name is taken, or the kernel refused something.
pub async fn create(
    handle: &Handle,
    namespace: OwnedFd,
    plan: PodPlan,
) -> Result<PodLink, NetlinkError> {
    let name = plan.host_interface.clone();
    // Left by an ADD that was cut off.
    netlink::delete_link(handle, &name).await?;
    let pair = VethPair {
        name: &name,
        peer: &plan.ifname,
        peer_namespace: Some(namespace.as_fd()),
        mtu: plan.mtu,
        peer_segments_max: plan.segments_max,
    };
    netlink::create_veth(handle, pair).await?;
    match finish(handle, namespace, plan).await {
        Ok(link) => Ok(link),
        Err(error) => {
            if let Err(left) = netlink::delete_link(handle, &name).await {
                tracing::warn!(interface = name, error = %left, "an interface of a failed ADD is left");
            }
            Err(error)
        }
    }
}

async fn finish(
    handle: &Handle,
    namespace: OwnedFd,
    plan: PodPlan,
) -> Result<PodLink, NetlinkError> {
    let name = &plan.host_interface;
    let host = netlink::link_by_name(handle, name)
        .await?
        .ok_or_else(|| vanished(name))?;
    // Nothing on the host end has an address: the kernel programs take every packet.
    netlink::write_sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1")?;
    let host_mac = host.mac;
    let pod_mac = netlink::inside(namespace, move || configure(plan, host_mac)).await?;
    Ok(PodLink {
        ifindex: host.index,
        host_mac,
        pod_mac,
    })
}

/// Lets packets pass: to be called when the kernel program is attached that takes them, since without it the host would
/// route them.
///
/// # Errors
/// The kernel refused it.
pub async fn set_up(handle: &Handle, link: PodLink, mtu: u32) -> Result<(), NetlinkError> {
    netlink::set_link(handle, link.ifindex, mtu, true).await
}

/// Runs inside the container's namespace.
async fn configure(plan: PodPlan, host_mac: [u8; 6]) -> Result<[u8; 6], NetlinkError> {
    let handle = netlink::connect()?;
    if let Some(lo) = netlink::link_by_name(&handle, "lo").await?
        && !lo.up
    {
        netlink::set_link(&handle, lo.index, lo.mtu, true).await?;
    }
    let link = netlink::link_by_name(&handle, &plan.ifname)
        .await?
        .ok_or_else(|| vanished(&plan.ifname))?;
    netlink::set_link(&handle, link.index, plan.mtu, true).await?;
    for ip in &plan.addresses {
        netlink::add_address(&handle, link.index, *ip).await?;
    }
    for router in &plan.routers {
        let Some(own) = plan
            .addresses
            .iter()
            .find(|ip| ip.is_ipv4() == router.is_ipv4())
        else {
            continue;
        };
        // The router is no neighbour by any prefix: a fixed entry and an on-link route make it one.
        netlink::add_neighbour(&handle, link.index, *router, host_mac).await?;
        let to_router = Route {
            destination: IpNetwork::from(*router),
            gateway: None,
            source: Some(*own),
            mtu: 0,
        };
        netlink::put_route(&handle, link.index, &to_router).await?;
        let default = Route {
            destination: default_of(*router),
            gateway: Some(*router),
            source: Some(*own),
            mtu: 0,
        };
        netlink::put_route(&handle, link.index, &default).await?;
    }
    Ok(link.mac)
}

/// What of a pod's end is not as it was left; empty = nothing.
///
/// # Errors
/// The namespace cannot be entered.
pub async fn check(
    namespace: OwnedFd,
    ifname: String,
    addresses: Vec<IpAddr>,
    mac: [u8; 6],
) -> Result<Vec<String>, NetlinkError> {
    netlink::inside(namespace, move || async move {
        let handle = netlink::connect()?;
        let Some(link) = netlink::link_by_name(&handle, &ifname).await? else {
            return Ok(vec![format!("interface {ifname} is missing")]);
        };
        let mut faults = Vec::new();
        if link.mac != mac {
            faults.push(format!("interface {ifname} has another MAC address"));
        }
        if !link.up {
            faults.push(format!("interface {ifname} is down"));
        }
        let held = netlink::addresses(&handle, link.index).await?;
        for missing in addresses.iter().filter(|ip| !held.contains(ip)) {
            faults.push(format!("interface {ifname} lacks {missing}"));
        }
        Ok(faults)
    })
    .await
}

/// `0.0.0.0/0` or `::/0`.
fn default_of(router: IpAddr) -> IpNetwork {
    match router {
        IpAddr::V4(_) => IpNetwork::V4(
            Ipv4Network::new_checked(Ipv4Addr::UNSPECIFIED, 0)
                .unwrap_or(Ipv4Network::from(Ipv4Addr::UNSPECIFIED)),
        ),
        IpAddr::V6(_) => IpNetwork::V6(
            Ipv6Network::new_checked(Ipv6Addr::UNSPECIFIED, 0)
                .unwrap_or(Ipv6Network::from(Ipv6Addr::UNSPECIFIED)),
        ),
    }
}

fn vanished(name: &str) -> NetlinkError {
    NetlinkError::other(
        format!("find interface {name}"),
        std::io::Error::new(
            std::io::ErrorKind::NotFound,
            "it vanished while the pod was being attached",
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_end_is_named_by_container_and_interface() {
        let name = |container_id: &str, ifname: &str| {
            interface_name(&Attachment {
                container_id: container_id.to_owned(),
                ifname: ifname.to_owned(),
            })
        };
        assert_eq!(name("a", "eth0").len(), 14);
        assert_eq!(name("a", "eth0"), name("a", "eth0"));
        assert_ne!(name("a", "eth0"), name("a", "eth1"));
        assert_ne!(name("ab", "c"), name("a", "bc"));
    }
}
