//! Local endpoints: by address for delivery, by interface for the source check.

use crate::Address;

/// Entries of the local endpoint maps.
pub const LOCAL_ENDPOINTS_MAX: u32 = 1 << 14;

/// [`EndpointValue::flags`]: an address of the host itself (router, health); delivered to `cm_host`.
pub const ENDPOINT_HOST: u32 = 1 << 0;

/// A local endpoint, by its mapped address (hash map).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct EndpointValue {
    /// Host end of its veth pair, in the node's namespace.
    pub ifindex: u32,
    /// Security identity.
    pub identity: u32,
    /// MAC of the pod's interface.
    pub pod_mac: [u8; 6],
    /// MAC of the host end.
    pub host_mac: [u8; 6],
    /// `ENDPOINT_*` bits.
    pub flags: u32,
}

/// What may be sent from a host-end interface, by its index (hash map).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InterfaceValue {
    /// Allowed IPv4 source, mapped; zeros = none.
    pub address_v4: Address,
    /// Allowed IPv6 source; zeros = none.
    pub address_v6: Address,
    /// Security identity of the endpoint.
    pub identity: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<EndpointValue>() == 24 && size_of::<InterfaceValue>() == 40);
