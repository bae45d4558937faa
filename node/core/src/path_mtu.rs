//! What the path to one other node takes, found by probes of given size (after RFC 8899): a size that comes back is
//! proven, one that does not while a small probe does vanishes on the way, whatever the devices say.
//!
//! The size of the devices is believed until a probe contradicts it. Then the path is taken for what every link must
//! carry, at once, and more is found out from there. While nothing comes back at all nothing is concluded.

/// Every link carries this, bytes (RFC 8200, 5): what is taken for sure when a larger size vanishes.
pub const BASE_BYTES: u16 = 1_280;
/// Tried where not even that passes, bytes (RFC 791: every host takes it).
pub const LEAST_BYTES: u16 = 576;
/// Size of a probe that shows whether there is anybody, bytes.
pub const SMALL_BYTES: u16 = 128;
/// A size is found this exactly, bytes.
pub const STEP_BYTES: u16 = 8;
/// A size has vanished when so many probes of it in a row did.
pub const ATTEMPTS_MAX: u8 = 3;
/// An answer is waited for so long, milliseconds.
pub const ANSWER_WAIT_MS: u64 = 1_000;
/// Whether a path takes more again is looked for after so many times the time between confirmations, and that doubles
/// while it is in vain.
pub const RAISE_AFTER_CONFIRMATIONS: u64 = 2;
/// Longest such time, in times between confirmations.
pub const RAISE_AFTER_CONFIRMATIONS_MAX: u64 = 40;

/// What is being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// Whether the path takes that size.
    Size { bytes: u16, turn: Turn },
    /// Whether anybody answers at all, after that size did not come back.
    Anybody { after_bytes: u16, turn: Turn },
}

/// An outage may end between the last probe of a size and the small one after it: what would narrow a path that was
/// wide is asked for twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Silence and an answer to a small probe are asked for once more.
    First,
    /// They are believed.
    Last,
}

/// The state of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathMtu {
    /// What the devices take.
    most_bytes: u16,
    /// Largest size that has come back since the last loss of it; 0 = none.
    proven_bytes: u16,
    /// Smallest size that has vanished; `None` = none that counts.
    vanished_bytes: Option<u16>,
    /// What packets may have.
    usable_bytes: u16,
    /// Asked at present.
    question: Option<Question>,
    /// Probes sent for it without an answer.
    attempts: u8,
    /// When something is to be done next.
    due_ms: u64,
    raise_at_ms: u64,
    raise_after_ms: u64,
    confirm_every_ms: u64,
    has_answered: bool,
}

impl PathMtu {
    /// A path of which nothing is known but that its devices take `most_bytes`. What was proven is asked for again every
    /// `confirm_every_ms`; the first probe is due at `first_ms`.
    #[must_use]
    pub const fn new(most_bytes: u16, confirm_every_ms: u64, first_ms: u64) -> Self {
        Self {
            most_bytes,
            proven_bytes: 0,
            vanished_bytes: None,
            usable_bytes: most_bytes,
            question: None,
            attempts: 0,
            due_ms: first_ms,
            raise_at_ms: 0,
            raise_after_ms: confirm_every_ms * RAISE_AFTER_CONFIRMATIONS,
            confirm_every_ms,
            has_answered: false,
        }
    }

    /// The same path with what an earlier run has found: it is sent no more until more is proven.
    #[must_use]
    pub fn with_usable(mut self, usable_bytes: u16) -> Self {
        if usable_bytes < self.most_bytes {
            self.usable_bytes = usable_bytes;
            self.vanished_bytes = Some(self.most_bytes);
            self.raise_at_ms = self.due_ms.saturating_add(self.raise_after_ms);
        }
        self
    }

    /// Largest packet that may be sent to the node, bytes.
    #[must_use]
    pub const fn usable_bytes(&self) -> u16 {
        self.usable_bytes
    }

    /// What the devices take, bytes.
    #[must_use]
    pub const fn most_bytes(&self) -> u16 {
        self.most_bytes
    }

    /// True while sizes that the devices take vanish on the way.
    #[must_use]
    pub const fn is_black_hole(&self) -> bool {
        self.usable_bytes < self.most_bytes
    }

    /// True if the other node answered the last question.
    #[must_use]
    pub const fn has_answered(&self) -> bool {
        self.has_answered
    }

    /// When [`PathMtu::poll`] is to be called next, milliseconds.
    #[must_use]
    pub const fn due_ms(&self) -> u64 {
        self.due_ms
    }

    /// The devices take another size now. What was found of the path below it stays true.
    pub fn set_most(&mut self, most_bytes: u16, now_ms: u64) {
        if most_bytes == self.most_bytes {
            return;
        }
        let was_black_hole = self.is_black_hole();
        self.most_bytes = most_bytes;
        self.proven_bytes = self.proven_bytes.min(most_bytes);
        self.vanished_bytes = self.vanished_bytes.filter(|size| *size <= most_bytes);
        self.usable_bytes = if was_black_hole {
            self.usable_bytes.min(most_bytes)
        } else {
            most_bytes
        };
        self.question = None;
        self.attempts = 0;
        self.due_ms = now_ms;
    }

