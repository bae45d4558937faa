//! Our WireGuard device against wireguard-go and boringtun's own: throughput, processor time, latency, many peers; and what
//! pods of real agents notice.

mod agents;
mod latency;

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::compare::{Figure, Named, Series, Target, against, alone};
use super::{cpu, real_time};
use crate::encryption::device::{Device, Maker, Running};
use crate::encryption::{Pair, Tunnel, Version};
use crate::lab::host::{command_in, run};
use crate::lab::process::Process;

/// Rows of devices alone.
const DEVICE_IDS: [&str; 11] = [
    "wg-boringtun",
    "wg-go",
    "wg-go-1core",
    "wg-cpu",
    "wg-cpu-go",
    "wg-nooffload",
    "wg-4streams",
    "wg-latency",
    "wg-latency-go",
    "wg-latency-limit",
    "wg-peers",
];
/// Seconds of one measurement.
const MEASURE_SECONDS: &str = "3";
/// Ports of iperf3, one for each measurement: a server that lost its client is busy for a while.
const FIRST_PORT: u16 = 5_301;
/// Longest wait for a server, in steps of 10 ms.
const LISTEN_STEPS_MAX: usize = 1_000;
/// Longest that a measurement may take.
const MEASURE_MAX: Duration = Duration::from_secs(20);
/// Attempts at one measurement.
const TRIES_MAX: usize = 3;
/// Peers of the row with many.
const PEERS: usize = 1_000;

/// How a contender is measured.
#[derive(Clone, Copy)]
struct Contender {
    name: &'static str,
    maker: Maker,
    one_core: bool,
}

/// What one measurement came to.
#[derive(Clone, Copy, Default)]
struct Measured {
    gbit: f64,
    cores_per_gbit: f64,
}

/// Measures the rows that are named, or all.
///
/// # Errors
/// When there is no such row, or something cannot be measured; a missed target is no error.
pub async fn run_all(
    rounds: usize,
    only: &[String],
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let known: BTreeSet<&str> = DEVICE_IDS.into_iter().chain(agents::IDS).collect();
    for name in only {
        anyhow::ensure!(known.contains(&**name), "no row is named {name}");
    }
    let is_wanted = |id: &str| only.is_empty() || only.iter().any(|name| name == id);
    let mut figures = Vec::new();
    if DEVICE_IDS.into_iter().any(is_wanted) {
        let pair = Pair::new().await?;
        let measured = measure(&pair, rounds, progress).await;
        pair.remove().await?;
        figures.extend(measured?);
    }
    if agents::IDS.into_iter().any(is_wanted) {
        figures.extend(agents::rows(rounds, progress).await?);
    }
    figures.retain(|figure| is_wanted(&figure.id));
    Ok(figures)
}

async fn measure(pair: &Pair, rounds: usize, progress: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    throughput(pair, rounds, progress, &mut figures).await?;
    no_offload(pair, rounds, progress, &mut figures).await?;
    figures.push(many_peers(pair, rounds, progress).await?);
    Ok(figures)
}

const OURS: Contender = contender("ours", Maker::Ours, false);
const GO: Contender = contender("wireguard-go", Maker::WireguardGo, false);
const BORINGTUN: Contender = contender("boringtun", Maker::Boringtun(1), false);
const OURS_1CORE: Contender = contender("ours on one core", Maker::Ours, true);
const GO_1CORE: Contender = contender("wireguard-go on one core", Maker::WireguardGo, true);

const fn contender(name: &'static str, maker: Maker, one_core: bool) -> Contender {
    Contender {
        name,
        maker,
        one_core,
    }
}

async fn start(pair: &Pair, contenders: &[Contender]) -> Result<Vec<Tunnel>> {
    let mut tunnels = Vec::new();
    for contender in contenders {
        let running = |side| Running {
            is_real_time: true,
            processor: contender.one_core.then_some(side),
        };
        let makers = [contender.maker; 2];
        tunnels.push(pair.tunnel_as(makers, Version::V4, running).await?);
    }
    Ok(tunnels)
}

