//! A frame in the kernel: bounds-checked access to its bytes and the few fields of its context.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::generated::{bpf_skb_change_head, bpf_skb_load_bytes, bpf_skb_pull_data};
use aya_ebpf::programs::TcContext;
use clustermesh_ebpf_abi::DropReason;

/// Bytes of an Ethernet header.
pub const ETHERNET_BYTES: usize = 14;
/// Bytes of an IPv4 header without options.
pub const IPV4_BYTES: usize = 20;
/// Bytes of an IPv6 header without extensions.
pub const IPV6_BYTES: usize = 40;

/// EtherType of IPv4, as it stands in memory.
pub const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806_u16.to_be();
/// EtherType of an 802.1Q tag.
pub const ETHERTYPE_VLAN: u16 = 0x8100_u16.to_be();
/// EtherType of an 802.1ad tag.
pub const ETHERTYPE_SERVICE_VLAN: u16 = 0x88a8_u16.to_be();

/// A frame, valid for one run of a program.
#[derive(Clone, Copy)]
pub struct Frame {
    /// Its context in the kernel.
    pub skb: *mut __sk_buff,
}

impl Frame {
    /// The frame that a program is run for.
    #[inline(always)]
    pub fn of(context: &TcContext) -> Self {
        Self {
            skb: context.skb.skb,
        }
    }

    /// Bytes of the frame, those outside the linear part too.
    #[inline(always)]
    pub fn len(self) -> u32 {
        // SAFETY: the context is valid while the program runs.
        unsafe { (*self.skb).len }
    }

    /// Interface that the program is attached to.
    #[inline(always)]
    pub fn ifindex(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).ifindex }
    }

    /// True if the kernel has taken a VLAN tag off the frame.
    #[inline(always)]
    pub fn has_vlan_tag(self) -> bool {
        // SAFETY: as above.
        unsafe { (*self.skb).vlan_present != 0 }
    }

    /// VLAN of the tag that the kernel has taken off; 0 is none, the tag then says a priority only (802.1Q, 9.6).
    #[inline(always)]
    pub fn vlan_id(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).vlan_tci & 0xfff }
    }

    /// EtherType of what the frame carries, known for devices without an Ethernet header too.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.skb).protocol as u16 }
    }

    /// `SO_MARK` of the socket that sent it, or what the host's rules set.
    #[inline(always)]
    pub fn mark(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).mark }
    }

    /// Interface on which the packet came in; 0 = it is of a socket of the host.
    #[inline(always)]
    pub fn came_in_on(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).ingress_ifindex }
    }

    /// Puts an Ethernet header, not yet filled, in front of a packet of a device that knows none.
    ///
    /// # Errors
    /// `EncapsulationFailed`.
    #[inline(always)]
    pub fn add_ethernet(self) -> Result<(), DropReason> {
        // SAFETY: as above.
        let status = unsafe { bpf_skb_change_head(self.skb, ETHERNET_BYTES as u32, 0) };
        if status == 0 {
            Ok(())
        } else {
            Err(DropReason::EncapsulationFailed)
        }
    }

    /// Payload bytes of one segment of an offloaded packet, else 0.
    #[inline(always)]
    pub fn segment_bytes(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).gso_size }
    }

    /// To whom the link layer says that the frame is; 0 = this host.
    #[inline(always)]
    pub fn packet_type(self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.skb).pkt_type }
    }

    /// `T` at `offset`, if the linear part holds it.
    ///
    /// Pointers are not aligned for `T`; the kernel runs these programs only where such access is fine.
    #[inline(always)]
    pub fn at<T>(self, offset: usize) -> Option<*mut T> {
        // SAFETY: as above; the verifier ties both fields to the packet.
        let (start, end) = unsafe { ((*self.skb).data as usize, (*self.skb).data_end as usize) };
        if start + offset + size_of::<T>() > end {
            return None;
        }
        Some((start + offset) as *mut T)
    }

    /// Makes `bytes` bytes (or the whole frame, if it is shorter) readable through [`Self::at`].
    #[inline(always)]
    pub fn make_linear(self, bytes: usize) {
        if self.at::<u8>(bytes - 1).is_none() {
            let wanted = (bytes as u32).min(self.len());
            // SAFETY: as above. A failure shows as a failed bounds check.
            unsafe { bpf_skb_pull_data(self.skb, wanted) };
        }
    }

    /// Copies `T` out of the frame, wherever its bytes are. For rare paths.
    ///
    /// # Errors
    /// `Malformed` if the frame ends before.
    #[inline(always)]
    pub fn load<T: Copy>(self, offset: u32, into: &mut T) -> Result<(), DropReason> {
        // SAFETY: the destination has the size that is passed.
        let status = unsafe {
            bpf_skb_load_bytes(
                self.skb.cast(),
                offset,
                core::ptr::from_mut(into).cast(),
                size_of::<T>() as u32,
            )
        };
        if status == 0 {
            Ok(())
        } else {
            Err(DropReason::Malformed)
        }
    }
}
