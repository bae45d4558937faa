//! A pod's address from its node's claim in one cluster to the kernels of the other, and what an agent weighs.
//!
//! This process plays the agent of one node of the first cluster: it opens that node's session and
//! claims addresses. It also reads the pinned maps of the second cluster's nodes, so that both ends
//! are timed by one clock and no agent is asked what it did.

mod load;
mod session;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clustermesh_ebpf::Maps;
use clustermesh_ebpf_abi::RESERVED_IDENTITY_MAX;
use clustermesh_node_core::tables::host_key;
use nix::unistd::Pid;

use super::compare::{Figure, Named, Series, Target, alone};
use super::cpu;
use crate::lab::{Lab, LabConfig};
use session::Session;

/// Rows of this suite.
pub const IDS: [&str; 4] = [
    "propagate",
    "propagate-stored",
    "propagate-burst",
    "agent-rss",
];

/// One way.
const WAN_DELAY: Duration = Duration::from_millis(40);
/// Addresses of one round that are claimed one after the other.
const SAMPLES: usize = 100;
/// Addresses that are claimed at once.
const BURST: usize = 1_000;
/// Longest that an address may take.
const SEEN_MAX: Duration = Duration::from_secs(20);
/// Addresses that are missing in a row before a look ends: those behind them are later still, or are seen a look late.
const LATE_IN_A_ROW: u32 = 4;
/// Pause between two looks: a reader that spins would take a CPU from what it measures.
const LOOK_PAUSE: Duration = Duration::from_micros(100);
/// Longest wait until the load is in the kernels.
const LOADED_SECONDS_MAX: u32 = 60;
/// Share of the addresses that must be there.
const PERCENTILE: usize = 99;
/// Goal of the first two rows, ms.
const PROPAGATE_MS_MAX: f64 = 90.0;
/// Goal of the last row, MiB.
const AGENT_RSS_MIB_MAX: f64 = 30.0;

/// Measures the rows.
///
/// # Errors
/// When the lab does not start or an address does not arrive.
pub async fn run_all(rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    let mut lab = Lab::build(LabConfig::two_by_two()?).await?;
    let result = measure(&mut lab, rounds, progress).await;
    let failures = lab.remove().await;
    let figures = result?;
    ensure!(failures.is_empty(), "clean-up: {}", failures.join("; "));
    Ok(figures)
}

async fn measure(lab: &mut Lab, rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    progress("propagate: starting two clusters of two nodes");
    // From the first packet on, or TCP would take the way to be a short one.
    lab.wan().set_delay(WAN_DELAY);
    lab.start().await?;
    let session = Session::take_over(lab.cluster_mut(0)).await?;
    progress("propagate: writing 10,000 endpoints");
    load::workloads(lab.cluster(0), BURST).await?;
    let loaded = load::endpoints(lab.cluster(0)).await?;
    lab.cluster(1).wait_converged(LOADED_SECONDS_MAX).await?;
    let reader = Reader::open(lab)?;
    let absent = reader.missing(&loaded)?;
    ensure!(
        absent == 0,
        "{absent} of the loaded addresses are in no map"
    );
    let claims = Claims {
        session,
        reader,
        processes: processes(lab)?,
    };
    let [mut single, mut stored, mut burst, mut rss] = [(); 4].map(|()| Series::new());
    for round in 1..=rounds {
        progress(&format!("propagate: round {round} of {rounds}, one by one"));
        let (seen, acknowledged) = claims.one_by_one().await?;
        progress(&format!("propagate: seen after {}", spread_ms(&seen)));
        progress(&format!(
            "propagate: stored after {}",
            spread_ms(&acknowledged)
        ));
        single.push(percentile_ms(&seen, PERCENTILE));
        stored.push(percentile_ms(&acknowledged, PERCENTILE));
        progress(&format!("propagate: round {round} of {rounds}, a burst"));
        let (seen, cpu) = claims.burst().await?;
        progress(&format!("propagate: seen after {}", spread_ms(&seen)));
        progress(&format!("propagate: CPU time until then: {cpu}"));
        burst.push(percentile_ms(&seen, PERCENTILE));
        rss.push(agent_rss_mib(lab)?);
    }
    claims.session.end().await?;
    Ok(vec![
        alone(
            Named {
                id: "propagate",
                row: "pod address claimed to ipcache of every remote node, p99 of 100, one by one",
                unit: "ms",
            },
            &single,
            Target::AtMost(PROPAGATE_MS_MAX),
        ),
        alone(
            Named {
                id: "propagate-stored",
                row: "of that, pod address claimed to acknowledged by its own cluster, p99 of 100",
                unit: "ms",
            },
            &stored,
            Target::Report,
        ),
        alone(
            Named {
                id: "propagate-burst",
                row: "the same, p99 of 1,000 that are claimed at once",
                unit: "ms",
            },
            &burst,
            Target::AtMost(PROPAGATE_MS_MAX),
        ),
        alone(
            Named {
                id: "agent-rss",
                row: "resident memory of an agent that knows 10,000 remote endpoints",
                unit: "MiB",
            },
            &rss,
            Target::AtMost(AGENT_RSS_MIB_MAX),
        ),
    ])
}