async fn throughput(
    pair: &Pair,
    rounds: usize,
    progress: &dyn Fn(&str),
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let contenders = [OURS, GO, BORINGTUN, OURS_1CORE, GO_1CORE];
    let tunnels = start(pair, &contenders).await?;
    let all = interleave(pair, &contenders, &tunnels, rounds, "1", progress).await?;
    let four = interleave(pair, &contenders[..1], &tunnels[..1], rounds, "4", progress).await?;
    let gbit = |place: usize| -> Series { all[place].iter().map(|one| one.gbit).collect() };
    let cores =
        |place: usize| -> Series { all[place].iter().map(|one| one.cores_per_gbit).collect() };
    let row = |id, row, unit| Named { id, row, unit };
    let stream = "one TCP stream, MTU 1420";
    figures.push(against(
        row("wg-boringtun", stream, "Gbit/s"),
        &gbit(0),
        "boringtun 0.7.1, its best number of threads",
        &gbit(2),
        Target::RatioAtLeast(3.5),
    ));
    let go = "wireguard-go of 2026";
    figures.push(against(
        row("wg-go", stream, "Gbit/s"),
        &gbit(0),
        go,
        &gbit(1),
        Target::RatioAtLeast(1.8),
    ));
    figures.push(against(
        row("wg-go-1core", "the same, each device on one core", "Gbit/s"),
        &gbit(3),
        go,
        &gbit(4),
        Target::RatioAtLeast(1.8),
    ));
    figures.push(alone(
        row("wg-cpu", "processor time of both devices", "cores/Gbit"),
        &cores(0),
        Target::AtMost(0.25),
    ));
    figures.push(against(
        row("wg-cpu-go", "the same against another", "cores/Gbit"),
        &cores(0),
        go,
        &cores(1),
        Target::Report,
    ));
    let streams: Series = four[0].iter().map(|one| one.gbit).collect();
    figures.push(against(
        row("wg-4streams", "four TCP streams", "Gbit/s"),
        &streams,
        "ours, one stream",
        &gbit(0),
        Target::RatioAtLeast(1.0),
    ));
    figures.extend(latency::rows(pair, &tunnels[0], &tunnels[1], rounds, progress).await?);
    for tunnel in tunnels {
        tunnel.stop().await?;
    }
    Ok(())
}

/// The underlay cannot cut runs of datagrams, and joins what it receives: as many network cards.
async fn no_offload(
    pair: &Pair,
    rounds: usize,
    progress: &dyn Fn(&str),
    figures: &mut Vec<Figure>,
) -> Result<()> {
    pair.set_feature("tx-udp-segmentation", "off").await?;
    pair.set_feature("gro", "on").await?;
    let contenders = [OURS, GO];
    let tunnels = start(pair, &contenders).await?;
    let all = interleave(pair, &contenders, &tunnels, rounds, "1", progress).await?;
    let gbit = |place: usize| -> Series { all[place].iter().map(|one| one.gbit).collect() };
    figures.push(against(
        Named {
            id: "wg-nooffload",
            row: "one TCP stream, the underlay's UDP segmentation off, its GRO on",
            unit: "Gbit/s",
        },
        &gbit(0),
        "wireguard-go of 2026",
        &gbit(1),
        Target::RatioAtLeast(1.3),
    ));
    for tunnel in tunnels {
        tunnel.stop().await?;
    }
    pair.set_feature("tx-udp-segmentation", "on").await
}

async fn interleave(
    pair: &Pair,
    contenders: &[Contender],
    tunnels: &[Tunnel],
    rounds: usize,
    streams: &str,
    progress: &dyn Fn(&str),
) -> Result<Vec<Vec<Measured>>> {
    let mut all = vec![Vec::new(); contenders.len()];
    for round in 0..rounds {
        // Another one begins in every round: none always follows the same one.
        for turn in 0..contenders.len() {
            let place = (round + turn) % contenders.len();
            progress(&format!(
                "{streams} stream(s): round {} of {rounds}, {}",
                round + 1,
                contenders[place].name
            ));
            let mut tries = 1;
            let measured = loop {
                match once(pair, &tunnels[place], streams).await {
                    // Others' devices now and then lose the end of a measurement, or its beginning.
                    Err(error) if tries < TRIES_MAX => {
                        progress(&format!("{}: {error:#}; again", contenders[place].name));
                        tries += 1;
                    }
                    result => break result?,
                }
            };
            all[place].push(measured);
        }
    }
    Ok(all)
}

