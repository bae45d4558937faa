//! The store against etcd: the same load on a group of each in turn, both behind mutual TLS, both durable.
//!
//! The load generator shares the machine with the servers. Every round starts a fresh group of each contender, the one
//! after the other, in alternating order.

mod lease;
mod load;
mod million;
mod usage;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::compare::{Figure, Named, Series, Target, against};
use crate::judges::group::{Group, Kind, Settings};
use crate::judges::programs::Programs;
use load::Load;

/// Bytes of every value.
const VALUE_BYTES: usize = 500;
/// Keys that reads and puts are about.
const KEYS: u32 = 10_000;
/// Clients that share one connection.
const CLIENTS_PER_CONNECTION: usize = 8;
/// The percentile of the latency rows.
const PERCENTILE: f64 = 0.99;

/// How the rows are measured.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rounds.
    pub rounds: usize,
    /// Replicas of each group.
    pub replicas: u8,
    /// Time of one measurement.
    pub time: Duration,
    /// Keys of the rows with many keys.
    pub many_keys: u32,
    /// Where data folders are made: on the disk that is to be measured.
    pub folder: PathBuf,
    /// Rows that are wanted; none = all.
    pub only: Vec<String>,
}

/// One row and its goal.
#[derive(Clone, Copy, Debug)]
struct Row {
    id: &'static str,
    what: &'static str,
    unit: &'static str,
    target: Target,
    /// Measured in one go with the others of its part.
    part: Part,
}

/// What is measured with one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Put(usize),
    Get { serializable: bool },
    Watch,
    Lease,
    Million,
}

impl Part {
    const ALL: [Self; 8] = [
        Self::Put(1),
        Self::Put(64),
        Self::Put(256),
        Self::Get {
            serializable: false,
        },
        Self::Get { serializable: true },
        Self::Watch,
        Self::Lease,
        Self::Million,
    ];
}

const fn row(
    id: &'static str,
    what: &'static str,
    unit: &'static str,
    target: Target,
    part: Part,
) -> Row {
    Row {
        id,
        what,
        unit,
        target,
        part,
    }
}

const LINEARIZABLE: Part = Part::Get {
    serializable: false,
};
const SERIALIZABLE: Part = Part::Get { serializable: true };

const ROWS: [Row; 16] = [
    row(
        "put-1",
        "puts, 1 client",
        "puts/s",
        Target::RatioAtLeast(1.0),
        Part::Put(1),
    ),
    row(
        "put-1-p99",
        "latency of put-1, p99",
        "ms",
        Target::Report,
        Part::Put(1),
    ),
    row(
        "put-64",
        "puts, 64 clients",
        "puts/s",
        Target::RatioAtLeast(1.8),
        Part::Put(64),
    ),
    row(
        "put-64-p99",
        "latency of put-64, p99",
        "ms",
        Target::RatioAtMost(0.5),
        Part::Put(64),
    ),
    row(
        "put-256",
        "puts, 256 clients",
        "puts/s",
        Target::RatioAtLeast(2.0),
        Part::Put(256),
    ),
    row(
        "put-256-p99",
        "latency of put-256, p99",
        "ms",
        Target::RatioAtMost(0.5),
        Part::Put(256),
    ),
    row(
        "get-lin",
        "linearizable reads, 64 clients",
        "reads/s",
        Target::RatioAtLeast(1.3),
        LINEARIZABLE,
    ),
    row(
        "get-lin-p99",
        "latency of get-lin, p99",
        "ms",
        Target::Report,
        LINEARIZABLE,
    ),
    row(
        "get-ser",
        "serializable reads, 64 clients",
        "reads/s",
        Target::RatioAtLeast(1.5),
        SERIALIZABLE,
    ),
    row(
        "get-ser-p99",
        "latency of get-ser, p99",
        "ms",
        Target::Report,
        SERIALIZABLE,
    ),
    row(
        "watch-1000",
        "events delivered to 1,000 watchers of one prefix",
        "events/s",
        Target::RatioAtLeast(2.0),
        Part::Watch,
    ),
    row(
        "watch-1000-p99",
        "from put to delivery, p99",
        "ms",
        Target::RatioAtMost(0.5),
        Part::Watch,
    ),
    row(
        "watch-cpu",
        "server CPU per million delivered events",
        "s",
        Target::RatioAtMost(0.4),
        Part::Watch,
    ),
    row(
        "lease-100k",
        "put with a lease of 100,000 keys; peer: etcd the same",
        "ms",
        Target::Report,
        Part::Lease,
    ),
    row(
        "mem-1m",
        "resident memory per replica with many keys of 500 B",
        "MiB",
        Target::RatioAtMost(0.7),
        Part::Million,
    ),
    row(
        "restart-1m",
        "from kill -9 of all to serving, with many keys",
        "s",
        Target::RatioAtMost(0.5),
        Part::Million,
    ),
];

