//! Echo times through a tunnel, less those of the bare underlay.

use std::path::Path;

use anyhow::Result;
use nix::sys::signal::Signal;

use crate::bench::compare::{Figure, Named, Series, Target, alone, median};
use crate::bench::real_time;
use crate::encryption::{Pair, SIDES, Tunnel, Version};
use crate::lab::binaries_folder;
use crate::lab::host::{ip_batch, run};
use crate::lab::process::Process;
use crate::traffic::percentile;

/// Echo requests of one measurement.
const ECHOES: &str = "1000";
/// Seconds between two of them.
const EVERY_SECONDS: &str = "0.002";
/// What this may add, microseconds.
const ADDED_MICROS_MAX: f64 = 60.0;
/// Port of the forwarders.
const FORWARD_PORT: u16 = 19_999;

/// Ours, wireguard-go, and processes that only forward, which is the least that a device in user space can add here.
pub async fn rows(
    pair: &Pair,
    ours: &Tunnel,
    go: &Tunnel,
    rounds: usize,
    progress: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let forwarders = forwarders(pair).await?;
    let plain = pair.underlay(1, Version::V4);
    let through = [
        ours.address(1, Version::V4),
        go.address(1, Version::V4),
        forwarded(1),
    ];
    let (mut bare, mut added) = (Series::new(), [const { Series::new() }; 3]);
    for round in 0..rounds {
        progress(&format!("latency: round {} of {rounds}", round + 1));
        let least = echo_p99(pair, &plain).await?;
        bare.push(least);
        for (series, address) in added.iter_mut().zip(&through) {
            series.push(echo_p99(pair, address).await? - least);
        }
    }
    for forwarder in forwarders {
        forwarder.stop(Signal::SIGKILL).await?;
    }
    let [ours, go, forwarded] = added;
    let least = Target::AtMost(ADDED_MICROS_MAX);
    let rows = [
        (
            "wg-latency",
            "99th percentile of echo times, above plain veth",
            ours,
            least,
        ),
        (
            "wg-latency-go",
            "the same of wireguard-go",
            go,
            Target::Report,
        ),
        (
            "wg-latency-limit",
            "the same of a process that only forwards",
            forwarded,
            Target::Report,
        ),
    ];
    let bare = median(&bare);
    Ok(rows
        .into_iter()
        .map(|(id, row, series, target)| {
            let named = Named {
                id,
                row,
                unit: "us",
            };
            let mut figure = alone(named, &series, target);
            figure.peer = Some(bare);
            "plain veth".clone_into(&mut figure.peer_name);
            figure
        })
        .collect())
}

async fn forwarders(pair: &Pair) -> Result<Vec<Process>> {
    let program = binaries_folder()?.join("clustermesh-lab-traffic");
    let end = |side| format!("{}:{FORWARD_PORT}", pair.underlay(side, Version::V4));
    let mut started = Vec::new();
    for side in SIDES {
        let lines = format!(
            "tuntap add dev forward0 mode tun\naddr add {}/24 dev forward0\nlink set forward0 mtu 1420 up\n",
            forwarded(side)
        );
        ip_batch(Some(&pair.netns(side)), &lines).await?;
        let mut command = real_time(&pair.netns(side), None, &program);
        command.args(["forward", "--device", "forward0", "--from", &end(side)]);
        command.args(["--to", &end(1 - side)]);
        let log = pair.folder().join(format!("forward{side}.log"));
        let name = format!("forwarder {side}");
        started.push(Process::start_ready(&name, &mut command, &log).await?);
    }
    Ok(started)
}

fn forwarded(side: usize) -> String {
    format!("10.255.0.{}", side + 1)
}

/// 99th percentile, microseconds.
async fn echo_p99(pair: &Pair, to: &str) -> Result<f64> {
    let mut command = real_time(&pair.netns(0), None, Path::new("ping"));
    let output = run(command.args(["-n", "-c", ECHOES, "-i", EVERY_SECONDS, to])).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    let mut micros: Vec<f64> = text
        .lines()
        .filter_map(|line| {
            let (_, time) = line.split_once("time=")?;
            time.split(' ').next()?.parse::<f64>().ok()
        })
        .map(|millis| millis * 1e3)
        .collect();
    anyhow::ensure!(!micros.is_empty(), "ping {to}: {text}");
    micros.sort_by(f64::total_cmp);
    Ok(percentile(&micros, 99))
}
