//! The store against etcd: the same load on a group of each in turn, both behind mutual TLS, both durable.
//!
//! The load generator shares the machine with the servers. Every round starts a fresh group of each contender, the one
//! after the other, in an order that changes from round to round.

mod gap;
mod lease;
pub(in crate::bench) mod load;
mod loaded;
mod million;
mod rows;
mod stall;
pub(in crate::bench) mod usage;
mod watch;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::compare::{Figure, Named, Series, against, median};
use crate::judges::group::{Group, Kind, Settings};
use crate::judges::programs::{ETCD_VERSION, Programs};
use load::Load;
use rows::{Part, Peer, ROWS, Row};

/// Bytes of every value.
const VALUE_BYTES: usize = 500;
/// Keys that reads and puts are about.
const KEYS: u32 = 10_000;
/// Clients that share one connection.
const CLIENTS_PER_CONNECTION: usize = 8;
/// The percentile of the latency rows.
const PERCENTILE: f64 = 0.99;
/// `-cpu` rows of calls are about so many.
const CALLS: f64 = 1_000.0;

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
    /// Without those that ours are compared with.
    pub ours_alone: bool,
}

impl Options {
    fn wants(&self, row: &Row) -> bool {
        self.only.is_empty() || self.only.iter().any(|id| id == row.id)
    }

    fn wants_part(&self, part: Part) -> bool {
        self.replicas >= part.replicas()
            && ROWS.iter().any(|row| row.part == part && self.wants(row))
    }
}

/// Whose group is measured.
#[derive(Clone, Debug)]
struct Contender {
    kind: Kind,
    name: String,
    programs: Programs,
}

/// Ours first.
fn contenders(programs: &Programs, ours_alone: bool) -> Result<Vec<Contender>> {
    let mut contenders = vec![Contender {
        kind: Kind::Ours,
        name: Kind::Ours.name().to_owned(),
        programs: programs.clone(),
    }];
    if ours_alone {
        return Ok(contenders);
    }
    contenders.push(Contender {
        kind: Kind::Etcd,
        name: format!("etcd {ETCD_VERSION}"),
        programs: programs.clone(),
    });
    contenders.extend(programs.debian()?.map(|(version, programs)| Contender {
        kind: Kind::Etcd,
        name: format!("etcd {version}"),
        programs,
    }));
    Ok(contenders)
}

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
    for id in &options.only {
        anyhow::ensure!(ROWS.iter().any(|row| row.id == id), "no row is named {id}");
    }
    let contenders = contenders(programs, options.ours_alone)?;
    let mut measured = vec![Measured::new(); contenders.len()];
    for round in 0..options.rounds {
        for part in Part::ALL
            .into_iter()
            .filter(|part| options.wants_part(*part))
        {
            for turn in 0..contenders.len() {
                let place = (turn + round) % contenders.len();
                let contender = &contenders[place];
                if contender.kind != Kind::Ours && part.is_ours_alone() {
                    continue;
                }
                let values = measure(contender, part, options)
                    .await
                    .with_context(|| format!("{part:?} of {}", contender.name))?;
                let (round, name) = (round + 1, &contender.name);
                progress(&format!("round {round}, {name}: {}", shown(&values)));
                for (id, value) in values {
                    measured[place].entry(id).or_default().push(value);
                }
            }
        }
    }
    let names: Vec<&str> = contenders.iter().map(|one| one.name.as_str()).collect();
    Ok(figures(&names, &measured, |row| options.wants(row)))
}

fn figures(names: &[&str], measured: &[Measured], wanted: impl Fn(&Row) -> bool) -> Vec<Figure> {
    let Some((ours, peers)) = measured.split_first() else {
        return Vec::new();
    };
    let rows = ROWS.iter().filter(|row| wanted(row));
    rows.filter_map(|row| {
        let mine = ours.get(row.id)?;
        let named = Named {
            id: row.id,
            row: row.what,
            unit: row.unit,
        };
        let (name, series) = match row.peer {
            Peer::Own { id, what } => (what, ours.get(id).cloned().unwrap_or_default()),
            Peer::More | Peer::Less => best(&names[1..], peers, row),
        };
        Some(against(named, mine, name, &series, row.target))
    })
    .collect()
}

