//! Routes and neighbours.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::StreamExt;
use ipnetwork::IpNetwork;
use rtnetlink::packet_route::neighbour::NeighbourState;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::NetlinkError;

/// Routes of ours carry this protocol number, so that we change no others (`RTPROT_*`, free range).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(88);

/// A route through one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Route {
    /// Destination.
    pub destination: IpNetwork,
    /// Next hop; it is reached through the device even if no other route says so.
    pub gateway: Option<IpAddr>,
    /// Source address of the machine's own packets.
    pub source: Option<IpAddr>,
    /// Largest packet, bytes; 0 = the device's.
    pub mtu: u32,
}

fn message(index: u32, route: &Route) -> Result<RouteMessage, NetlinkError> {
    let bad = |error: &dyn std::fmt::Display| {
        NetlinkError::other(
            format!("make a route to {}", route.destination),
            std::io::Error::new(std::io::ErrorKind::InvalidInput, error.to_string()),
        )
    };
    let destination = route.destination;
    let mut builder = RouteMessageBuilder::<IpAddr>::new()
        .destination_prefix(destination.network(), destination.prefix())
        .map_err(|error| bad(&error))?
        .output_interface(index)
        .protocol(PROTOCOL);
    if let Some(gateway) = route.gateway {
        builder = builder
            .gateway(gateway)
            .map_err(|error| bad(&error))?
            .onlink();
    } else if destination.is_ipv4() {
        builder = builder.scope(RouteScope::Link);
    }
    if let Some(source) = route.source {
        builder = builder.pref_source(source).map_err(|error| bad(&error))?;
    }
    let mut message = builder.build();
    if route.mtu != 0 {
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::Mtu(route.mtu)]));
    }
    Ok(message)
}

/// Adds a route or replaces the one to the same destination.
///
/// # Errors
/// The kernel refused it.
pub async fn put_route(handle: &Handle, index: u32, route: &Route) -> Result<(), NetlinkError> {
    let message = message(index, route)?;
    handle
        .route()
        .add(message)
        .replace()
        .execute()
        .await
        .map_err(|error| {
            NetlinkError::new(
                format!(
                    "add a route to {} through interface {index}",
                    route.destination
                ),
                error,
            )
        })
}

/// Removes a route; one that is gone already is fine.
///
/// # Errors
/// The kernel refused it.
pub async fn delete_route(
    handle: &Handle,
    index: u32,
    destination: IpNetwork,
) -> Result<(), NetlinkError> {
    let route = Route {
        destination,
        gateway: None,
        source: None,
        mtu: 0,
    };
    let message = message(index, &route)?;
    match handle.route().del(message).execute().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = NetlinkError::new(format!("delete the route to {destination}"), error);
            match error.errno() {
                Some(nix::libc::ESRCH) => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// Destinations of our own routes through a device.
///
/// # Errors
/// The kernel refused the question.
pub async fn routes_of(handle: &Handle, index: u32) -> Result<Vec<IpNetwork>, NetlinkError> {
    let mut found = Vec::new();
    for message in dump(handle).await? {
        let through = message
            .attributes
            .iter()
            .any(|a| matches!(a, RouteAttribute::Oif(oif) if *oif == index));
        if message.header.protocol == PROTOCOL && through {
            found.extend(destination(&message));
        }
    }
    Ok(found)
}

/// The device of the default route of lowest metric, IPv4 first.
///
/// # Errors
/// The kernel refused the question.
pub async fn default_device(handle: &Handle) -> Result<Option<u32>, NetlinkError> {
    let mut best: Option<(bool, u32, u32)> = None;
    for message in dump(handle).await? {
        if message.header.destination_prefix_length != 0
            || message.header.table != RouteHeader::RT_TABLE_MAIN
            || message.header.kind != RouteType::Unicast
        {
            continue;
        }
        let device = message.attributes.iter().find_map(|a| match a {
            RouteAttribute::Oif(oif) => Some(*oif),
            _ => None,
        });
        let metric = message.attributes.iter().find_map(|a| match a {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        });
        let v6 = message.header.address_family != rtnetlink::packet_route::AddressFamily::Inet;
        if let Some(device) = device {
            let this = (v6, metric.unwrap_or(0), device);
            best = Some(best.map_or(this, |best| best.min(this)));
        }
    }
    Ok(best.map(|(_, _, device)| device))
}

async fn dump(handle: &Handle) -> Result<Vec<RouteMessage>, NetlinkError> {
    let mut found = Vec::new();
    let families = [
        RouteMessageBuilder::<Ipv4Addr>::new().build(),
        RouteMessageBuilder::<Ipv6Addr>::new().build(),
    ];
    for family in families {
        let mut messages = handle.route().get(family).execute();
        while let Some(message) = messages.next().await {
            found.push(message.map_err(|error| NetlinkError::new("list routes", error))?);
        }
    }
    Ok(found)
}

fn destination(message: &RouteMessage) -> Option<IpNetwork> {
    let ip: IpAddr = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    IpNetwork::new(ip, message.header.destination_prefix_length).ok()
}

/// A neighbour that is never asked for.
///
/// # Errors
/// The kernel refused it.
pub async fn add_neighbour(
    handle: &Handle,
    index: u32,
    ip: IpAddr,
    mac: [u8; 6],
) -> Result<(), NetlinkError> {
    handle
        .neighbours()
        .add(index, ip)
        .link_layer_address(&mac)
        .state(NeighbourState::Permanent)
        .replace()
        .execute()
        .await
        .map_err(|error| NetlinkError::new(format!("fix the neighbour {ip}"), error))
}
