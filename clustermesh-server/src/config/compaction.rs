//! `[compaction]`: which history the leader drops by itself.

use std::time::Duration;

use clustermesh_raft::AutoCompaction;
use serde::Deserialize;

use super::fault;

/// How often the number of kept revisions is looked at.
const REVISIONS_INTERVAL: Duration = Duration::from_secs(5);
/// Shortest and longest time that history can be kept, in seconds.
const RETENTION_SECONDS: std::ops::RangeInclusive<u64> = 1..=366 * 24 * 3600;
/// What is kept when nothing is said.
const DEFAULT_RETENTION: &str = "1h";

/// `[compaction]`.
#[derive(Debug, Clone, PartialEq, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct CompactionConfig {
    /// By what history is dropped.
    pub mode: CompactionMode,
    /// `periodic`: how long history is kept, as in "1h" or "30m"; default one hour. `revision`: how many revisions are.
    pub retention: Option<Retention>,
}

/// By what history is dropped (etcd's `--auto-compaction-mode`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum CompactionMode {
    /// What is older than the retention.
    #[default]
    Periodic,
    /// All but the newest revisions.
    Revision,
    /// Nothing.
    Off,
}

/// A time with its unit, or a number of revisions.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum Retention {
    /// Revisions.
    Revisions(u64),
    /// As in "1h", "30m" or "90s".
    Time(String),
}

impl CompactionConfig {
    /// What the replica is told.
    ///
    /// # Errors
    /// The key at fault, and why, when mode and retention do not fit.
    pub fn policy(&self) -> Result<AutoCompaction, (String, String)> {
        let retention = |reason: &str| fault("compaction.retention", reason);
        match (self.mode, &self.retention) {
            (CompactionMode::Off, None) => Ok(AutoCompaction::Off),
            (CompactionMode::Off, Some(_)) => {
                Err(retention("mode \"off\" keeps everything; remove retention"))
            }
            (CompactionMode::Periodic, None) => time(DEFAULT_RETENTION),
            (CompactionMode::Periodic, Some(Retention::Time(text))) => time(text),
            (CompactionMode::Periodic, Some(Retention::Revisions(_))) => Err(retention(
                "mode \"periodic\" needs a time with its unit, as in \"1h\" or \"30m\"",
            )),
            (CompactionMode::Revision, Some(Retention::Revisions(keep @ 1..))) => {
                Ok(AutoCompaction::Revisions {
                    keep: *keep,
                    every: REVISIONS_INTERVAL,
                })
            }
            (CompactionMode::Revision, _) => Err(retention(
                "mode \"revision\" needs the number of revisions to keep, as in 10000",
            )),
        }
    }
}

fn time(text: &str) -> Result<AutoCompaction, (String, String)> {
    let malformed = || {
        fault(
            "compaction.retention",
            format!(
                "{text:?} is not a time of {} s to {} days, as in \"1h\", \"30m\" or \"90s\"",
                RETENTION_SECONDS.start(),
                RETENTION_SECONDS.end() / (24 * 3600)
            ),
        )
    };
    let number = text.trim_end_matches(|last: char| last.is_ascii_alphabetic());
    let unit_seconds = match text.get(number.len()..) {
        Some("s") => 1,
        Some("m") => 60,
        Some("h") => 3600,
        _ => return Err(malformed()),
    };
    let seconds = number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(unit_seconds))
        .filter(|seconds| RETENTION_SECONDS.contains(seconds))
        .ok_or_else(malformed)?;
    Ok(AutoCompaction::Age {
        keep: Duration::from_secs(seconds),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(text: &str) -> Result<AutoCompaction, String> {
        let config: CompactionConfig = toml::from_str(text).map_err(|error| error.to_string())?;
        config
            .policy()
            .map_err(|(key, reason)| format!("{key}: {reason}"))
    }

    #[test]
    fn history_is_kept_by_time_by_number_or_for_ever() {
        let age = |seconds| {
            Ok(AutoCompaction::Age {
                keep: Duration::from_secs(seconds),
            })
        };
        assert_eq!(policy(""), age(3600));
        assert_eq!(
            policy("mode = \"periodic\"\nretention = \"30m\""),
            age(1800)
        );
        assert_eq!(policy("retention = \"90s\""), age(90));
        assert_eq!(policy("mode = \"off\""), Ok(AutoCompaction::Off));
        assert_eq!(
            policy("mode = \"revision\"\nretention = 1000"),
            Ok(AutoCompaction::Revisions {
                keep: 1000,
                every: REVISIONS_INTERVAL
            })
        );
    }

    #[test]
    fn what_does_not_fit_together_is_named() {
        for (text, told) in [
            ("retention = 10", "unit"),
            ("retention = \"10\"", "30m"),
            ("retention = \"0s\"", "1 s"),
            ("retention = \"99999999999999999999h\"", "366 days"),
            ("mode = \"revision\"", "number of revisions"),
            (
                "mode = \"revision\"\nretention = \"1h\"",
                "number of revisions",
            ),
            ("mode = \"off\"\nretention = \"1h\"", "remove retention"),
            ("mode = \"never\"", "never"),
        ] {
            let error = policy(text).unwrap_err();
            assert!(error.contains(told), "{text}: {error}");
        }
    }
}