/// The writing and the reading end.
struct Claims {
    session: Session,
    reader: Reader,
    /// Whose CPU time is told, by name.
    processes: Vec<(String, Pid)>,
}

/// Servers and agents of the lab.
fn processes(lab: &Lab) -> Result<Vec<(String, Pid)>> {
    let mut processes = Vec::new();
    for index in 0..2 {
        let cluster = lab.cluster(index);
        processes.push((
            format!("server {}", cluster.name()),
            cluster.server()?.pid(),
        ));
        for node in cluster.nodes() {
            // The agent that this process stands in for does not run.
            if let Ok(agent) = node.agent() {
                processes.push((
                    format!("agent {}/{}", cluster.name(), node.name()),
                    agent.pid(),
                ));
            }
        }
    }
    Ok(processes)
}

impl Claims {
    /// Claims one address after the other and takes them back; how long each took to be seen, and to be stored.
    async fn one_by_one(&self) -> Result<(Vec<Duration>, Vec<Duration>)> {
        let mut seen = Vec::with_capacity(SAMPLES);
        let mut stored = Vec::with_capacity(SAMPLES);
        for number in 0..SAMPLES {
            let address = self.session.address(number);
            let begun = Instant::now();
            let request = self.session.claim(number).await?;
            seen.extend(self.reader.watch(&[address], true, begun).await?);
            let at = self.session.stored(request).await?;
            stored.push(at.duration_since(begun));
        }
        self.take_back(SAMPLES).await?;
        seen.sort_unstable();
        stored.sort_unstable();
        Ok((seen, stored))
    }

    /// Claims many addresses at once and takes them back. All are timed from the first claim on; also what each process
    /// worked until the last was seen.
    async fn burst(&self) -> Result<(Vec<Duration>, String)> {
        let addresses: Vec<_> = (0..BURST)
            .map(|number| self.session.address(number))
            .collect();
        let before = self.cpu_times()?;
        let begun = Instant::now();
        let (seen, claimed) = tokio::join!(self.reader.watch(&addresses, true, begun), async {
            for number in 0..BURST {
                self.session.claim(number).await?;
            }
            anyhow::Ok(())
        });
        claimed?;
        let seen = seen?;
        let worked = self
            .processes
            .iter()
            .zip(before.iter().zip(self.cpu_times()?));
        let worked: Vec<String> = worked
            .map(|((name, _), (before, after))| {
                let ms = after.saturating_sub(*before).as_secs_f64() * 1e3;
                format!("{name} {ms:.1} ms")
            })
            .collect();
        self.take_back(BURST).await?;
        Ok((seen, worked.join(", ")))
    }

    fn cpu_times(&self) -> Result<Vec<Duration>> {
        let processes = self.processes.iter();
        processes.map(|(_, pid)| cpu::time(*pid)).collect()
    }

    async fn take_back(&self, count: usize) -> Result<()> {
        let addresses: Vec<_> = (0..count)
            .map(|number| self.session.address(number))
            .collect();
        let begun = Instant::now();
        for address in &addresses {
            self.session.release(*address).await?;
        }
        self.reader.watch(&addresses, false, begun).await?;
        Ok(())
    }
}

/// Reads the maps of all nodes of the second cluster.
#[derive(Clone)]
struct Reader(Vec<Maps>);

