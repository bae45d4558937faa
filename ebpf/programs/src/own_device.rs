//! What a frame on a device of ours carries: pods and the host send plain Ethernet only.

use clustermesh_ebpf_abi::DropReason;

use crate::frame::{
    ETHERNET_BYTES, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, ETHERTYPE_SERVICE_VLAN,
    ETHERTYPE_VLAN, Frame, IPV6_BYTES,
};
use crate::parse::{self, Packet};

/// What a frame carries.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    /// An IP packet.
    Ip,
    /// ARP: the kernel answers for the host's own addresses; pods have fixed neighbour entries and do not ask.
    Arp,
}

/// Looks into a frame; an IP packet is put into `packet`.
///
/// # Errors
/// `VlanTagged`, `UnknownEthertype`, `Malformed`, `ExtensionHeaders`.
#[inline(always)]
pub fn read(frame: Frame, packet: &mut Packet) -> Result<Inside, DropReason> {
    if frame.has_vlan_tag() {
        return Err(DropReason::VlanTagged);
    }
    frame.make_linear(ETHERNET_BYTES + IPV6_BYTES);
    let ethertype = frame.at::<u16>(12).ok_or(DropReason::Malformed)?;
    // SAFETY: `at` has checked the bounds.
    match unsafe { *ethertype } {
        ETHERTYPE_IPV4 => parse::ipv4(frame, ETHERNET_BYTES, packet).map(|()| Inside::Ip),
        ETHERTYPE_IPV6 => parse::ipv6(frame, ETHERNET_BYTES, packet).map(|()| Inside::Ip),
        ETHERTYPE_ARP => Ok(Inside::Arp),
        ETHERTYPE_VLAN | ETHERTYPE_SERVICE_VLAN => Err(DropReason::VlanTagged),
        _ => Err(DropReason::UnknownEthertype),
    }
}
