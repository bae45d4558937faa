//! The sessions of one peer: the one before, the current, the next.

use std::sync::Arc;
use std::time::Duration;

use crate::session::{Role, Session};

/// The sessions of a peer.
#[derive(Clone, Debug, Default)]
pub struct Sessions {
    /// The one before.
    pub previous: Option<Arc<Session>>,
    /// The one that seals.
    pub current: Option<Arc<Session>>,
    /// One whose keys the peer has not used yet.
    pub next: Option<Arc<Session>>,
}

impl Sessions {
    /// Makes the next session the current one, if the peer has used it.
    pub fn promote(&mut self) -> bool {
        if !self.next.as_ref().is_some_and(|next| next.is_confirmed()) {
            return false;
        }
        self.previous = self.current.take();
        self.current = self.next.take();
        true
    }

    /// The session of this index.
    #[must_use]
    pub fn find(&self, local_index: u32) -> Option<&Arc<Session>> {
        [&self.current, &self.next, &self.previous]
            .into_iter()
            .flatten()
            .find(|session| session.local_index() == local_index)
    }

    /// Takes in the session of a finished handshake, in the order of Linux (drivers/net/wireguard/noise.c,
    /// `add_new_keypair`).
    pub(super) fn install(&mut self, session: Session) {
        let session = Arc::new(session);
        if session.role() == Role::Initiator {
            // An unconfirmed session of the peer's own handshake may still come to use.
            self.previous = self.next.take().or(self.current.take());
            self.current = Some(session);
        } else {
            self.next = Some(session);
            self.previous = None;
        }
    }

    /// Drops sessions of that age; true if there were any.
    pub(super) fn drop_older_than(&mut self, age: Duration, now: Duration) -> bool {
        let mut is_changed = false;
        for place in [&mut self.previous, &mut self.current, &mut self.next] {
            if place
                .as_ref()
                .is_some_and(|session| now.saturating_sub(session.established()) >= age)
            {
                *place = None;
                is_changed = true;
            }
        }
        is_changed
    }
}
