//! `close()`: what a TCP socket remembers goes with it.

use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;

use crate::socket_balance::{ALLOW, TCP, forget_tcp};

#[cgroup_sock(sock_release)]
pub fn socket_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is valid for as long as the program runs.
    if unsafe { (*ctx.sock).protocol } == TCP {
        // SAFETY: as above.
        let cookie = unsafe { bpf_get_socket_cookie(ctx.sock.cast()) };
        forget_tcp(cookie);
    }
    ALLOW
}
