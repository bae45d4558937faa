//! When this node's WireGuard key gives way to the next one.
//!
//! Keys are counted by epochs, in step over the whole mesh: a device speaks with keys of its own epoch only. A node that
//! begins an epoch runs a second device with the next key beside the first one; others see that in its record and
//! follow. From then on both devices of every node take packets, and each node sends to each other one through the new
//! device once the two have shaken hands there. The old device goes when nobody uses it any more.

use crate::change::NodeKey;

/// Epoch of a key whose owner counts none (Cilium's): it belongs to whichever key is the present one.
pub const EPOCH_ANY: u32 = u32::MAX;
/// A peer that is silent for so long after a change began is not waited for.
pub const SILENCE_MS_MAX: u64 = 10 * 60 * 1_000;
/// A node of another cluster is not waited for longer than this, whatever it sends: none may keep our old keys in use
/// for ever.
pub const FOREIGN_WAIT_MS_MAX: u64 = 24 * 60 * 60 * 1_000;
/// Least time from the beginning of a change to its end, and to the beginning of the next.
pub const CHANGE_MS_MIN: u64 = 5_000;
/// Who has sent nothing to the old device for so long does not use it any more.
pub const UNUSED_MS_MIN: u64 = 3_000;
/// Who goes to a far epoch comes by all multiples of this on its way: so those who follow one claim meet, wherever they
/// began, and no single claim uses the numbers up.
pub const EPOCHS_PER_STEP: u32 = 1_024;
/// A key that is younger gives way to no other cluster's epoch: so none can make this one change keys without end.
pub const FOREIGN_KEY_MS_MIN: u64 = 10 * 60 * 1_000;

/// This node's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnKeys {
    /// Epoch of the key in use.
    pub current: u32,
    /// How long it has been in use.
    pub age_ms: u64,
    /// Epoch of the key that comes next, while keys change.
    pub next: Option<u32>,
    /// How long ago the change began, or the last one ended.
    pub since_ms: u64,
    /// All other nodes are known: who is missing is not only late.
    pub is_settled: bool,
}

/// Another node that has a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerKeys {
    /// It is of our own cluster.
    pub is_own: bool,
    /// Largest epoch among its keys.
    pub newest: u32,
    /// It has answered on the device of our next key.
    pub has_answered: bool,
    /// How long it has sent nothing to the device of our present key.
    pub silent_ms: u64,
}

impl PeerKeys {
    /// The largest epoch among these keys; `None` for a node that counts none.
    #[must_use]
    pub fn newest_of(keys: &[NodeKey]) -> Option<u32> {
        let counted = keys.iter().map(|key| key.epoch);
        counted.filter(|epoch| *epoch != EPOCH_ANY).max()
    }
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Nothing.
    Wait,
    /// Make a key of this epoch and a device for it.
    Begin {
        /// The epoch.
        epoch: u32,
    },
    /// The next key becomes the present one; the device of the old one goes.
    Finish {
        /// Peers that were not waited for any longer.
        left_behind: usize,
    },
}

/// Decides; `every_ms` is the age at which a key is changed (0 = never), `is_asked`: somebody wants it now.
#[must_use]
pub fn decide(own: OwnKeys, peers: &[PeerKeys], every_ms: u64, is_asked: bool) -> Decision {
    if own.since_ms < CHANGE_MS_MIN {
        return Decision::Wait;
    }
    if own.next.is_some() {
        let is_through = |peer: &PeerKeys| peer.has_answered && peer.silent_ms >= UNUSED_MS_MIN;
        let missing = peers.iter().filter(|peer| !is_through(peer));
        // Who still sends is not silent, only cut off from the records: traffic goes on without them.
        let is_lost = |peer: &PeerKeys| {
            own.since_ms.min(peer.silent_ms) >= SILENCE_MS_MAX
                || (!peer.is_own && own.since_ms >= FOREIGN_WAIT_MS_MAX)
        };
        return if own.is_settled && missing.clone().all(is_lost) {
            Decision::Finish {
                left_behind: missing.count(),
            }
        } else {
            Decision::Wait
        };
    }
    let Some(following) = own.current.checked_add(1).filter(|e| *e != EPOCH_ANY) else {
        return Decision::Wait;
    };
    let is_old = every_ms > 0 && own.age_ms >= every_ms;
    match followed(own, peers) {
        // Others have begun: this node follows to the same epoch.
        Some(epoch) => Decision::Begin { epoch },
        None if is_old || is_asked => Decision::Begin { epoch: following },
        None => Decision::Wait,
    }
}

