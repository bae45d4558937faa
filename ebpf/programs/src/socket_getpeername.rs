//! `getpeername()`: the application is told the address that it named.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::maps::{SOCKET_CHOICES, TCP_CHOICES};
use crate::socket_address::{Family, V4, V6, cookie, protocol};
use crate::socket_balance::{ALLOW, TCP, backend_of, virtual_of};

#[cgroup_sock_addr(getpeername4)]
pub fn socket_getpeername4(ctx: SockAddrContext) -> i32 {
    getpeername::<V4>(&ctx)
}

#[cgroup_sock_addr(getpeername6)]
pub fn socket_getpeername6(ctx: SockAddrContext) -> i32 {
    getpeername::<V6>(&ctx)
}

#[inline(always)]
fn getpeername<F: Family>(ctx: &SockAddrContext) -> i32 {
    let peer = F::read(ctx);
    let choice = if protocol(ctx) == TCP {
        // SAFETY: an entry goes only when its socket is closed, which this call prevents.
        unsafe { TCP_CHOICES.get(&cookie(ctx)) }
    } else {
        // SAFETY: the socket of the context; the storage lives as long as it.
        unsafe { SOCKET_CHOICES.get_ptr_mut(ctx).as_ref() }
    };
    if let Some(choice) = choice
        && backend_of(choice) == peer
    {
        F::write(ctx, &virtual_of(choice));
    }
    ALLOW
}
