//! When a peer is asked for its revision, and when its silence is an error.

use std::time::Duration;

use tokio::time::Instant;

use super::error::LinkError;

/// While things change, the peer is asked for its revision this often.
const PROGRESS_INTERVAL_BUSY: Duration = Duration::from_millis(250);
/// While nothing changes, this often.
const PROGRESS_INTERVAL_IDLE: Duration = Duration::from_secs(1);
/// A peer that answers no progress request for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(10);

/// When to ask for progress, and when to give up.
pub(super) struct Timing {
    last_ask: Instant,
    last_heard: Instant,
    busy_until: Instant,
}

impl Timing {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            last_ask: now,
            last_heard: now,
            busy_until: now + PROGRESS_INTERVAL_IDLE,
        }
    }

    pub(super) fn next_ask(&self) -> Instant {
        let busy = self.last_ask + PROGRESS_INTERVAL_BUSY;
        if busy < self.busy_until {
            busy
        } else {
            self.last_ask + PROGRESS_INTERVAL_IDLE
        }
    }

    pub(super) fn asked(&mut self, now: Instant) {
        self.last_ask = now;
    }

    pub(super) fn heard(&mut self, now: Instant) {
        self.last_heard = now;
    }

    pub(super) fn changed(&mut self, now: Instant) {
        self.busy_until = now + PROGRESS_INTERVAL_IDLE;
    }

    pub(super) fn check_silence(&self, now: Instant) -> Result<(), LinkError> {
        if now.duration_since(self.last_heard) > SILENCE_MAX {
            return Err(LinkError::Protocol(format!(
                "the peer has been silent for {} s",
                SILENCE_MAX.as_secs()
            )));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_busy_peer_is_asked_more_often_and_a_silent_one_given_up() {
        let start = Instant::now();
        let mut timing = Timing::new(start);
        timing.changed(start);
        assert_eq!(timing.next_ask(), start + PROGRESS_INTERVAL_BUSY);
        let later = start + PROGRESS_INTERVAL_IDLE * 2;
        timing.asked(later);
        assert_eq!(timing.next_ask(), later + PROGRESS_INTERVAL_IDLE);
        timing.heard(later);
        let end = later + SILENCE_MAX;
        assert!(timing.check_silence(end).is_ok());
        assert!(
            timing
                .check_silence(end + Duration::from_millis(1))
                .is_err()
        );
    }
}
