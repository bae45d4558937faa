//! Links and their addresses.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use futures_util::{StreamExt, TryStreamExt};
use rtnetlink::packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressScope};
use rtnetlink::packet_route::link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, LinkVxlan};

use super::NetlinkError;

/// A link, as far as we look at it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Index.
    pub index: u32,
    /// Hardware address; zeros for devices without one.
    pub mac: [u8; 6],
    /// Largest packet, bytes.
    pub mtu: u32,
    /// Administratively up.
    pub up: bool,
    /// Does not resolve neighbours.
    pub noarp: bool,
}

/// A pair to be made.
#[derive(Clone, Copy, Debug)]
pub struct VethPair<'a> {
    /// End in this namespace.
    pub name: &'a str,
    /// Other end.
    pub peer: &'a str,
    /// Namespace of the other end; `None` = this one.
    pub peer_namespace: Option<BorrowedFd<'a>>,
    /// Largest packet on both ends, bytes.
    pub mtu: u32,
    /// Most segments in one packet that the other end hands over; `None` = as many as the kernel likes.
    pub peer_segments_max: Option<u32>,
}

/// The link with that name, if there is one.
///
/// # Errors
/// The kernel refused the question.
pub async fn link_by_name(handle: &Handle, name: &str) -> Result<Option<Link>, NetlinkError> {
    let mut links = handle.link().get().match_name(name).execute();
    match links.try_next().await {
        Ok(message) => Ok(message.as_ref().map(read)),
        Err(error) => {
            let error = NetlinkError::new(format!("look up interface {name}"), error);
            match error.errno() {
                Some(nix::libc::ENODEV) => Ok(None),
                _ => Err(error),
            }
        }
    }
}

fn read(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        mac: [0; 6],
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        noarp: message.header.flags.contains(LinkFlags::Noarp),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(mac) => {
                link.mac = mac.as_slice().try_into().unwrap_or_default();
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            _ => {}
        }
    }
    link
}

/// Makes a pair; both ends are down.
///
/// # Errors
/// A name is taken (`EEXIST`), or the kernel refused it.
pub async fn create_veth(handle: &Handle, pair: VethPair<'_>) -> Result<(), NetlinkError> {
    let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(pair.peer)
        .mtu(pair.mtu);
    if let Some(namespace) = pair.peer_namespace {
        peer = peer.setns_by_fd(namespace.as_raw_fd());
    }
    if let Some(segments) = pair.peer_segments_max {
        peer = peer.append_extra_attribute(LinkAttribute::GsoMaxSegs(segments));
    }
    let message = LinkMessageBuilder::<LinkVeth>::new(pair.name, pair.peer)
        .mtu(pair.mtu)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())))
        .build();
    handle.link().add(message).execute().await.map_err(|error| {
        NetlinkError::new(
            format!("create the veth pair {} and {}", pair.name, pair.peer),
            error,
        )
    })
}

/// Makes a VXLAN device that accepts no network identifier at all, and is down.
///
/// # Errors
/// A name or the port is taken (`EEXIST`, `EADDRINUSE`), or the kernel refused it (before 5.18 it cannot).
pub async fn create_closed_vxlan(
    handle: &Handle,
    name: &str,
    port: u16,
) -> Result<(), NetlinkError> {
    let message = LinkMessageBuilder::<LinkVxlan>::new(name)
        .port(port)
        .collect_metadata(true)
        .vnifilter(true)
        .udp_zero_csum6_rx(true)
        .build();
    handle
        .link()
        .add(message)
        .execute()
        .await
        .map_err(|error| NetlinkError::new(format!("create the VXLAN device {name}"), error))
}

/// Sets a link up, with this MTU; `arp` false makes it send without resolving neighbours.
///
/// # Errors
/// The link is gone, or the kernel refused it.
pub async fn set_link(
    handle: &Handle,
    index: u32,
    mtu: u32,
    arp: bool,
) -> Result<(), NetlinkError> {
    let message = LinkUnspec::new_with_index(index)
        .mtu(mtu)
        .arp(arp)
        .up()
        .build();
    handle
        .link()
        .set(message)
        .execute()
        .await
        .map_err(|error| NetlinkError::new(format!("set interface {index} up"), error))
}

/// Deletes a link; one that is gone already is fine.
///
/// # Errors
/// The kernel refused it.
pub async fn delete_link(handle: &Handle, name: &str) -> Result<(), NetlinkError> {
    let Some(link) = link_by_name(handle, name).await? else {
        return Ok(());
    };
    match handle.link().del(link.index).execute().await {
        Ok(()) => Ok(()),
        Err(error) => {
            let error = NetlinkError::new(format!("delete interface {name}"), error);
            match error.errno() {
                Some(nix::libc::ENODEV) => Ok(()),
                _ => Err(error),
            }
        }
    }
}

/// Global addresses of a link, in the kernel's order.
///
/// # Errors
/// The kernel refused the question.
pub async fn addresses(handle: &Handle, index: u32) -> Result<Vec<IpAddr>, NetlinkError> {
    let failed = |error| NetlinkError::new(format!("list addresses of interface {index}"), error);
    let mut found = Vec::new();
    let mut messages = handle
        .address()
        .get()
        .set_link_index_filter(index)
        .execute();
    while let Some(message) = messages.next().await {
        let message = message.map_err(failed)?;
        let temporary = message.header.flags.contains(AddressHeaderFlags::Secondary)
            && message
                .attributes
                .iter()
                .any(|a| matches!(a, AddressAttribute::Address(IpAddr::V6(_))));
        if message.header.index != index
            || message.header.scope != AddressScope::Universe
            || temporary
        {
            continue;
        }
        let local = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Local(ip) => Some(*ip),
            _ => None,
        });
        let plain = message.attributes.iter().find_map(|a| match a {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        });
        found.extend(local.or(plain));
    }
    Ok(found)
}

/// Gives a link a single address; IPv6 without duplicate detection, which would delay its use.
///
/// # Errors
/// The link is gone, or the kernel refused it. An address that is there already is fine.
pub async fn add_address(handle: &Handle, index: u32, ip: IpAddr) -> Result<(), NetlinkError> {
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    let mut request = handle.address().add(index, ip, bits).replace();
    if ip.is_ipv6() {
        request.message_mut().header.flags |= AddressHeaderFlags::Nodad;
    }
    request
        .execute()
        .await
        .map_err(|error| NetlinkError::new(format!("add {ip} to interface {index}"), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn segments_of(handle: &Handle, name: &str) -> Option<u32> {
        let request = handle.link().get().match_name(name.to_owned());
        let message = request.execute().try_next().await.unwrap().unwrap();
        message.attributes.into_iter().find_map(|a| match a {
            LinkAttribute::GsoMaxSegs(segments) => Some(segments),
            _ => None,
        })
    }

    #[test]
    fn the_other_end_of_a_pair_keeps_to_its_number_of_segments() {
        // A namespace of its own: it belongs to the thread, and goes with it.
        let body = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("run as root");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let handle = super::super::connect().unwrap();
                for (peer_segments_max, expected) in [(Some(45), 45), (None, 65_535)] {
                    let pair = VethPair {
                        name: "end0",
                        peer: "end1",
                        peer_namespace: None,
                        mtu: 1_400,
                        peer_segments_max,
                    };
                    create_veth(&handle, pair).await.unwrap();
                    assert_eq!(segments_of(&handle, "end0").await, Some(65_535));
                    assert_eq!(segments_of(&handle, "end1").await, Some(expected));
                    delete_link(&handle, "end0").await.unwrap();
                }
            });
        };
        std::thread::spawn(body).join().unwrap();
    }
}