/// The epoch to which others take this node along.
///
/// Nodes of the own cluster are believed at once. What other clusters say is a claim: it is followed, for a change that
/// they begin must end, but in steps and not more often than a key is young. A node with its first key begins where
/// most of its own cluster is.
fn followed(own: OwnKeys, peers: &[PeerKeys]) -> Option<u32> {
    let home = if own.current == 0 {
        home(peers)
    } else {
        own.current
    };
    let step = (home / EPOCHS_PER_STEP + 1).saturating_mul(EPOCHS_PER_STEP);
    let most = step.min(EPOCH_ANY - 1);
    let heeds_others = home == 0 || own.age_ms >= FOREIGN_KEY_MS_MIN;
    peers
        .iter()
        .filter(|peer| peer.is_own || heeds_others)
        .map(|peer| peer.newest)
        .filter(|epoch| *epoch > own.current && *epoch != EPOCH_ANY)
        .map(|epoch| epoch.min(most))
        .max()
}

/// The epoch that half of the own cluster's nodes have come to: a few cannot lead a new one astray.
fn home(peers: &[PeerKeys]) -> u32 {
    let own = peers.iter().filter(|peer| peer.is_own);
    let mut epochs: Vec<u32> = own.map(|peer| peer.newest).collect();
    epochs.sort_unstable();
    let middle = epochs.len().saturating_sub(1) / 2;
    epochs.get(middle).copied().unwrap_or(0)
}

/// Bytes of an empty message, of a handshake's first and of its second (the paper, 5.4).
const KEEPALIVE_BYTES: u64 = 32;
const INITIATION_BYTES: u64 = 148;
const RESPONSE_BYTES: u64 = 92;

/// Whether bytes that a peer sent in this time can only be packets, for a device that counts nothing but bytes.
/// Keepalives and handshakes say that a device is there, not that anybody uses it.
#[must_use]
pub fn is_data(bytes: u64, elapsed_ms: u64) -> bool {
    let keepalives_max = 1 + elapsed_ms / 2_000;
    let handshakes = [
        0,
        INITIATION_BYTES,
        RESPONSE_BYTES,
        INITIATION_BYTES + RESPONSE_BYTES,
    ];
    let is_explained = |rest: u64| {
        rest.is_multiple_of(KEEPALIVE_BYTES) && rest / KEEPALIVE_BYTES <= keepalives_max
    };
    !handshakes
        .into_iter()
        .filter_map(|handshake| bytes.checked_sub(handshake))
        .any(is_explained)
}

/// What is left of the key before, after the next one was taken into use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remains {
    /// The kernel sends packets to the old device.
    pub is_sent_to: bool,
    /// The key in use is still stored as the next one.
    pub is_stored_as_next: bool,
    /// The old device is there.
    pub has_device: bool,
}

/// A step of the end of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndStep {
    /// The kernel is to send to the device of the key in use.
    Redirect,
    /// The key in use is to be stored as the present one.
    Promote,
    /// The old device is to go.
    Remove,
}

/// The next step, by what there is and not by what was done: whoever goes on after a crash does the same. Until the
/// old device has no packets any more the old key is stored, and it goes only when a start would not look for it.
#[must_use]
pub const fn end_step(remains: Remains) -> Option<EndStep> {
    match remains {
        Remains {
            is_sent_to: true, ..
        } => Some(EndStep::Redirect),
        Remains {
            is_stored_as_next: true,
            ..
        } => Some(EndStep::Promote),
        Remains {
            has_device: true, ..
        } => Some(EndStep::Remove),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