impl Reader {
    fn open(lab: &Lab) -> Result<Self> {
        let nodes = lab.cluster(1).nodes().iter();
        let maps = nodes.map(|node| Ok(Maps::open_pinned(&node.bpffs())?));
        Ok(Self(maps.collect::<Result<_>>()?))
    }

    /// How many of the addresses some map does not have.
    fn missing(&self, addresses: &[IpAddr]) -> Result<usize> {
        let mut absent = 0;
        for address in addresses {
            absent += usize::from(!self.all_have(*address, true)?);
        }
        Ok(absent)
    }

    fn all_have(&self, address: IpAddr, wanted: bool) -> Result<bool> {
        for maps in &self.0 {
            let entry = maps.ipcache.get(&host_key(address))?;
            // Without an entry of its own, an address gets that of its node's pod CIDR, which is reserved.
            let has = entry.is_some_and(|entry| entry.identity > RESERVED_IDENTITY_MAX);
            if has != wanted {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Looks, on a thread of its own, until every map has each address, or none has; for each, the time since `begun`.
    async fn watch(
        &self,
        addresses: &[Ipv6Addr],
        wanted: bool,
        begun: Instant,
    ) -> Result<Vec<Duration>> {
        let (reader, mut open) = (self.clone(), addresses.to_vec());
        tokio::task::spawn_blocking(move || {
            let mut taken = Vec::with_capacity(open.len());
            while !open.is_empty() {
                let (mut still, mut late) = (Vec::new(), 0);
                let mut ahead = open.into_iter();
                for address in ahead.by_ref() {
                    if reader.all_have(IpAddr::V6(address), wanted)? {
                        taken.push(begun.elapsed());
                        late = 0;
                    } else {
                        still.push(address);
                        late += 1;
                    }
                    // They come about in order: looking at all the others would take the CPU from what is measured.
                    if late == LATE_IN_A_ROW {
                        break;
                    }
                }
                still.extend(ahead);
                open = still;
                if begun.elapsed() > SEEN_MAX {
                    bail!(
                        "{} addresses are late, {:?} first",
                        open.len(),
                        open.first()
                    );
                }
                // A timer that is the feature: how often the outside looks.
                std::thread::park_timeout(LOOK_PAUSE);
            }
            Ok(taken)
        })
        .await?
    }
}

/// The nearest-rank percentile of ascending times, ms.
fn percentile_ms(ascending: &[Duration], percent: usize) -> f64 {
    let rank = (ascending.len() * percent).div_ceil(100);
    ascending
        .get(rank.saturating_sub(1))
        .map_or(f64::INFINITY, |at| at.as_secs_f64() * 1e3)
}

/// For people: least, middle, 99th percentile and most of ascending times.
fn spread_ms(ascending: &[Duration]) -> String {
    let [least, middle, high, most] =
        [1, 50, PERCENTILE, 100].map(|percent| percentile_ms(ascending, percent));
    format!("{least:.1} to {most:.1} ms, median {middle:.1}, p99 {high:.1}")
}

/// Resident memory of the heaviest agent of the second cluster, MiB.
fn agent_rss_mib(lab: &Lab) -> Result<f64> {
    let mut kib = BTreeSet::new();
    for node in lab.cluster(1).nodes() {
        let path = format!("/proc/{}/status", node.agent()?.pid());
        let status = std::fs::read_to_string(&path).with_context(|| path.clone())?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .with_context(|| format!("no VmRSS in {path}"))?;
        let number = line.trim().trim_end_matches("kB").trim();
        kib.insert(number.parse::<u32>().with_context(|| line.to_owned())?);
    }
    let most = kib.last().context("no node")?;
    Ok(f64::from(*most) / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_percentile_is_that_of_the_nearest_rank() {
        let of = |count: u64| (1..=count).map(Duration::from_millis).collect::<Vec<_>>();
        assert!((percentile_ms(&of(100), 99) - 99.0).abs() < 1e-9);
        assert!((percentile_ms(&of(1_000), 99) - 990.0).abs() < 1e-9);
        assert!((percentile_ms(&of(10), 50) - 5.0).abs() < 1e-9);
        assert!(percentile_ms(&[], 99).is_infinite());
    }
}
