//! The traffic that the lab sends and counts: servers, probes, long-lived streams, forged packets.
//!
//! Long-running tools say `READY=1` on the notification socket when they serve or flow, and on
//! SIGTERM print one line of JSON with what they counted.

pub mod forge;
pub mod forward;
pub mod probe;
pub mod serve;
pub mod spin;
pub mod stream;
pub mod udp;

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The signal that ends a tool and makes it report.
///
/// # Errors
/// When the handler cannot be installed.
pub fn end_signal() -> Result<Signal> {
    Ok(signal(SignalKind::terminate())?)
}

/// Attempts, outcomes and the longest time without a success.
#[derive(Debug, Default, Serialize)]
pub struct Counts {
    /// Attempts that were begun and ended.
    pub attempts: u64,
    /// Those that succeeded.
    pub ok: u64,
    /// Those that failed.
    pub failed: u64,
    /// Failures by cause.
    pub errors: BTreeMap<String, u64>,
    /// Successes by the name that answered.
    pub by_name: BTreeMap<String, u64>,
    /// Longest time between two successes.
    pub gap_ms_max: f64,
    /// Time from the start to the first success.
    pub first_ok_ms: Option<f64>,
    /// Median of the successes.
    pub p50_us: f64,
    /// 99th percentile of the successes.
    pub p99_us: f64,
    #[serde(skip)]
    last_ok: Option<Duration>,
    #[serde(skip)]
    took_us: Vec<f64>,
}

impl Counts {
    /// Notes a success at `now` (since the start) that took `took` and was answered by `name`.
    pub fn success(&mut self, now: Duration, took: Duration, name: &str) {
        self.attempts += 1;
        self.ok += 1;
        *self.by_name.entry(name.to_owned()).or_default() += 1;
        if self.first_ok_ms.is_none() {
            self.first_ok_ms = Some(now.as_secs_f64() * 1e3);
        }
        self.end_gap(now);
        self.last_ok = Some(now);
        self.took_us.push(took.as_secs_f64() * 1e6);
    }

    /// Notes a failure.
    pub fn failure(&mut self, cause: &str) {
        self.attempts += 1;
        self.failed += 1;
        *self.errors.entry(cause.to_owned()).or_default() += 1;
    }

    /// Closes the books at `now`: a gap that is still open counts.
    pub fn close(&mut self, now: Duration) {
        self.end_gap(now);
        self.took_us.sort_by(f64::total_cmp);
        self.p50_us = percentile(&self.took_us, 50);
        self.p99_us = percentile(&self.took_us, 99);
    }

    fn end_gap(&mut self, now: Duration) {
        let gap = now.saturating_sub(self.last_ok.unwrap_or_default());
        self.gap_ms_max = self.gap_ms_max.max(gap.as_secs_f64() * 1e3);
    }
}

/// The value below which `percent` of the sorted values lie; 0 of none.
#[must_use]
pub fn percentile(sorted: &[f64], percent: usize) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    let index = (sorted.len() * percent).div_ceil(100).max(1) - 1;
    sorted[index.min(sorted.len() - 1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_counts_also_when_it_is_still_open_at_the_end() {
        let mut counts = Counts::default();
        counts.success(Duration::from_millis(10), Duration::from_micros(5), "a");
        counts.failure("refused");
        counts.success(Duration::from_millis(110), Duration::from_micros(7), "b");
        assert!((counts.gap_ms_max - 100.0).abs() < 1e-6);
        counts.close(Duration::from_millis(400));
        assert!((counts.gap_ms_max - 290.0).abs() < 1e-6);
        assert_eq!((counts.attempts, counts.ok, counts.failed), (3, 2, 1));
    }

    #[test]
    fn percentiles_of_small_samples_are_members_of_them() {
        assert!((percentile(&[1.0, 2.0, 3.0], 50) - 2.0).abs() < 1e-9);
        assert!((percentile(&[1.0, 2.0, 3.0], 99) - 3.0).abs() < 1e-9);
        assert!(percentile(&[], 50).abs() < 1e-9);
    }
}