    /// To be called when it is due: the size of the probe to send now, if any.
    pub fn poll(&mut self, now_ms: u64) -> Option<u16> {
        if now_ms < self.due_ms {
            return None;
        }
        if self.question.is_some() && self.attempts >= ATTEMPTS_MAX {
            self.conclude_loss(now_ms);
            if now_ms < self.due_ms {
                return None;
            }
        }
        if self.question.is_none() {
            self.ask(now_ms);
        }
        let size = self.asked_bytes()?;
        self.attempts += 1;
        self.due_ms = now_ms.saturating_add(ANSWER_WAIT_MS);
        Some(size)
    }

    /// A probe of that size has come back.
    pub fn answered(&mut self, size_bytes: u16, now_ms: u64) {
        if self.asked_bytes() != Some(size_bytes) {
            return;
        }
        self.has_answered = true;
        self.attempts = 0;
        match self.question.take() {
            Some(Question::Size { bytes: size, .. }) => {
                self.proven_bytes = self.proven_bytes.max(size);
                if size > self.usable_bytes {
                    self.usable_bytes = size;
                    self.raise_after_ms = self.first_raise_ms();
                }
                if self.vanished_bytes.is_some_and(|vanished| vanished <= size) {
                    self.vanished_bytes = None;
                }
            }
            Some(Question::Anybody { after_bytes, turn }) => match turn {
                Turn::First => {
                    self.question = Some(Question::Size {
                        bytes: after_bytes,
                        turn: Turn::Last,
                    });
                    self.due_ms = now_ms;
                    return;
                }
                Turn::Last => self.note_vanished(after_bytes, now_ms),
            },
            None => {}
        }
        self.due_ms = if self.next_size().is_some() {
            now_ms
        } else {
            now_ms.saturating_add(self.confirm_every_ms)
        };
    }

    const fn first_raise_ms(&self) -> u64 {
        self.confirm_every_ms * RAISE_AFTER_CONFIRMATIONS
    }

    /// The size that the answer must have.
    const fn asked_bytes(&self) -> Option<u16> {
        match self.question {
            Some(Question::Size { bytes, .. }) => Some(bytes),
            Some(Question::Anybody { .. }) => Some(SMALL_BYTES),
            None => None,
        }
    }

    fn ask(&mut self, now_ms: u64) {
        if self.is_black_hole() && self.next_size().is_none() && now_ms >= self.raise_at_ms {
            // The path may be as it was again.
            self.vanished_bytes = None;
            let longest_ms = self.confirm_every_ms * RAISE_AFTER_CONFIRMATIONS_MAX;
            self.raise_after_ms = (self.raise_after_ms * 2).min(longest_ms);
            self.raise_at_ms = now_ms.saturating_add(self.raise_after_ms);
        }
        let size = self.next_size().unwrap_or(self.proven_bytes);
        self.attempts = 0;
        self.question = Some(if size == 0 {
            Question::Anybody {
                after_bytes: LEAST_BYTES,
                turn: Turn::Last,
            }
        } else {
            // While a narrow path is measured nothing is lost by a size that is found too small.
            let narrows = !self.is_black_hole() || size <= self.proven_bytes;
            Question::Size {
                bytes: size,
                turn: if narrows { Turn::First } else { Turn::Last },
            }
        });
    }

    /// What is to be found out next; `None` if all is known.
    fn next_size(&self) -> Option<u16> {
        let Some(vanished) = self.vanished_bytes else {
            return (self.proven_bytes < self.most_bytes).then_some(self.most_bytes);
        };
        if self.proven_bytes == 0 {
            let untried = [BASE_BYTES, LEAST_BYTES];
            return untried.into_iter().find(|size| *size < vanished);
        }
        let room = vanished.saturating_sub(self.proven_bytes);
        (room > STEP_BYTES).then(|| self.proven_bytes + room / 2)
    }

    /// No probe of the question came back.
    fn conclude_loss(&mut self, now_ms: u64) {
        self.attempts = 0;
        match self.question {
            Some(Question::Size { bytes, turn }) => {
                self.question = Some(Question::Anybody {
                    after_bytes: bytes,
                    turn,
                });
            }
            // The node or the whole path is away: that says nothing of sizes.
            Some(Question::Anybody { .. }) | None => {
                self.question = None;
                self.has_answered = false;
                self.due_ms = now_ms.saturating_add(self.confirm_every_ms);
            }
        }
    }

    /// That size does not pass, though a small one does.
    fn note_vanished(&mut self, size: u16, now_ms: u64) {
        let did_once = size <= self.proven_bytes;
        if did_once || !self.is_black_hole() {
            self.raise_after_ms = self.first_raise_ms();
            self.raise_at_ms = now_ms.saturating_add(self.raise_after_ms);
        }
        if did_once {
            // Nothing is sure any more.
            self.proven_bytes = 0;
        }
        self.vanished_bytes = Some(self.vanished_bytes.map_or(size, |held| held.min(size)));
        let sure = match self.proven_bytes {
            0 if size > BASE_BYTES => BASE_BYTES,
            0 => LEAST_BYTES,
            proven => proven,
        };
        self.usable_bytes = self.usable_bytes.min(sure).min(self.most_bytes);
    }
}

#[cfg(test)]
mod tests;