/// The peer that is best in this row.
fn best<'a>(names: &[&'a str], peers: &[Measured], row: &Row) -> (&'a str, Series) {
    let all = names.iter().zip(peers);
    let mut found: Vec<(&str, Series)> = all
        .filter_map(|(name, values)| Some((*name, values.get(row.id)?.clone())))
        .collect();
    found.sort_by(|(_, a), (_, b)| median(a).total_cmp(&median(b)));
    let best = match row.peer {
        Peer::Less => found.into_iter().next(),
        Peer::More | Peer::Own { .. } => found.pop(),
    };
    best.unwrap_or_default()
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
    contender: &Contender,
    part: Part,
    options: &Options,
) -> Result<Vec<(&'static str, f64)>> {
    let folder = options.folder.join(contender.name.replace(' ', "-"));
    remove(&folder)?;
    let settings = Settings {
        replicas: options.replicas,
        durable: true,
        snapshot_log_bytes: None,
    };
    let programs = &contender.programs;
    let mut group = Group::start(contender.kind, settings, programs, &folder).await?;
    let values = measure_part(&mut group, part, options, programs).await?;
    for member in 0..group.members().len() {
        group.stop(member, Signal::SIGTERM).await?;
    }
    remove(&folder)?;
    Ok(values)
}

async fn measure_part(
    group: &mut Group,
    part: Part,
    options: &Options,
    programs: &Programs,
) -> Result<Vec<(&'static str, f64)>> {
    let time = options.time;
    match part {
        Part::Put(clients) => {
            let before = usage::cpu_seconds(group)?;
            let load = load::puts(group, clients, time).await?;
            let cpu = usage::cpu_seconds(group)? - before;
            let (rate, latency) = match clients {
                1 => ("put-1", "put-1-p99"),
                64 => ("put-64", "put-64-p99"),
                _ => ("put-256", "put-256-p99"),
            };
            let mut rows = rows_of(rate, latency, &load);
            if clients == 64 {
                rows.push(("put-64-cpu", cpu_per_thousand(cpu, &load)));
            }
            Ok(rows)
        }
        Part::Get { serializable } => {
            load::fill(group, KEYS).await?;
            let before = usage::cpu_seconds(group)?;
            let load = load::gets(group, serializable, time).await?;
            let cpu = usage::cpu_seconds(group)? - before;
            if serializable {
                return Ok(rows_of("get-ser", "get-ser-p99", &load));
            }
            let mut rows = rows_of("get-lin", "get-lin-p99", &load);
            rows.push(("get-lin-cpu", cpu_per_thousand(cpu, &load)));
            Ok(rows)
        }
        Part::Watch => watch::measure(group, time).await,
        Part::Stall => stall::measure(group, &programs.etcdctl(), time).await,
        Part::Lease => lease::measure(group).await,
        Part::Gaps => gap::measure(group).await,
        Part::Million => million::measure(group, options.many_keys).await,
        Part::Loaded => loaded::measure(group, options.many_keys, time).await,
    }
}

/// Of the servers; what the load's warm-up cost is counted by its calls.
fn cpu_per_thousand(cpu: f64, load: &Load) -> f64 {
    cpu / load.calls_with_warm_up() * CALLS
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

    fn of(id: &'static str, values: &[f64]) -> Measured {
        Measured::from([(id, values.to_vec())])
    }

    fn only(id: &'static str) -> impl Fn(&Row) -> bool {
        move |row| row.id == id
    }

    #[test]
    fn ours_is_compared_with_the_best_of_the_others() {
        let names = ["ours", "a", "b"];
        let rates = [
            of("put-1", &[3.0]),
            of("put-1", &[1.0]),
            of("put-1", &[2.0]),
        ];
        let figure = figures(&names, &rates, only("put-1")).remove(0);
        assert_eq!((figure.peer, figure.peer_name.as_str()), (Some(2.0), "b"));
        let p99 = "put-64-p99";
        let times = [of(p99, &[3.0]), of(p99, &[1.0]), of(p99, &[2.0])];
        let figure = figures(&names, &times, only(p99)).remove(0);
        assert_eq!((figure.peer, figure.peer_name.as_str()), (Some(1.0), "a"));
    }

    #[test]
    fn rows_of_ours_alone_need_no_others() {
        let ours = Measured::from([("watch-stall", vec![2.0]), ("watch-stall-none", vec![2.0])]);
        let figure = figures(&["ours"], &[ours], only("watch-stall")).remove(0);
        assert!(figure.met, "{figure:?}");
    }
}
