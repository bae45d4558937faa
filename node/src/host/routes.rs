//! The host's addresses in the mesh, and its routes to pods of this and other nodes.

use std::collections::BTreeMap;

use clustermesh_node_core::ipam::Ipam;
use ipnetwork::IpNetwork;
use rtnetlink::Handle;

use super::pair::HostPair;
use super::underlay::Underlay;
use crate::netlink::{self, Route};
use crate::state_files::NodeFacts;

/// Least packet that every link of IPv6 takes, bytes (RFC 8200, 5).
const IPV6_LINK_BYTES: u32 = 1_280;

/// What the host must route to other nodes' pods.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteCidrs {
    /// Pod CIDRs of other nodes, sorted, each with the largest packet that its node's path takes, bytes; 0 = not known.
    pub cidrs: Vec<(IpNetwork, u16)>,
    /// Nothing else is: until the records have been listed in full, routes of before stay.
    pub complete: bool,
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
    let mut ipam = Ipam::default();
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
