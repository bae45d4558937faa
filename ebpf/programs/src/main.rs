//! The kernel programs: one file per hook, shared steps beside them.
//!
//! Licence: Apache-2.0 OR GPL-2.0-only. The kernel knows no string for that pair, so
//! the object carries the half that it takes (helpers such as `bpf_fib_lookup` are
//! for GPL-compatible programs only).
#![no_std]
#![no_main]
#![expect(
    unsafe_code,
    reason = "helpers, maps and packets are reached through raw pointers"
)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "fields are cut out of words on purpose, and sizes of headers fit into anything"
)]
#![expect(
    clippy::needless_borrows_for_generic_args,
    reason = "a key or value that is passed itself is copied on the stack"
)]

mod answer;
mod arrival;
mod checksum;
mod clear;
mod deliver;
mod encap;
mod features;
mod fib;
mod frame;
mod from_host;
mod from_network;
mod from_pod;
mod from_wireguard;
mod maps;
mod mesh;
mod mss;
mod own_device;
mod parse;
mod route;
mod socket_address;
mod socket_balance;
mod socket_connect;
mod socket_getpeername;
mod socket_recvmsg;
mod socket_release;
mod socket_sendmsg;
mod to_network;
mod verdict;

/// Read by the kernel when a program is loaded.
#[unsafe(no_mangle)]
#[unsafe(link_section = "license")]
static LICENSE: [u8; 7] = *b"GPL v2\0";

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    // Never reached: the verifier refuses a program in which it could be.
    loop {}
}
