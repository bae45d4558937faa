use std::collections::VecDeque;

use std::sync::Arc;

use super::*;
use crate::session::{REJECT_AFTER_MESSAGES, REKEY_AFTER_MESSAGES};

/// Two devices and what lies between them, on a clock of their own.
struct World {
    now: Now,
    engines: [Engine; 2],
    activity: [Activity; 2],
    sessions: [Sessions; 2],
    wire: VecDeque<(usize, Vec<u8>)>,
    is_cut: bool,
    initiations: usize,
    keepalives: [usize; 2],
    given_up: bool,
    random: u64,
}

const START: Duration = Duration::from_secs(1_000);

impl World {
    fn new() -> Self {
        let keys = [1, 2].map(|byte| PrivateKey::from_bytes([byte; 32]));
        let mut state = 1_u64;
        let engines = [0, 1].map(|side: usize| {
            let mut random = |room: &mut [u8]| fill(&mut state, room);
            let mut engine = Engine::new(&mut random);
            engine.set_private_key(Some(keys[side].clone()), &mut Vec::new());
            assert_eq!(engine.add_peer(keys[1 - side].public(), &mut random), 0);
            engine
        });
        let now = Now {
            monotonic: START,
            wall: Duration::from_secs(1_700_000_000),
        };
        Self {
            now,
            engines,
            activity: [Activity::default(); 2],
            sessions: [Sessions::default(), Sessions::default()],
            wire: VecDeque::new(),
            is_cut: false,
            initiations: 0,
            keepalives: [0; 2],
            given_up: false,
            random: state,
        }
    }

    fn carry_out(&mut self, side: usize, out: Vec<Output>) {
        for output in out {
            match output {
                Output::Send { datagram, .. } => {
                    self.activity[side].any_sent = self.now.monotonic;
                    self.initiations += usize::from(datagram.len() == INITIATION_BYTES);
                    self.wire.push_back((1 - side, datagram));
                }
                Output::Sessions { sessions, .. } => self.sessions[side] = sessions,
                Output::Flush { confirm, .. } => {
                    if confirm {
                        self.seal(side, &[]);
                    }
                }
                Output::Keepalive { .. } => {
                    self.keepalives[side] += 1;
                    self.seal(side, &[]);
                }
                Output::GiveUp { .. } => self.given_up = true,
                Output::Heard { .. } => {}
            }
        }
    }

    /// Sends a packet under the current session, as the data path does.
    fn seal(&mut self, side: usize, packet: &[u8]) {
        let Some(session) = self.sessions[side].current.clone() else {
            return self.call(side, |engine, now, random, out| {
                engine.wanted(0, now, random, out)
            });
        };
        let mut datagram = vec![0; 16];
        datagram.extend_from_slice(packet);
        datagram.extend_from_slice(&[0; 16]);
        let counter = session.reserve(1).unwrap();
        session.seal(counter, &mut datagram).unwrap();
        self.activity[side].any_sent = self.now.monotonic;
        if !packet.is_empty() {
            self.activity[side].data_sent = self.now.monotonic;
        }
        self.wire.push_back((1 - side, datagram));
    }

