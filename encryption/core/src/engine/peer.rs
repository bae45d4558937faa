//! One peer of an [`Engine`](super::Engine): its handshake under way, its sessions and its timers.

use std::time::Duration;

use super::sessions::Sessions;
use super::{
    Activity, HANDSHAKE_ATTEMPTS_MAX, INDEX_COUNTER_BITS, KEEPALIVE_TIMEOUT, Now, Output,
    REKEY_TIMEOUT, Slot,
};
use crate::key::{PresharedKey, PublicKey};
use crate::mac::Stamper;
use crate::noise::{Initiator, TIMESTAMP_BYTES};
use crate::session::{
    REJECT_AFTER_TIME, REKEY_AFTER_MESSAGES, REKEY_AFTER_TIME, Role, Session, SessionKeys,
};

#[derive(Debug)]
pub(super) struct Peer {
    pub(super) key: PublicKey,
    pub(super) preshared_key: Option<PresharedKey>,
    pub(super) keepalive: Option<Duration>,
    pub(super) stamper: Stamper,
    index_counter: u32,
    pub(super) initiation: Option<Initiation>,
    /// One is due, and could not be sent yet.
    pub(super) is_initiation_wanted: bool,
    pub(super) last_initiation_sent: Option<Duration>,
    pub(super) last_response_index: Option<u32>,
    pub(super) newest_timestamp: [u8; TIMESTAMP_BYTES],
    pub(super) last_initiation_taken: Option<Duration>,
    pub(super) sessions: Sessions,
    pub(super) last_handshake: Option<Duration>,
    pub(super) handshakes: u64,
    unanswered: Silence,
    unacknowledged: Silence,
}

/// Since when something waits for an answer.
#[derive(Clone, Copy, Debug, Default)]
struct Silence {
    since: Option<Duration>,
    /// The last event that something was done about.
    handled: Duration,
}

impl Silence {
    /// Begins with an event that is newer than its answer, ends with an answer newer than its beginning.
    fn note(&mut self, event: Duration, answer: Duration) {
        if self.since.is_some_and(|since| answer >= since) {
            self.since = None;
        }
        if self.since.is_none() && event > answer && event > self.handled {
            self.since = Some(event);
        }
    }

    fn lasts(&self, time: Duration, limit: Duration) -> bool {
        self.since.is_some_and(|since| time >= since + limit)
    }

    fn handle(&mut self, event: Duration) {
        self.since = None;
        self.handled = event;
    }
}

/// A handshake that we began.
#[derive(Debug)]
pub(super) struct Initiation {
    pub(super) noise: Initiator,
    pub(super) attempts: u32,
    pub(super) retry_at: Duration,
}

/// What a look at the timers came to.
pub(super) enum Due {
    Nothing,
    Initiation { attempts: u32 },
    Keepalive,
}

impl Peer {
    /// A peer that has not been heard of.
    pub(super) fn new(key: PublicKey, index_counter: u32) -> Self {
        Self {
            key,
            preshared_key: None,
            keepalive: None,
            stamper: Stamper::new(&key),
            index_counter,
            initiation: None,
            is_initiation_wanted: false,
            last_initiation_sent: None,
            last_response_index: None,
            newest_timestamp: [0; TIMESTAMP_BYTES],
            last_initiation_taken: None,
            sessions: Sessions::default(),
            last_handshake: None,
            handshakes: 0,
            unanswered: Silence::default(),
            unacknowledged: Silence::default(),
        }
    }

    pub(super) fn next_index(&mut self, slot: Slot, mask: u32) -> u32 {
        self.index_counter = self.index_counter.wrapping_add(1);
        let counter = self.index_counter & ((1 << INDEX_COUNTER_BITS) - 1);
        (slot << INDEX_COUNTER_BITS | counter) ^ mask
    }

    pub(super) fn install(&mut self, keys: &SessionKeys, now: Now) {
        if let Some(session) = Session::new(keys, now.monotonic) {
            self.sessions.install(session);
        }
    }

    /// Looks at every timer of the peer.
    pub(super) fn due(
        &mut self,
        slot: Slot,
        now: Now,
        activity: Activity,
        out: &mut Vec<Output>,
    ) -> Due {
        let time = now.monotonic;
        if self.sessions.promote() {
            self.note_handshake(now);
            out.push(Output::Flush {
                slot,
                confirm: false,
            });
        }
        if self.sessions.drop_older_than(REJECT_AFTER_TIME, time) {
            let sessions = self.sessions.clone();
            out.push(Output::Sessions { slot, sessions });
        }
        if let Some(initiation) = &self.initiation {
            if time < initiation.retry_at {
                return Due::Nothing;
            }
            let attempts = initiation.attempts;
            self.initiation = None;
            if attempts < HANDSHAKE_ATTEMPTS_MAX {
                return Due::Initiation { attempts };
            }
            out.push(Output::GiveUp { slot });
            return Due::Nothing;
        }
        if self.is_initiation_wanted {
            return Due::Initiation { attempts: 0 };
        }
        self.unanswered
            .note(activity.data_sent, activity.any_received);
        self.unacknowledged
            .note(activity.data_received, activity.any_sent);
        if self.is_rekey_due(time, activity) {
            return Due::Initiation { attempts: 0 };
        }
        if self
            .unanswered
            .lasts(time, KEEPALIVE_TIMEOUT + REKEY_TIMEOUT)
        {
            self.unanswered.handle(activity.data_sent);
            return Due::Initiation { attempts: 0 };
        }
        let is_unacknowledged = self.unacknowledged.lasts(time, KEEPALIVE_TIMEOUT);
        let last = activity.any_sent.max(activity.any_received);
        let is_quiet = self
            .keepalive
            .is_some_and(|interval| last.is_zero() || time >= last + interval);
        if !is_unacknowledged && !is_quiet {
            return Due::Nothing;
        }
        self.unacknowledged.handle(activity.data_received);
        if self.sessions.current.is_some() {
            Due::Keepalive
        } else if is_quiet {
            Due::Initiation { attempts: 0 }
        } else {
            Due::Nothing
        }
    }

    /// Both have the keys.
    pub(super) fn note_handshake(&mut self, now: Now) {
        self.last_handshake = Some(now.wall);
        self.handshakes += 1;
    }

    fn is_rekey_due(&self, time: Duration, activity: Activity) -> bool {
        let Some(session) = &self.sessions.current else {
            return false;
        };
        let age = time.saturating_sub(session.established());
        let last_minute = REJECT_AFTER_TIME - KEEPALIVE_TIMEOUT - REKEY_TIMEOUT;
        let is_old = session.role() == Role::Initiator
            && ((age >= REKEY_AFTER_TIME
                && activity.data_sent >= session.established() + REKEY_AFTER_TIME)
                || (age >= last_minute
                    && activity.data_received >= session.established() + last_minute));
        is_old || session.sealed() >= REKEY_AFTER_MESSAGES
    }
}
