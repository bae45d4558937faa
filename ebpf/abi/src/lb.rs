//! Services: virtual address → list of backends, and what a socket remembers of its choice.
//!
//! A frontend names a backend list by number. A changed list is written under a new
//! number first; one write of the frontend then switches every new connection. A list
//! never changes under its number, and is sorted by address, then port, both as bytes:
//! an unconnected UDP socket finds its backend again in a new list by binary search.
//! (In another order it may take another backend.) A backend may stand in a list more
//! than once, for its weight.

use crate::Address;

/// Entries of the frontend map.
pub const FRONTENDS_MAX: u32 = 1 << 16;
/// Entries of the backend map, all lists together.
pub const BACKENDS_MAX: u32 = 1 << 19;
/// Backends in one list.
pub const BACKENDS_PER_LIST_MAX: u16 = 4_096;
/// TCP sockets of a node that remember a choice; others are told the backend's address by `getpeername()`. With
/// more, the map no longer fits into a CPU's cache, and every connect pays for it.
pub const TCP_CHOICES_MAX: u32 = 1 << 16;
/// Virtual addresses that one unconnected UDP socket remembers; beyond, the oldest is forgotten.
pub const UDP_CHOICES_PER_SOCKET_MAX: usize = 8;

/// A virtual address and port (hash map). Aligned so that the programs can work on words.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendKey {
    /// Virtual address, mapped.
    pub address: Address,
    /// Port, big-endian.
    pub port_be: [u8; 2],
    /// IP protocol number (6 or 17).
    pub protocol: u8,
    /// Zero.
    pub reserved: u8,
}

/// The list that a frontend uses now.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendValue {
    /// Number of the list, unique for the life of the maps.
    pub list_id: u32,
    /// Entries of the list; 0 = connections are refused.
    pub backend_count: u16,
    /// Zero.
    pub flags: u16,
}

impl FrontendKey {
    /// A short form of the key, which stands in every backend of its lists.
    #[must_use]
    pub const fn tag(&self) -> u32 {
        let a = &self.address;
        let [p0, p1] = self.port_be;
        frontend_tag([
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
            u32::from_ne_bytes([p0, p1, self.protocol, self.reserved]),
        ])
    }
}

/// The tag of a frontend whose key has these words in memory.
#[must_use]
pub const fn frontend_tag(words: [u32; 5]) -> u32 {
    let [a, b, c, d, e] = words;
    a ^ b.rotate_left(5) ^ c.rotate_left(10) ^ d.rotate_left(15) ^ e.rotate_left(20)
}

/// A place in a list (hash map).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendKey {
    /// See [`FrontendValue::list_id`].
    pub list_id: u32,
    /// From 0.
    pub slot: u32,
}

/// A backend.
///
/// The kernel may use the memory of an entry that is deleted for another one while a program still reads it. The tag
/// shows it: it is written first and read last, and that of another frontend's backend is another one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendValue {
    /// [`FrontendKey::tag`] of the frontend whose list this is.
    pub frontend_tag: u32,
    /// Address, mapped.
    pub address: Address,
    /// Port, big-endian.
    pub port_be: [u8; 2],
    /// Cluster that has it.
    pub cluster_id: u16,
}

/// What a connected socket remembers. UDP: socket storage. TCP: hash map by socket cookie, whose entries go when
/// their sockets are closed: storage takes half a microsecond longer to be made and freed, and TCP makes one per
/// connection.
/// Aligned so that the programs can work on words.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketChoice {
    /// The address that the application named.
    pub virtual_address: Address,
    /// The address that was chosen.
    pub backend_address: Address,
    /// Port that the application named, big-endian.
    pub virtual_port_be: [u8; 2],
    /// Port that was chosen, big-endian.
    pub backend_port_be: [u8; 2],
}

/// What an unconnected UDP socket remembers of one virtual address.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpChoice {
    /// Unused entries have the virtual port 0.
    pub choice: SocketChoice,
    /// The newest list in which the backend was found.
    pub list_id: u32,
}

/// What an unconnected UDP socket remembers (socket storage).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UdpSocketChoices {
    /// In no order.
    pub choices: [UdpChoice; UDP_CHOICES_PER_SOCKET_MAX],
    /// The entry that is written next, modulo their number.
    pub next: u32,
}

const _: () = assert!(UDP_CHOICES_PER_SOCKET_MAX.is_power_of_two());
const _: () = assert!(size_of::<FrontendKey>() == 20 && size_of::<FrontendValue>() == 8);
const _: () = assert!(size_of::<BackendKey>() == 8 && size_of::<BackendValue>() == 24);
const _: () = assert!(size_of::<SocketChoice>() == 36 && size_of::<UdpChoice>() == 40);
const _: () = assert!(size_of::<UdpSocketChoices>() == 40 * UDP_CHOICES_PER_SOCKET_MAX + 4);
