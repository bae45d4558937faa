//! From a virtual address to a backend, at socket calls.

use core::sync::atomic::{Ordering, compiler_fence};

use aya_ebpf::helpers::{bpf_get_prandom_u32, bpf_set_retval};
use clustermesh_ebpf_abi::{
    BACKENDS_PER_LIST_MAX, BackendKey, FrontendKey, FrontendValue, SocketChoice,
};

use crate::features::socket_errors;
use crate::maps::{BACKENDS, FRONTENDS, TCP_CHOICES};
use crate::socket_address::SocketAddress;

/// The call goes on.
pub const ALLOW: i32 = 1;
const REFUSE: i32 = 0;

pub const TCP: u32 = 6;
pub const UDP: u32 = 17;

const ECONNREFUSED: i32 = 111;

/// How often the list is looked up anew when it was replaced and deleted under our hands.
pub const LIST_LOOKUPS_MAX: u32 = 4;

/// Steps of a binary search in the longest list.
const SEARCH_STEPS_MAX: u32 = BACKENDS_PER_LIST_MAX.ilog2() + 1;

/// The key under which an address that an application named would be a frontend.
#[inline(always)]
pub fn frontend_key(to: &SocketAddress, protocol: u32) -> FrontendKey {
    FrontendKey {
        address: to.bytes(),
        port_be: to.port_be(),
        protocol: protocol as u8,
        reserved: 0,
    }
}

/// The frontend of that key; most calls have none, and this look-up is all that they pay.
#[inline(always)]
pub fn frontend(key: &FrontendKey) -> Option<FrontendValue> {
    // SAFETY: the value is copied at once; user space replaces it as a whole.
    unsafe { FRONTENDS.get(key) }.copied()
}

/// Any backend of the frontend, and the list that it is from; `None` = there is none.
///
/// What was read of the frontend may be another's by now, and the list may be gone: then it is looked up anew.
#[inline(always)]
pub fn choose(key: &FrontendKey, first: FrontendValue) -> Option<(SocketAddress, u32)> {
    let tag = key.tag();
    let mut frontend = first;
    for _ in 0..LIST_LOOKUPS_MAX {
        let count = u32::from(frontend.backend_count);
        if count != 0 {
            // SAFETY: a plain helper.
            let slot = unsafe { bpf_get_prandom_u32() } % count;
            if let Some(backend) = backend(frontend.list_id, slot, tag) {
                return Some((backend, frontend.list_id));
            }
        }
        let next = self::frontend(key)?;
        if count == 0 && next.backend_count == 0 {
            return None;
        }
        frontend = next;
    }
    None
}

/// A backend of the frontend with that tag; `None` = the list is not there any more, or was never its.
#[inline(always)]
fn backend(list_id: u32, slot: u32, tag: u32) -> Option<SocketAddress> {
    let key = BackendKey { list_id, slot };
    let value = BACKENDS.get_ptr(&key)?;
    // SAFETY: the entry may be used anew meanwhile, which the tag shows: it is written first and read last.
    let (found, tag_now) = unsafe {
        let found = SocketAddress::new(&(*value).address, (*value).port_be);
        compiler_fence(Ordering::Acquire);
        (found, (&raw const (*value).frontend_tag).read_volatile())
    };
    (tag_now == tag).then_some(found)
}

/// Whether `wanted` stands in the frontend's list, which is sorted; `None` = the list is not there any more.
#[inline(always)]
pub fn contains(frontend: &FrontendValue, wanted: &SocketAddress, tag: u32) -> Option<bool> {
    let mut low = 0;
    let mut high = u32::from(frontend.backend_count);
    for _ in 0..SEARCH_STEPS_MAX {
        if low >= high {
            return Some(false);
        }
        let middle = low + (high - low) / 2;
        let found = backend(frontend.list_id, middle, tag)?;
        if found == *wanted {
            return Some(true);
        }
        if is_before(&found, wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    Some(false)
}

#[inline(always)]
fn is_before(a: &SocketAddress, b: &SocketAddress) -> bool {
    for i in 0..4 {
        if a.address[i] != b.address[i] {
            return u32::from_be(a.address[i]) < u32::from_be(b.address[i]);
        }
    }
    u16::from_be(a.port) < u16::from_be(b.port)
}

/// What a socket remembers of its choice.
#[inline(always)]
pub fn remember(named: &SocketAddress, chosen: &SocketAddress) -> SocketChoice {
    SocketChoice {
        virtual_address: named.bytes(),
        backend_address: chosen.bytes(),
        virtual_port_be: named.port_be(),
        backend_port_be: chosen.port_be(),
    }
}

/// Copies a choice to the socket's storage.
///
/// # Safety
///
/// `to` must be in a storage that is there.
#[inline(always)]
pub unsafe fn store(to: *mut SocketChoice, choice: &SocketChoice) {
    const WORDS: usize = size_of::<SocketChoice>() / size_of::<u32>();
    let (to, from) = (to.cast::<u32>(), core::ptr::from_ref(choice).cast::<u32>());
    for i in 0..WORDS {
        // SAFETY: both are choices, aligned to words. Volatile: else the compiler calls its memmove, which goes
        // byte by byte.
        unsafe { to.add(i).write_volatile(from.add(i).read()) };
    }
}

/// Removes what a TCP socket remembers. Most remember nothing: a look takes no lock, a removal does.
#[inline(always)]
pub fn forget_tcp(cookie: u64) {
    if TCP_CHOICES.get_ptr(&cookie).is_some() {
        let _absent = TCP_CHOICES.remove(&cookie);
    }
}

/// The address that the application named.
#[inline(always)]
pub fn virtual_of(choice: &SocketChoice) -> SocketAddress {
    SocketAddress::new(&choice.virtual_address, choice.virtual_port_be)
}

/// The address that was chosen.
#[inline(always)]
pub fn backend_of(choice: &SocketChoice) -> SocketAddress {
    SocketAddress::new(&choice.backend_address, choice.backend_port_be)
}

/// Ends the call with "connection refused"; older kernels make that "operation not permitted".
#[inline(always)]
pub fn refuse() -> i32 {
    if socket_errors() {
        // SAFETY: a plain helper, which the hooks that may refuse a call have.
        unsafe { bpf_set_retval(-ECONNREFUSED) };
    }
    REFUSE
}
