//! `sendmsg()` on a UDP socket with an address: one backend for each socket and virtual address, as long as it is there.

use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use clustermesh_ebpf_abi::{FrontendKey, FrontendValue, UDP_CHOICES_PER_SOCKET_MAX, UdpChoice};

use crate::maps::UDP_CHOICES;
use crate::socket_address::{Family, SocketAddress, V4, V6};
use crate::socket_balance::{
    ALLOW, LIST_LOOKUPS_MAX, UDP, backend_of, choose, contains, frontend, frontend_key, refuse,
    remember, store, virtual_of,
};

#[cgroup_sock_addr(sendmsg4)]
pub fn socket_sendmsg4(ctx: SockAddrContext) -> i32 {
    sendmsg::<V4>(&ctx)
}

#[cgroup_sock_addr(sendmsg6)]
pub fn socket_sendmsg6(ctx: SockAddrContext) -> i32 {
    sendmsg::<V6>(&ctx)
}

#[inline(always)]
fn sendmsg<F: Family>(ctx: &SockAddrContext) -> i32 {
    let named = F::read(ctx);
    let key = frontend_key(&named, UDP);
    let Some(frontend) = self::frontend(&key) else {
        return ALLOW;
    };
    match kept_or_chosen(ctx, &named, &key, frontend) {
        Some(backend) if F::write(ctx, &backend) => ALLOW,
        _ => refuse(),
    }
}

#[inline(always)]
fn kept_or_chosen(
    ctx: &SockAddrContext,
    named: &SocketAddress,
    key: &FrontendKey,
    frontend: FrontendValue,
) -> Option<SocketAddress> {
    if frontend.backend_count == 0 {
        return None;
    }
    // SAFETY: the socket of the context; new storage is zeros.
    let storage = unsafe { UDP_CHOICES.get_or_insert_ptr_mut(ctx, None) };
    if storage.is_null() {
        // Out of memory: the datagram arrives, its answer comes from the backend's own address.
        return choose(key, frontend).map(|(chosen, _)| chosen);
    }
    // SAFETY: checked. Threads that share the socket may write at the same time (the target has no atomic
    // add): should two take the same entry for their first datagrams, one of them chooses anew with its next.
    let storage = unsafe { &mut *storage };
    // The newest first: it is the likeliest. And as the verifier does not know where that is, one look at what follows
    // stands for all places.
    let mut found = None;
    for age in 1..=UDP_CHOICES_PER_SOCKET_MAX as u32 {
        let place = storage.next.wrapping_sub(age) as usize % UDP_CHOICES_PER_SOCKET_MAX;
        if virtual_of(&storage.choices[place].choice) == *named {
            found = Some(place);
            break;
        }
    }
    if let Some(place) = found
        && let Some(kept) = kept(key, frontend, &mut storage.choices[place])
    {
        return Some(kept);
    }
    let (chosen, list_id) = choose(key, frontend)?;
    let place = found.unwrap_or_else(|| {
        let oldest = storage.next as usize % UDP_CHOICES_PER_SOCKET_MAX;
        storage.next = storage.next.wrapping_add(1);
        oldest
    });
    let entry = &mut storage.choices[place];
    // SAFETY: the entry is in the storage.
    unsafe { store(&raw mut entry.choice, &remember(named, &chosen)) };
    entry.list_id = list_id;
    Some(chosen)
}

/// The backend that the socket has, if the frontend still has it.
#[inline(always)]
fn kept(key: &FrontendKey, first: FrontendValue, entry: &mut UdpChoice) -> Option<SocketAddress> {
    let kept = backend_of(&entry.choice);
    if entry.list_id == first.list_id {
        return Some(kept);
    }
    let tag = key.tag();
    let mut frontend = first;
    for _ in 0..LIST_LOOKUPS_MAX {
        match contains(&frontend, &kept, tag) {
            Some(true) => {
                entry.list_id = frontend.list_id;
                return Some(kept);
            }
            Some(false) => return None,
            // Replaced under our hands: the newer list may have it.
            None => frontend = self::frontend(key)?,
        }
    }
    None
}
