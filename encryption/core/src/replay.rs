//! Which message counters of a session were seen: the sliding bitmap of RFC 6479.

const WORD_BITS: u64 = 64;
/// Words of the bitmap; a power of two.
const WORDS: usize = 128;
/// Messages that may come late by so many are still taken; as in Linux.
pub const WINDOW_MESSAGES: u64 = WORD_BITS * (WORDS as u64 - 1);

/// Why a counter is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// The message was taken before.
    #[error("a message with this counter was received before")]
    Seen,
    /// Too far behind the newest to tell.
    #[error("the counter is more than {WINDOW_MESSAGES} behind the newest")]
    TooOld,
}

/// The window of one session.
#[derive(Clone, Debug)]
pub struct ReplayWindow {
    /// One more than the greatest counter that was taken.
    next: u64,
    bitmap: [u64; WORDS],
}

impl Default for ReplayWindow {
    fn default() -> Self {
        Self {
            next: 0,
            bitmap: [0; WORDS],
        }
    }
}

impl ReplayWindow {
    /// Whether a message with this counter would be taken; to be asked before decryption.
    ///
    /// # Errors
    /// When it would not.
    #[inline]
    pub fn check(&self, counter: u64) -> Result<(), ReplayError> {
        if counter >= self.next {
            return Ok(());
        }
        if counter + WINDOW_MESSAGES < self.next {
            return Err(ReplayError::TooOld);
        }
        let (word, bit) = place(counter);
        if self.bitmap[word] & bit == 0 {
            Ok(())
        } else {
            Err(ReplayError::Seen)
        }
    }

    /// Takes an authenticated message.
    ///
    /// # Errors
    /// When its counter is not to be taken.
    #[inline]
    pub fn accept(&mut self, counter: u64) -> Result<(), ReplayError> {
        self.check(counter)?;
        if counter >= self.next {
            let newest = self.next.saturating_sub(1) / WORD_BITS;
            let steps = (counter / WORD_BITS - newest).min(WORDS as u64);
            for step in 1..=steps {
                let (word, _) = place((newest + step) * WORD_BITS);
                self.bitmap[word] = 0;
            }
            // Counters end far below the greatest number (REJECT_AFTER_MESSAGES).
            self.next = counter.saturating_add(1);
        }
        let (word, bit) = place(counter);
        self.bitmap[word] |= bit;
        Ok(())
    }
}

#[inline]
const fn place(counter: u64) -> (usize, u64) {
    let word = (counter / WORD_BITS) as usize % WORDS;
    (word, 1 << (counter % WORD_BITS))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_too_old_or_was_seen_is_refused() {
        let mut window = ReplayWindow::default();
        assert_eq!(window.accept(0), Ok(()));
        assert_eq!(window.accept(0), Err(ReplayError::Seen));
        assert_eq!(window.accept(WINDOW_MESSAGES + 10), Ok(()));
        assert_eq!(window.accept(10), Err(ReplayError::TooOld));
        assert_eq!(window.accept(11), Ok(()));
        assert_eq!(window.accept(11), Err(ReplayError::Seen));
        assert_eq!(window.accept(u64::MAX - (1 << 13) - 1), Ok(()));
    }

    proptest! {
        // Against a plain set of what was taken.
        #[test]
        fn the_window_says_what_a_set_would_say(
            steps in proptest::collection::vec((-9_000i64..9_000, 1u64..40), 1..200),
        ) {
            let mut window = ReplayWindow::default();
            let (mut taken, mut next) = (BTreeSet::new(), 0u64);
            for (jump, run) in steps {
                let from = next.saturating_add_signed(jump);
                for counter in from..from + run {
                    let expected = if counter + WINDOW_MESSAGES < next {
                        Err(ReplayError::TooOld)
                    } else if taken.insert(counter) {
                        next = next.max(counter + 1);
                        Ok(())
                    } else {
                        Err(ReplayError::Seen)
                    };
                    prop_assert_eq!(window.accept(counter), expected);
                }
            }
        }
    }
}
