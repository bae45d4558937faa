//! What the kernel can do, set by the loader before the programs are loaded; the verifier takes out what is not to run.

use aya_ebpf::Global;

/// Not 0: a refused socket call ends with an error of our choice (`bpf_set_retval`).
#[unsafe(no_mangle)]
static SOCKET_ERRORS: Global<u8> = Global::new(1);

/// Not 0: room for a tunnel can be made with an Ethernet header inside (`BPF_F_ADJ_ROOM_ENCAP_L2_ETH`).
#[unsafe(no_mangle)]
static ETHERNET_INSIDE: Global<u8> = Global::new(1);

/// See [`SOCKET_ERRORS`].
#[inline(always)]
pub fn socket_errors() -> bool {
    SOCKET_ERRORS.load() != 0
}

/// See [`ETHERNET_INSIDE`].
#[inline(always)]
pub fn ethernet_inside() -> bool {
    ETHERNET_INSIDE.load() != 0
}
