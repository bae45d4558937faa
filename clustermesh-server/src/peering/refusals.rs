//! Refused records in the log: what a peer does wrong is named, and cannot fill a disk.

use std::time::Duration;

use tokio::time::Instant;

/// Records of one peer that are named within an interval; the metric counts them all.
const MAX_NAMED: u32 = 20;
/// From the first record that is named on.
const NAMING_INTERVAL: Duration = Duration::from_secs(60);

/// Which refused records of a peer are named.
#[derive(Debug, Default)]
pub(super) struct RefusalLog {
    begun: Option<Instant>,
    named: u32,
    /// Left out since the last one that was named.
    unnamed: u64,
}

/// A record that is named.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Named {
    /// Records before it that were not.
    pub(super) unnamed: u64,
    /// No other is for a while.
    pub(super) is_last: bool,
}

impl RefusalLog {
    /// Whether one more is named.
    pub(super) fn admit(&mut self, now: Instant) -> Option<Named> {
        if self
            .begun
            .is_none_or(|begun| now.duration_since(begun) >= NAMING_INTERVAL)
        {
            self.begun = Some(now);
            self.named = 0;
        }
        if self.named >= MAX_NAMED {
            self.unnamed += 1;
            return None;
        }
        self.named += 1;
        Some(Named {
            unnamed: std::mem::take(&mut self.unnamed),
            is_last: self.named == MAX_NAMED,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn some_are_named_each_minute_and_the_others_counted() {
        let (mut log, start) = (RefusalLog::default(), Instant::now());
        let mut admit = |seconds| log.admit(start + Duration::from_secs(seconds));
        let named = |unnamed, is_last| Some(Named { unnamed, is_last });
        for number in 1..=MAX_NAMED {
            assert_eq!(admit(0), named(0, number == MAX_NAMED));
        }
        assert_eq!(admit(0), None);
        assert_eq!(admit(59), None);
        assert_eq!(admit(60), named(2, false));
        assert_eq!(admit(60), named(0, false));
    }
}
