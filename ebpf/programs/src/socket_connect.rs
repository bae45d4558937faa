//! `connect()`: a virtual address becomes a backend, chosen once for the connection.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;

use crate::maps::{SOCKET_CHOICES, TCP_CHOICES};
use crate::socket_address::{Family, V4, V6, cookie, protocol, socket};
use crate::socket_balance::{
    ALLOW, TCP, UDP, choose, forget_tcp, frontend, frontend_key, refuse, remember, store,
};

#[cgroup_sock_addr(connect4)]
pub fn socket_connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx)
}

#[cgroup_sock_addr(connect6)]
pub fn socket_connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx)
}

#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext) -> i32 {
    let protocol = protocol(ctx);
    if protocol != TCP && protocol != UDP {
        return ALLOW;
    }
    let named = F::read(ctx);
    let key = frontend_key(&named, protocol);
    let Some(frontend) = frontend(&key) else {
        forget(ctx, protocol);
        return ALLOW;
    };
    let Some((chosen, _)) = choose(&key, frontend) else {
        return refuse();
    };
    if !F::write(ctx, &chosen) {
        return refuse();
    }
    let mut choice = remember(&named, &chosen);
    // Out of memory or room costs the application the virtual name of its peer, not the connection.
    if protocol == TCP {
        let _full = TCP_CHOICES.insert(&cookie(ctx), &choice, 0);
        return ALLOW;
    }
    // SAFETY: the socket of the context.
    let stored = unsafe { SOCKET_CHOICES.get_or_insert_ptr_mut(ctx, Some(&mut choice)) };
    if !stored.is_null() {
        // An older choice is left as it is by the call above.
        // SAFETY: checked; the storage lives as long as the socket.
        unsafe { store(stored, &choice) };
    }
    ALLOW
}

/// A socket may be connected again, to what is no service; most never remembered anything.
#[inline(always)]
fn forget(ctx: &SockAddrContext, protocol: u32) {
    if protocol == TCP {
        forget_tcp(cookie(ctx));
    } else {
        // SAFETY: the socket of the context.
        let _absent = unsafe { SOCKET_CHOICES.delete(socket(ctx)) };
    }
}
