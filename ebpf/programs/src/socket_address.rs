//! Addresses of a socket call, read and written as 16 bytes whatever the family.

use aya_ebpf::bindings::bpf_sock;
use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::programs::SockAddrContext;
use clustermesh_ebpf_abi::Address;

/// An [`Address`] as four words in network order: the verifier and the CPU like those better than bytes.
pub type Words = [u32; 4];

/// Third word of a mapped IPv4 address.
const MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

/// An address and port, both in network order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct SocketAddress {
    pub address: Words,
    pub port: u16,
}

impl SocketAddress {
    /// From a key or value of a map, whose structs have the alignment of a word.
    #[inline(always)]
    pub fn new(address: &Address, port_be: [u8; 2]) -> Self {
        Self {
            // SAFETY: 16 bytes; every struct of the ABI that this is called for is aligned to 4 bytes and has
            // its addresses at multiples of 4, which `const` assertions below hold fast.
            address: unsafe { *core::ptr::from_ref(address).cast::<Words>() },
            port: u16::from_ne_bytes(port_be),
        }
    }

    /// The address as a map has it.
    #[inline(always)]
    pub fn bytes(&self) -> Address {
        // SAFETY: both are 16 plain bytes.
        unsafe { core::mem::transmute::<Words, Address>(self.address) }
    }

    #[inline(always)]
    pub fn port_be(&self) -> [u8; 2] {
        self.port.to_ne_bytes()
    }
}

const _: () = {
    use clustermesh_ebpf_abi::{BackendValue, FrontendKey, SocketChoice};
    use core::mem::offset_of;
    assert!(align_of::<FrontendKey>() == 4 && offset_of!(FrontendKey, address) == 0);
    assert!(align_of::<BackendValue>() == 4 && offset_of!(BackendValue, address) == 4);
    assert!(offset_of!(BackendValue, frontend_tag) == 0);
    assert!(align_of::<SocketChoice>() == 4 && offset_of!(SocketChoice, virtual_address) == 0);
    assert!(offset_of!(SocketChoice, backend_address) == 16);
};

/// How the hooks of one address family see the address.
pub trait Family {
    /// The address that the application named, or that it is about to be told.
    fn read(ctx: &SockAddrContext) -> SocketAddress;

    /// Puts another one there; false if it is not of this family.
    fn write(ctx: &SockAddrContext, to: &SocketAddress) -> bool;
}

/// Calls with a `sockaddr_in`.
pub struct V4;
/// Calls with a `sockaddr_in6`, mapped addresses among them.
pub struct V6;

// Fields of the context are read and written one word at a time, volatile: the verifier
// refuses the wider or narrower accesses that the compiler would make of them.

impl Family for V4 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        // SAFETY: the context is valid for as long as the program runs.
        let address = unsafe { (&raw const (*ctx.sock_addr).user_ip4).read_volatile() };
        SocketAddress {
            address: [0, 0, MAPPED, address],
            port: port(ctx),
        }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, to: &SocketAddress) -> bool {
        let [a, b, c, d] = to.address;
        if a != 0 || b != 0 || c != MAPPED {
            return false;
        }
        // SAFETY: as above; the hooks in use may write address and port.
        unsafe { (&raw mut (*ctx.sock_addr).user_ip4).write_volatile(d) };
        set_port(ctx, to.port);
        true
    }
}

impl Family for V6 {
    #[inline(always)]
    fn read(ctx: &SockAddrContext) -> SocketAddress {
        // SAFETY: the context is valid for as long as the program runs.
        let words = unsafe { (&raw const (*ctx.sock_addr).user_ip6).cast::<u32>() };
        // SAFETY: four words.
        let word = |i| unsafe { words.add(i).read_volatile() };
        SocketAddress {
            address: [word(0), word(1), word(2), word(3)],
            port: port(ctx),
        }
    }

    #[inline(always)]
    fn write(ctx: &SockAddrContext, to: &SocketAddress) -> bool {
        // SAFETY: as above; the hooks in use may write address and port.
        let words = unsafe { (&raw mut (*ctx.sock_addr).user_ip6).cast::<u32>() };
        let [a, b, c, d] = to.address;
        // SAFETY: four words.
        unsafe {
            words.write_volatile(a);
            words.add(1).write_volatile(b);
            words.add(2).write_volatile(c);
            words.add(3).write_volatile(d);
        }
        set_port(ctx, to.port);
        true
    }
}

#[inline(always)]
fn port(ctx: &SockAddrContext) -> u16 {
    // SAFETY: the context is valid for as long as the program runs.
    let port = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    // The kernel keeps the port's two bytes in the first half of the word.
    port as u16
}

#[inline(always)]
fn set_port(ctx: &SockAddrContext, port: u16) {
    // SAFETY: as above.
    unsafe { (&raw mut (*ctx.sock_addr).user_port).write_volatile(u32::from(port)) };
}

/// IP protocol of the socket.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() }
}

/// Names the socket for as long as it lives; no other one ever has the same.
#[inline(always)]
pub fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is valid for as long as the program runs.
    unsafe { bpf_get_socket_cookie(ctx.sock_addr.cast()) }
}

/// The socket itself.
#[inline(always)]
pub fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    // SAFETY: the context is valid for as long as the program runs; the union is always the socket.
    unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk }
}
