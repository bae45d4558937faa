//! Map keys, values and events shared by the kernel programs and user space.
//!
//! Everything here is plain integers and byte arrays with explicit padding, in
//! network byte order where a name ends in `_be`. Sizes and offsets are asserted
//! at compile time on both sides; [`LAYOUT_VERSION`] stands in every pinned name.
#![no_std]

mod config;
mod endpoint;
mod flow;
mod ipcache;
mod lb;
mod mesh;
mod metrics;
mod node;

pub use config::*;
pub use endpoint::*;
pub use flow::*;
pub use ipcache::*;
pub use lb::*;
pub use mesh::*;
pub use metrics::*;
pub use node::*;

/// Version of every layout in this crate. Pinned names carry it.
#[cfg(not(feature = "layout-next"))]
pub const LAYOUT_VERSION: u32 = 4;
/// Version of the layout that tests of an upgrade build beside the present one.
#[cfg(feature = "layout-next")]
pub const LAYOUT_VERSION: u32 = 1_000_004;

/// A 16-byte address; IPv4 is mapped as `::ffff:a.b.c.d` (RFC 4291, 2.5.5.2).
pub type Address = [u8; 16];

/// Bits before the IPv4 address in an [`Address`].
pub const V4_MAPPED_BITS: u32 = 96;

/// An IPv4 address in its mapped form.
#[must_use]
pub const fn v4_mapped(a: [u8; 4]) -> Address {
    [
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3],
    ]
}

/// True for a mapped IPv4 address.
#[must_use]
pub const fn is_v4_mapped(a: &Address) -> bool {
    let mut i = 0;
    while i < 10 {
        if a[i] != 0 {
            return false;
        }
        i += 1;
    }
    a[10] == 0xff && a[11] == 0xff
}
