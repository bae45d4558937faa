//! Changes of keys, step by step and by chance.

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
        is_own: true,
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
}

fn foreign(newest: u32) -> PeerKeys {
    PeerKeys {
        is_own: false,
        ..peer(newest)
    }
}

fn begin(epoch: u32) -> Decision {
    Decision::Begin { epoch }
}

#[test]
fn a_new_node_goes_to_where_its_own_cluster_is_however_far() {
    let far = 40 * EPOCHS_PER_STEP;
    let peers = [peer(far + 1), peer(far), peer(far), peer(0)];
    assert_eq!(decide(own(0, 0), &peers, 0, false), begin(far + 1));
    assert_eq!(
        decide(own(0, 0), &[peer(EPOCH_ANY)], 0, false),
        Decision::Wait
    );
    // One of them alone leads nobody there.
    let wild = [peer(u32::MAX - 1), peer(far), peer(far)];
    let step = begin(far + EPOCHS_PER_STEP);
    assert_eq!(decide(own(0, 0), &wild, 0, false), step);
    let wild = [peer(u32::MAX - 1), peer(0), peer(0)];
    assert_eq!(decide(own(0, 0), &wild, 0, false), begin(EPOCHS_PER_STEP));
}

#[test]
fn another_clusters_epoch_is_followed_in_steps_and_by_no_young_key() {
    let wild = [foreign(u32::MAX - 1), peer(0)];
    let step = begin(EPOCHS_PER_STEP);
    assert_eq!(decide(own(0, 0), &wild, 0, false), step);
    let wild = [foreign(u32::MAX - 1), peer(4)];
    let young = own(4, FOREIGN_KEY_MS_MIN - 1);
    assert_eq!(decide(young, &wild, 0, false), Decision::Wait);
    assert_eq!(decide(own(4, FOREIGN_KEY_MS_MIN), &wild, 0, false), step);
    // A new node of a cluster that is somewhere goes there, whatever others say.
    assert_eq!(decide(own(0, 0), &wild, 0, false), begin(4));
    // A cluster that joins a mesh goes to where that is.
    let mesh = [foreign(900), foreign(901), peer(0)];
    assert_eq!(decide(own(0, 0), &mesh, 0, false), begin(901));
}

#[test]
fn those_who_follow_one_wild_claim_meet_on_their_way() {
    let mut epochs = [0, 100, 1_500, 4_000];
    for _ in 0..8 {
        let before = epochs;
        for (place, current) in epochs.iter_mut().enumerate() {
            let others = before
                .iter()
                .enumerate()
                .filter(|(other, _)| *other != place);
            let mut peers: Vec<PeerKeys> = others.map(|(_, epoch)| foreign(*epoch)).collect();
            peers.push(foreign(u32::MAX - 1));
            let keys = own(*current, FOREIGN_KEY_MS_MIN);
            if let Decision::Begin { epoch } = decide(keys, &peers, 0, false) {
                assert!(epoch <= *current + EPOCHS_PER_STEP, "{current} to {epoch}");
                *current = epoch;
            }
        }
    }
    // Each goes on in its own time; nobody is at a number where no other comes by.
    for epoch in epochs {
        assert_eq!(epoch % EPOCHS_PER_STEP, 0, "{epochs:?}");
    }
}

#[test]
fn keepalives_and_handshakes_are_no_data() {
    for (bytes, elapsed_ms) in [
        (0, 1_000),
        (KEEPALIVE_BYTES, 1_000),
        (2 * KEEPALIVE_BYTES, 2_500),
        (INITIATION_BYTES, 1_000),
        (INITIATION_BYTES + KEEPALIVE_BYTES, 1_000),
        (RESPONSE_BYTES + KEEPALIVE_BYTES, 1_000),
    ] {
        assert!(!is_data(bytes, elapsed_ms), "{bytes}");
    }
    // An empty TCP segment, alone and with a keepalive; many at once; one behind a handshake.
    for bytes in [80, 112, 64, 1_452, 32 * 40, INITIATION_BYTES + 80] {
        assert!(is_data(bytes, 1_000), "{bytes}");
    }
}

