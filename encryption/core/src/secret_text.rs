//! Text with keys in it, as the control socket has it: no copy stays in memory, neither when it grows nor when it ends.

use std::fmt;

use zeroize::Zeroizing;

/// Bytes that there is room for at first.
const FIRST_BYTES: usize = 4_096;

/// A text that holds secrets; zeroised when dropped and never shown.
#[derive(Default)]
pub struct SecretText(Zeroizing<Vec<u8>>);

impl SecretText {
    /// Appends. What it held before is moved by hand: a buffer that grows by itself leaves its old place as it was.
    pub fn push(&mut self, bytes: &[u8]) {
        let needed = self.0.len() + bytes.len();
        if needed > self.0.capacity() {
            let room = needed.next_power_of_two().max(FIRST_BYTES);
            let mut larger = Zeroizing::new(Vec::with_capacity(room));
            larger.extend_from_slice(&self.0);
            self.0 = larger;
        }
        self.0.extend_from_slice(bytes);
    }

    /// Its bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its text; empty where it is none.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// Takes the first bytes away.
    pub fn drop_front(&mut self, count: usize) {
        let rest = self.0.len().saturating_sub(count);
        let from = self.0.len() - rest;
        self.0.copy_within(from.., 0);
        if let Some(over) = self.0.get_mut(rest..) {
            over.fill(0);
        }
        self.0.truncate(rest);
    }
}

impl fmt::Write for SecretText {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text.as_bytes());
        Ok(())
    }
}

impl fmt::Debug for SecretText {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SecretText({} bytes)", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use super::*;

    #[test]
    fn it_grows_by_hand_and_is_not_shown() {
        let mut text = SecretText::default();
        let line = "private_key=secret\n";
        let mut room = 0;
        for count in 1..=1_000 {
            text.write_str(line).unwrap();
            assert_eq!(text.as_bytes().len(), count * line.len());
            assert!(text.0.capacity() >= room, "it never shrinks");
            room = text.0.capacity();
        }
        assert!(room.is_power_of_two());
        assert_eq!(text.as_str(), line.repeat(1_000));
        assert!(!format!("{text:?}").contains("secret"));
        text.drop_front(999 * line.len());
        assert_eq!(text.as_str(), line);
        text.drop_front(usize::MAX);
        assert_eq!(text.as_str(), "");
    }
}