async fn once(pair: &Pair, tunnel: &Tunnel, streams: &str) -> Result<Measured> {
    let time = || -> Result<Duration> {
        let [one, other] = &tunnel.devices;
        Ok(cpu::time(one.pid())? + cpu::time(other.pid())?)
    };
    static PORTS: AtomicU16 = AtomicU16::new(FIRST_PORT);
    let port = PORTS.fetch_add(1, Ordering::Relaxed).to_string();
    let mut command = real_time(&pair.netns(1), None, Path::new("iperf3"));
    command.args(["-s", "-1", "-p", &port]);
    let log = pair.folder().join(format!("iperf3-{port}.log"));
    let server = Process::start("iperf3", &mut command, &log)?;
    listening(pair, &port).await?;
    let mut command = real_time(&pair.netns(0), None, Path::new("iperf3"));
    let to = tunnel.address(1, Version::V4);
    command.args([
        "-c",
        &to,
        "-p",
        &port,
        "-t",
        MEASURE_SECONDS,
        "-P",
        streams,
        "-J",
    ]);
    let before = time()?;
    let output = tokio::time::timeout(MEASURE_MAX, run(&mut command))
        .await
        .with_context(|| format!("iperf3 took longer than {MEASURE_MAX:?}"))??;
    let used = (time()? - before).as_secs_f64();
    server.stop(nix::sys::signal::Signal::SIGKILL).await?;
    let report: Value = serde_json::from_slice(&output.stdout)?;
    let sum = &report["end"]["sum_received"];
    let (bits, seconds) = sum["bits_per_second"]
        .as_f64()
        .zip(sum["seconds"].as_f64())
        .with_context(|| format!("iperf3's report: {report}"))?;
    let gbit = bits / 1e9;
    Ok(Measured {
        gbit,
        cores_per_gbit: used / seconds / gbit,
    })
}

/// Waits until the second machine has a listener on that port.
async fn listening(pair: &Pair, port: &str) -> Result<()> {
    for _ in 0..LISTEN_STEPS_MAX {
        let mut command = command_in(&pair.netns(1), None, Path::new("ss"));
        let sockets = run(command.args(["-Hltn", &format!("sport = :{port}")])).await?;
        if !sockets.stdout.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    anyhow::bail!("iperf3 does not listen on port {port}")
}

/// Memory for each of many peers, and the time until all are there, from nothing.
async fn many_peers(pair: &Pair, rounds: usize, progress: &dyn Fn(&str)) -> Result<Figure> {
    let (mut kib, mut seconds) = (Series::new(), Series::new());
    for round in 0..rounds {
        progress(&format!("{PEERS} peers: round {} of {rounds}", round + 1));
        let number = u32::try_from(900 + round)?;
        let device = Device::start(pair, 0, number, Maker::Ours).await?;
        let before = resident_kib(&device)?;
        let request = peers_request(PEERS)?;
        let begun = Instant::now();
        ask(&device, &request).await?;
        seconds.push(begun.elapsed().as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        kib.push((resident_kib(&device)? - before) / PEERS as f64);
        device.stop().await?;
    }
    let slowest = seconds.iter().copied().fold(0.0, f64::max);
    let mut figure = alone(
        Named {
            id: "wg-peers",
            row: "memory of each of 1,000 peers",
            unit: "KiB",
        },
        &kib,
        Target::AtMost(20.0),
    );
    let _ = write!(figure.row, "; all applied in {slowest:.3} s (at most 1)");
    figure.met &= slowest < 1.0;
    Ok(figure)
}

fn resident_kib(device: &Device) -> Result<f64> {
    let path = format!("/proc/{}/status", device.pid());
    let text = std::fs::read_to_string(&path)?;
    text.lines()
        .find_map(|line| {
            line.strip_prefix("VmRSS:")?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .with_context(|| format!("no VmRSS in {path}"))
}

fn peers_request(peers: usize) -> Result<String> {
    let mut text = "set=1\nreplace_peers=true\n".to_owned();
    for peer in 0..peers {
        let (high, low) = (peer / 250, peer % 250 + 1);
        writeln!(
            text,
            "public_key={peer:064x}\nendpoint=192.0.2.2:{}\nallowed_ip=10.64.{high}.{low}/32\nallowed_ip=10.{}.{}.0/24",
            30_000 + peer,
            65 + peer / 256,
            peer % 256
        )?;
    }
    text.push('\n');
    Ok(text)
}

async fn ask(device: &Device, request: &str) -> Result<()> {
    let mut stream = UnixStream::connect(device.socket()).await?;
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).await?;
    anyhow::ensure!(answer == "errno=0\n", "the device answers {answer}");
    Ok(())
}
