//! `recvmsg()` on a UDP socket: what a backend answered comes from the virtual address.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::maps::{SOCKET_CHOICES, UDP_CHOICES};
use crate::socket_address::{Family, V4, V6};
use crate::socket_balance::{ALLOW, backend_of, virtual_of};

#[cgroup_sock_addr(recvmsg4)]
pub fn socket_recvmsg4(ctx: SockAddrContext) -> i32 {
    recvmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(recvmsg6)]
pub fn socket_recvmsg6(ctx: SockAddrContext) -> i32 {
    recvmsg::<V6>(&ctx)
}

#[inline(always)]
fn recvmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let source = F::read(ctx);
    // SAFETY: the socket of the context; the storage lives as long as it.
    if let Some(choice) = unsafe { SOCKET_CHOICES.get_ptr_mut(ctx).as_ref() }
        && backend_of(choice) == source
    {
        F::write(ctx, &virtual_of(choice));
        return ALLOW;
    }
    // SAFETY: as above.
    if let Some(storage) = unsafe { UDP_CHOICES.get_ptr_mut(ctx).as_ref() } {
        for entry in &storage.choices {
            if backend_of(&entry.choice) == source && virtual_of(&entry.choice).port != 0 {
                F::write(ctx, &virtual_of(&entry.choice));
                return ALLOW;
            }
        }
    }
    ALLOW
}