    fn call(
        &mut self,
        side: usize,
        call: impl FnOnce(&mut Engine, Now, Random<'_>, &mut Vec<Output>),
    ) {
        let mut out = Vec::new();
        let state = &mut self.random;
        let mut random = |room: &mut [u8]| fill(state, room);
        call(&mut self.engines[side], self.now, &mut random, &mut out);
        self.carry_out(side, out);
    }

    fn deliver(&mut self) {
        while let Some((side, datagram)) = self.wire.pop_front() {
            if !self.is_cut {
                self.receive(side, &datagram);
            }
        }
    }

    fn receive(&mut self, side: usize, datagram: &[u8]) {
        let from = SocketAddr::from(([192, 0, 2, 1], 51_871));
        use crate::message::{Message, parse};
        match parse(datagram).unwrap() {
            Message::Initiation(message) => self.call(side, |engine, now, random, out| {
                let _ = engine.take_initiation(message, from, now, random, out);
            }),
            Message::Response(message) => {
                self.activity[side].any_received = self.now.monotonic;
                self.call(side, |engine, now, _, out| {
                    engine.take_response(message, from, now, out).unwrap();
                });
            }
            Message::CookieReply(_) => unreachable!(),
            Message::Transport { receiver, counter } => {
                let session = Arc::clone(self.sessions[side].find(receiver).unwrap());
                let length = session
                    .opener()
                    .open(counter, &mut datagram.to_vec())
                    .unwrap();
                if session.confirm() {
                    self.sessions[side].promote();
                }
                self.activity[side].any_received = self.now.monotonic;
                if length > 0 {
                    self.activity[side].data_received = self.now.monotonic;
                }
            }
        }
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now.monotonic + time;
        while self.now.monotonic < end {
            self.now.monotonic += TICK;
            self.now.wall += TICK;
            for side in [0, 1] {
                let activity = self.activity[side];
                self.call(side, |engine, now, random, out| {
                    engine.tick(now, |_| activity, random, out);
                });
            }
            self.deliver();
        }
    }

    fn current(&self, side: usize) -> u32 {
        self.sessions[side].current.as_ref().unwrap().local_index()
    }
}

fn fill(state: &mut u64, room: &mut [u8]) {
    for byte in room {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *byte = state.to_be_bytes()[0];
    }
}

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A world in which both sides have a current session.
fn connected() -> World {
    let mut world = World::new();
    world.seal(0, b"first");
    world.deliver();
    world.seal(0, b"again");
    world.deliver();
    world.seal(1, b"back");
    world.deliver();
    world
}

#[test]
fn the_first_packet_begins_a_handshake_and_the_first_message_confirms_it() {
    let world = connected();
    assert_eq!(world.initiations, 1);
    assert!(
        world
            .sessions
            .iter()
            .all(|sessions| sessions.current.is_some())
    );
    assert_eq!(world.engines[0].last_handshake(0), Some(world.now.wall));
}

#[test]
fn the_initiator_rekeys_after_two_minutes_of_use_and_nothing_is_lost() {
    let mut world = connected();
    let before = world.current(0);
    for _ in 0..125 {
        world.pass(secs(1));
        world.seal(0, b"data");
        world.deliver();
        world.seal(1, b"data");
        world.deliver();
    }
    assert_eq!(world.initiations, 2);
    assert_ne!(world.current(0), before);
    assert_eq!(world.keepalives, [0, 0]);
}

#[test]
fn a_receiver_that_began_it_rekeys_at_the_last_minute() {
    let mut world = connected();
    for _ in 0..164 {
        world.pass(secs(1));
        world.seal(1, b"data");
        world.deliver();
    }
    assert_eq!(world.initiations, 1);
    world.pass(secs(2));
    world.seal(1, b"data");
    world.deliver();
    world.pass(secs(1));
    assert_eq!(world.initiations, 2);
}

#[test]
fn a_session_without_use_ends_and_is_made_anew_on_demand() {
    let mut world = connected();
    world.pass(secs(200));
    assert!(
        world
            .sessions
            .iter()
            .all(|sessions| sessions.current.is_none())
    );
    assert_eq!(world.initiations, 1);
    world.seal(1, b"data");
    world.deliver();
    assert_eq!(world.initiations, 2);
}

#[test]
fn many_messages_rekey_too() {
    let mut world = connected();
    let session = world.sessions[0].current.clone().unwrap();
    session.reserve(REKEY_AFTER_MESSAGES).unwrap();
    world.pass(secs(6));
    assert_eq!(world.initiations, 2);
    assert!(session.sealed() < REJECT_AFTER_MESSAGES);
}

#[test]
fn data_without_an_answer_is_answered_by_a_keepalive_after_ten_seconds() {
    let mut world = connected();
    world.pass(secs(20));
    let before = world.keepalives;
    world.seal(0, b"one way");
    world.deliver();
    world.pass(secs(9));
    assert_eq!(world.keepalives, before);
    world.pass(secs(2));
    assert_eq!(world.keepalives, [before[0], before[1] + 1]);
    world.pass(secs(30));
    assert_eq!(world.keepalives, [before[0], before[1] + 1]);
    assert_eq!(world.initiations, 1);
}

#[test]
fn a_silent_peer_gets_a_new_handshake_after_fifteen_seconds_and_is_given_up_after_ninety() {
    let mut world = connected();
    world.pass(secs(20));
    world.is_cut = true;
    world.seal(0, b"lost");
    world.pass(secs(14));
    assert_eq!(world.initiations, 1);
    world.pass(secs(2));
    assert_eq!(world.initiations, 2);
    world.pass(secs(100));
    assert!(world.given_up);
    assert_eq!(world.initiations, 1 + 18);
    world.pass(secs(60));
    assert_eq!(world.initiations, 1 + 18);
}

#[test]
fn an_unanswered_initiation_is_sent_again_until_the_peer_is_back() {
    let mut world = World::new();
    world.is_cut = true;
    world.seal(0, b"data");
    world.pass(secs(12));
    assert_eq!(world.initiations, 3);
    world.is_cut = false;
    world.pass(secs(6));
    assert!(world.sessions[0].current.is_some());
}

#[test]
fn persistent_keepalives_go_by_their_interval_and_connect_at_once() {
    let mut world = World::new();
    world.engines[0].set_peer(0, None, Some(secs(25)));
    world.pass(secs(1));
    assert_eq!(world.initiations, 1);
    world.pass(secs(100));
    assert_eq!(world.keepalives[0], 4);
}

#[test]
fn both_beginning_at_once_end_with_sessions_that_fit() {
    let mut world = World::new();
    world.seal(0, b"a");
    world.seal(1, b"b");
    world.deliver();
    world.pass(secs(12));
    for side in [0, 1] {
        world.seal(side, b"data");
    }
    world.deliver();
    assert!(world.initiations <= 4);
}

#[test]
fn a_replayed_or_hurried_initiation_is_refused() {
    let mut world = World::new();
    world.seal(0, b"data");
    let (_, first) = world.wire.pop_front().unwrap();
    let message: &[u8; INITIATION_BYTES] = first[..].try_into().unwrap();
    let from = SocketAddr::from(([192, 0, 2, 1], 1));
    let mut state = 7;
    let mut random = |room: &mut [u8]| fill(&mut state, room);
    let (now, mut out) = (world.now, Vec::new());
    let engine = &mut world.engines[1];
    assert!(
        engine
            .take_initiation(message, from, now, &mut random, &mut out)
            .is_ok()
    );
    let key = PrivateKey::from_bytes([1; 32]).public();
    let again = engine.take_initiation(message, from, now, &mut random, &mut out);
    assert_eq!(again, Err(HandshakeError::NotNewer(key)));
    let mut stranger = Engine::new(&mut random);
    stranger.set_private_key(Some(PrivateKey::from_bytes([2; 32])), &mut out);
    let refused = stranger.take_initiation(message, from, now, &mut random, &mut out);
    assert_eq!(refused, Err(HandshakeError::UnknownPeer(key)));
}

#[test]
fn a_wall_clock_that_goes_back_keeps_handshakes_going() {
    let mut world = connected();
    world.now.wall -= secs(3_600);
    world.pass(secs(200));
    world.seal(0, b"data");
    world.deliver();
    assert!(world.sessions[0].current.is_some());
}

#[test]
fn another_private_key_ends_all_sessions() {
    let mut world = connected();
    world.call(0, |engine, _, _, out| {
        engine.set_private_key(Some(PrivateKey::from_bytes([9; 32])), out);
    });
    assert!(world.sessions[0].current.is_none());
    assert_eq!(
        world.engines[0].remove_peer(&PrivateKey::from_bytes([2; 32]).public()),
        Some(0)
    );
    assert_eq!(
        world.engines[0].slot(&PrivateKey::from_bytes([2; 32]).public()),
        None
    );
}

#[test]
fn what_waits_right_after_the_sessions_ended_gets_a_handshake_as_soon_as_one_may_be_sent() {
    let mut world = connected();
    for side in [0, 1] {
        world.call(side, |engine, _, _, out| {
            engine.set_private_key(None, out);
            let key = PrivateKey::from_bytes([u8::try_from(side + 1).unwrap(); 32]);
            engine.set_private_key(Some(key), out);
        });
    }
    world.seal(0, b"data");
    assert_eq!(world.initiations, 1);
    world.pass(secs(6));
    assert_eq!(world.initiations, 2);
    assert!(world.sessions[0].current.is_some());
}