/// The row that compares ours with ours.
const LEASE_ROW: Row = row(
    "lease-100k-own",
    "put with a lease of 100,000 keys; peer: ours, a lease of one key",
    "ms",
    Target::RatioAtMost(1.1),
    Part::Lease,
);

/// Values by row of one contender, one a round.
type Measured = BTreeMap<&'static str, Series>;

/// Measures the wanted rows.
///
/// # Errors
/// When a group cannot be run or does not answer; a missed target is no error.
pub async fn run_all(
    options: &Options,
    programs: &Programs,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let wanted = |row: &Row| options.only.is_empty() || options.only.iter().any(|id| id == row.id);
    for id in &options.only {
        anyhow::ensure!(
            ROWS.iter().chain([&LEASE_ROW]).any(|row| row.id == id),
            "no row is named {id}"
        );
    }
    let mut ours = Measured::new();
    let mut etcd = Measured::new();
    for round in 0..options.rounds {
        for part in Part::ALL {
            if !ROWS
                .iter()
                .chain([&LEASE_ROW])
                .any(|row| row.part == part && wanted(row))
            {
                continue;
            }
            let mut kinds = [Kind::Etcd, Kind::Ours];
            kinds.rotate_left(round % 2);
            for kind in kinds {
                let values = measure(kind, part, options, programs)
                    .await
                    .with_context(|| format!("{part:?} of {}", kind.name()))?;
                progress(&format!(
                    "round {}, {}: {}",
                    round + 1,
                    kind.name(),
                    shown(&values)
                ));
                let series = match kind {
                    Kind::Etcd => &mut etcd,
                    Kind::Ours => &mut ours,
                };
                for (id, value) in values {
                    series.entry(id).or_default().push(value);
                }
            }
        }
    }
    Ok(figures(&ours, &etcd, wanted))
}

fn figures(ours: &Measured, etcd: &Measured, wanted: impl Fn(&Row) -> bool) -> Vec<Figure> {
    let of = |measured: &Measured, id: &str| measured.get(id).cloned().unwrap_or_default();
    let named = |row: &Row| Named {
        id: row.id,
        row: row.what,
        unit: row.unit,
    };
    let mut figures: Vec<Figure> = ROWS
        .iter()
        .filter(|row| wanted(row) && ours.contains_key(row.id))
        .map(|row| {
            let (mine, theirs) = (of(ours, row.id), of(etcd, row.id));
            against(named(row), &mine, "etcd 3.7.3", &theirs, row.target)
        })
        .collect();
    if wanted(&LEASE_ROW) && ours.contains_key("lease-100k") {
        figures.push(against(
            named(&LEASE_ROW),
            &of(ours, "lease-100k"),
            "a lease of one key",
            &of(ours, "lease-one"),
            LEASE_ROW.target,
        ));
    }
    figures
}

fn shown(values: &[(&'static str, f64)]) -> String {
    values
        .iter()
        .map(|(id, value)| format!("{id} {value:.2}"))
        .collect::<Vec<_>>()
        .join(", ")
}

/// Starts a group, measures one part, takes it down.
async fn measure(
    kind: Kind,
    part: Part,
    options: &Options,
    programs: &Programs,
) -> Result<Vec<(&'static str, f64)>> {
    let folder = options.folder.join(kind.name());
    remove(&folder)?;
    let settings = Settings {
        replicas: options.replicas,
        durable: true,
    };
    let mut group = Group::start(kind, settings, programs, &folder).await?;
    let values = match part {
        Part::Put(clients) => {
            let load = load::puts(&group, clients, options.time).await?;
            let (rate, latency) = match clients {
                1 => ("put-1", "put-1-p99"),
                64 => ("put-64", "put-64-p99"),
                _ => ("put-256", "put-256-p99"),
            };
            rows_of(rate, latency, &load)
        }
        Part::Get { serializable } => {
            let load = load::gets(&group, serializable, options.time).await?;
            if serializable {
                rows_of("get-ser", "get-ser-p99", &load)
            } else {
                rows_of("get-lin", "get-lin-p99", &load)
            }
        }
        Part::Watch => watch::measure(&group, options.time).await?,
        Part::Lease => lease::measure(&group).await?,
        Part::Million => million::measure(&mut group, options.many_keys).await?,
    };
    for member in 0..group.members().len() {
        group.stop(member, Signal::SIGTERM).await?;
    }
    remove(&folder)?;
    Ok(values)
}

fn rows_of(rate: &'static str, latency: &'static str, load: &Load) -> Vec<(&'static str, f64)> {
    vec![
        (rate, load.per_second()),
        (latency, load.percentile_ms(PERCENTILE)),
    ]
}

fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| folder.display().to_string())
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_an_id_of_its_own_and_a_part_that_is_run() {
        let ids: std::collections::BTreeSet<_> =
            ROWS.iter().chain([&LEASE_ROW]).map(|row| row.id).collect();
        assert_eq!(ids.len(), ROWS.len() + 1);
        for row in &ROWS {
            assert!(Part::ALL.contains(&row.part), "{}", row.id);
        }
    }
}
