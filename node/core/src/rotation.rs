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
/// Least time from the beginning of a change to its end, and to the beginning of the next.
pub const CHANGE_MS_MIN: u64 = 5_000;
/// Who has sent nothing to the old device for so long does not use it any more.
pub const UNUSED_MS_MIN: u64 = 3_000;
/// Epochs that a peer may be ahead of a node that has changed keys before: more is no step of the mesh.
pub const EPOCHS_AHEAD_MAX: u32 = 1_024;

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
        let is_lost = |peer: &PeerKeys| own.since_ms.min(peer.silent_ms) >= SILENCE_MS_MAX;
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
    // A node that is new goes to where the mesh is; nobody takes one that is there along by more than steps of a mesh.
    let most = match own.current {
        0 => EPOCH_ANY - 1,
        current => current.saturating_add(EPOCHS_AHEAD_MAX).min(EPOCH_ANY - 1),
    };
    let mesh = peers.iter().map(|peer| peer.newest);
    let ahead = mesh.filter(|epoch| (following..=most).contains(epoch));
    let is_old = every_ms > 0 && own.age_ms >= every_ms;
    match ahead.max() {
        // Others have begun: this node follows to the same epoch.
        Some(epoch) => Decision::Begin { epoch },
        None if is_old || is_asked => Decision::Begin { epoch: following },
        None => Decision::Wait,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const DAY_MS: u64 = 24 * 60 * 60 * 1_000;

    fn own(current: u32, age_ms: u64) -> OwnKeys {
        OwnKeys {
            current,
            age_ms,
            next: None,
            since_ms: CHANGE_MS_MIN,
            is_settled: true,
        }
    }

    fn peer(newest: u32) -> PeerKeys {
        PeerKeys {
            newest,
            has_answered: false,
            silent_ms: SILENCE_MS_MAX,
        }
    }

    #[test]
    fn a_change_begins_by_age_by_command_or_because_others_have_begun() {
        let peers = [peer(4), peer(3)];
        assert_eq!(
            decide(own(4, DAY_MS - 1), &peers, DAY_MS, false),
            Decision::Wait
        );
        let next = Decision::Begin { epoch: 5 };
        assert_eq!(decide(own(4, DAY_MS), &peers, DAY_MS, false), next);
        assert_eq!(decide(own(4, DAY_MS), &peers, 0, false), Decision::Wait);
        assert_eq!(decide(own(4, 0), &peers, 0, true), next);
        // One that comes late goes to where the others are.
        let far = Decision::Begin { epoch: 9 };
        assert_eq!(decide(own(4, 0), &[peer(9), peer(7)], DAY_MS, false), far);
        // What no mesh can have come to is not followed.
        let wild = [peer(u32::MAX - 1), peer(4 + EPOCHS_AHEAD_MAX + 1)];
        assert_eq!(decide(own(4, 0), &wild, DAY_MS, false), Decision::Wait);
        let step = Decision::Begin {
            epoch: 4 + EPOCHS_AHEAD_MAX,
        };
        let peers = [peer(4 + EPOCHS_AHEAD_MAX)];
        assert_eq!(decide(own(4, 0), &peers, DAY_MS, false), step);
    }

    #[test]
    fn a_new_node_goes_to_where_the_mesh_is_however_far() {
        let far = 40 * EPOCHS_AHEAD_MAX;
        let next = Decision::Begin { epoch: far };
        assert_eq!(
            decide(own(0, 0), &[peer(far), peer(far - 1)], 0, false),
            next
        );
        assert_eq!(
            decide(own(0, 0), &[peer(EPOCH_ANY)], 0, false),
            Decision::Wait
        );
    }

    #[test]
    fn no_node_comes_to_the_epoch_that_means_all() {
        let peers = [peer(EPOCH_ANY), peer(EPOCH_ANY - 1)];
        for last in [EPOCH_ANY - 1, EPOCH_ANY] {
            let decision = decide(own(last, DAY_MS), &peers, DAY_MS, true);
            assert_eq!(decision, Decision::Wait);
        }
        let last = Decision::Begin {
            epoch: EPOCH_ANY - 1,
        };
        for current in [EPOCH_ANY - 2, EPOCH_ANY - EPOCHS_AHEAD_MAX] {
            assert_eq!(decide(own(current, 0), &peers, DAY_MS, false), last);
        }
    }

    #[test]
    fn a_change_begins_but_does_not_end_while_somebody_may_be_missing() {
        let unsettled = OwnKeys {
            is_settled: false,
            ..own(4, 0)
        };
        let next = Decision::Begin { epoch: 5 };
        assert_eq!(decide(unsettled, &[peer(5)], DAY_MS, false), next);
        let changing = OwnKeys {
            next: Some(5),
            since_ms: SILENCE_MS_MAX,
            ..unsettled
        };
        assert_eq!(decide(changing, &[], DAY_MS, false), Decision::Wait);
        let settled = OwnKeys {
            is_settled: true,
            ..changing
        };
        let done = Decision::Finish { left_behind: 0 };
        assert_eq!(decide(settled, &[], DAY_MS, false), done);
    }

    #[test]
    fn a_change_ends_when_all_have_come_over_or_were_silent_for_long() {
        let through = PeerKeys {
            has_answered: true,
            ..peer(5)
        };
        let lingering = PeerKeys {
            silent_ms: UNUSED_MS_MIN - 1,
            ..through
        };
        let changing = |since_ms| OwnKeys {
            next: Some(5),
            since_ms,
            ..own(4, DAY_MS)
        };
        let done = Decision::Finish { left_behind: 0 };
        assert_eq!(
            decide(changing(CHANGE_MS_MIN), &[through], DAY_MS, false),
            done
        );
        assert_eq!(decide(changing(CHANGE_MS_MIN), &[], DAY_MS, false), done);
        let early = changing(CHANGE_MS_MIN - 1);
        assert_eq!(decide(early, &[through], DAY_MS, false), Decision::Wait);
        for missing in [peer(4), peer(5)] {
            let late = changing(SILENCE_MS_MAX - 1);
            let peers = [through, missing];
            assert_eq!(decide(late, &peers, DAY_MS, true), Decision::Wait);
            let over = Decision::Finish { left_behind: 1 };
            assert_eq!(
                decide(changing(SILENCE_MS_MAX), &peers, DAY_MS, false),
                over
            );
        }
        // One that has come over and fell silent a moment ago is not waited for.
        let quiet = PeerKeys {
            silent_ms: UNUSED_MS_MIN,
            ..through
        };
        assert_eq!(
            decide(changing(CHANGE_MS_MIN), &[quiet], DAY_MS, false),
            done
        );
        // One that still uses the old key is waited for however long it takes, up to the last second of its silence.
        for missing in [
            lingering,
            PeerKeys {
                silent_ms: SILENCE_MS_MAX - 1,
                ..peer(4)
            },
        ] {
            let late = changing(10 * SILENCE_MS_MAX);
            let decision = decide(late, &[through, missing], DAY_MS, false);
            assert_eq!(decision, Decision::Wait);
        }
    }

    /// A node of a mesh in which records travel when chance wants it.
    #[derive(Clone)]
    struct Node {
        current: u32,
        next: Option<u32>,
        since_ms: u64,
        /// Epochs of every other node, as this one has heard of them last.
        known: Vec<Vec<u32>>,
        /// Others that have answered, by epoch.
        answered: Vec<Vec<u32>>,
    }

    impl Node {
        fn epochs(&self) -> Vec<u32> {
            [self.current].into_iter().chain(self.next).collect()
        }

        /// Through the device of which epoch this node sends to another; as the model does.
        fn sends_to(&self, other: usize) -> Option<u32> {
            let usable = self
                .epochs()
                .into_iter()
                .filter(|e| self.known[other].contains(e));
            let usable: Vec<u32> = usable.collect();
            let answered = usable
                .iter()
                .rev()
                .find(|e| self.answered[other].contains(e));
            answered.or(usable.first()).copied()
        }
    }

    proptest! {
        #[test]
        fn no_packet_is_lost_while_a_mesh_changes_its_keys(
            steps in prop::collection::vec((0usize..4, 0usize..4, 0u8..4), 1..400),
        ) {
            let fresh = Node {
                current: 0,
                next: None,
                since_ms: CHANGE_MS_MIN,
                known: vec![vec![0]; 4],
                answered: vec![vec![0]; 4],
            };
            let mut nodes = vec![fresh; 4];
            for (actor, other, what) in steps {
                match what {
                    // A record arrives.
                    0 => {
                        let epochs = nodes[other].epochs();
                        nodes[actor].known[other] = epochs;
                    }
                    // Devices shake hands that know each other.
                    1 if actor != other => {
                        for epoch in nodes[actor].epochs() {
                            let knows = |a: usize, b: usize| nodes[a].known[b].contains(&epoch);
                            if nodes[other].epochs().contains(&epoch) && knows(actor, other) && knows(other, actor) {
                                nodes[actor].answered[other].push(epoch);
                                nodes[other].answered[actor].push(epoch);
                            }
                        }
                    }
                    _ => {
                        let node = &nodes[actor];
                        let keys = OwnKeys { current: node.current, age_ms: 0, next: node.next, since_ms: node.since_ms, is_settled: true };
                        let peers: Vec<PeerKeys> = (0..4).filter(|other| *other != actor).map(|other| PeerKeys {
                            newest: node.known[other].iter().copied().max().unwrap_or(0),
                            has_answered: node.next.is_some_and(|next| node.answered[other].contains(&next)),
                            silent_ms: if nodes[other].sends_to(actor) == Some(node.current) { 0 } else { SILENCE_MS_MAX },
                        }).collect();
                        match decide(keys, &peers, 0, actor == 0) {
                            Decision::Begin { epoch } => nodes[actor].next = Some(epoch),
                            Decision::Finish { left_behind } => {
                                prop_assert_eq!(left_behind, 0);
                                let node = &mut nodes[actor];
                                node.current = node.next.take().unwrap();
                            }
                            Decision::Wait => {}
                        }
                    }
                }
                for a in 0..4 {
                    for b in (0..4).filter(|b| *b != a) {
                        let epoch = nodes[a].sends_to(b);
                        prop_assert!(epoch.is_some(), "{} has no way to {}", a, b);
                        let epoch = epoch.unwrap();
                        let is_taken = nodes[b].epochs().contains(&epoch) && nodes[b].known[a].contains(&epoch);
                        // A key under which nobody has answered is the old one, which both still have.
                        prop_assert!(is_taken, "{} sends to {} with epoch {}", a, b, epoch);
                    }
                }
            }
        }
    }
}