/// What there is of a node whose change of keys ends, as the kernel, the state folder and the records have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Machine {
    /// Which device the kernel sends to: 0 the old one, 1 the new one.
    sends_to: usize,
    devices: [bool; 2],
    /// Key files: the present one is of which device; whether the next one is there.
    stored: usize,
    has_next: bool,
}

impl Machine {
    fn do_step(&mut self, step: EndStep) {
        match step {
            EndStep::Redirect => self.sends_to = 1,
            EndStep::Promote => (self.stored, self.has_next) = (1, false),
            EndStep::Remove => self.devices[0] = false,
        }
        assert!(self.devices[self.sends_to], "packets to nowhere: {self:?}");
        assert!(self.devices[self.stored], "a key without device: {self:?}");
    }

    fn next_step(&self) -> Option<EndStep> {
        end_step(Remains {
            is_sent_to: self.sends_to == 0,
            is_stored_as_next: self.has_next,
            has_device: self.devices[0],
        })
    }
}

#[test]
fn the_end_of_a_change_is_gone_on_with_after_a_crash_between_any_two_steps() {
    let begun = Machine {
        sends_to: 0,
        devices: [true; 2],
        stored: 0,
        has_next: true,
    };
    let ended = Machine {
        sends_to: 1,
        devices: [false, true],
        stored: 1,
        has_next: false,
    };
    let mut machine = begun;
    let mut steps = Vec::new();
    while let Some(step) = machine.next_step() {
        steps.push(step);
        machine.do_step(step);
    }
    assert_eq!(machine, ended);
    assert_eq!(
        steps,
        [EndStep::Redirect, EndStep::Promote, EndStep::Remove]
    );
    for crash_after in 0..=steps.len() {
        let mut machine = begun;
        steps[..crash_after]
            .iter()
            .for_each(|step| machine.do_step(*step));
        // Another run knows only what there is. With two keys it goes on with the change and comes to its end again.
        while let Some(step) = machine.next_step() {
            machine.do_step(step);
        }
        assert_eq!(machine, ended, "crash after {crash_after} steps");
    }
    // Every other state that a run of before may have left is repaired, too: its device is sent to, its key is not there.
    let mut left = Machine {
        sends_to: 0,
        ..ended
    };
    left.devices[0] = true;
    while let Some(step) = left.next_step() {
        left.do_step(step);
    }
    assert_eq!(left, ended);
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
    for current in [EPOCH_ANY - 2, EPOCH_ANY - EPOCHS_PER_STEP + 1] {
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

#[test]
fn a_node_of_another_cluster_that_goes_on_with_its_old_key_is_waited_for_a_day() {
    let sending = PeerKeys {
        silent_ms: 0,
        ..foreign(4)
    };
    let come_over = PeerKeys {
        has_answered: true,
        ..sending
    };
    let changing = |since_ms| OwnKeys {
        next: Some(5),
        since_ms,
        ..own(4, DAY_MS)
    };
    for peer in [sending, come_over] {
        let early = changing(FOREIGN_WAIT_MS_MAX - 1);
        assert_eq!(decide(early, &[peer], DAY_MS, false), Decision::Wait);
        let over = Decision::Finish { left_behind: 1 };
        let late = changing(FOREIGN_WAIT_MS_MAX);
        assert_eq!(decide(late, &[peer], DAY_MS, false), over);
        // Our own nodes are only cut off.
        let own_node = PeerKeys {
            is_own: true,
            ..peer
        };
        let decision = decide(late, &[peer, own_node], DAY_MS, false);
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
                    let keys = OwnKeys { current: node.current, age_ms: FOREIGN_KEY_MS_MIN, next: node.next, since_ms: node.since_ms, is_settled: true };
                    let peers: Vec<PeerKeys> = (0..4).filter(|other| *other != actor).map(|other| PeerKeys {
                        is_own: other % 2 == actor % 2,
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
